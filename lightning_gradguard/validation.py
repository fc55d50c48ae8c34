"""Checks of numeric arguments.

An argument out of range raises ValueError, one of the wrong type an error that is a TypeError and a ValueError.
The message names the argument, what it
must be, and what it is: ``max_norm must be positive and finite, got -1.0``.
"""

from __future__ import annotations

import math
from collections.abc import Callable


class ArgumentTypeError(TypeError, ValueError):
    """An argument of the wrong type.

    It is a ValueError too: callers may check for either, whatever the argument.
    """


def check_number(name: str, value: object, need: str, holds: Callable[[float], bool]) -> None:
    """Raise unless an argument is a number that meets a condition.

    Args:
        name: Name of the argument.
        value: Its value.
        need: The condition in words, for the message.
        holds: The condition.

    Raises:
        ArgumentTypeError: If ``value`` is no number; a bool is none.
        ValueError: If the condition does not hold.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} must be {need}, got {value!r}")
    if not holds(value):
        raise ValueError(f"{name} must be {need}, got {value!r}")


def check_positive(name: str, value: object) -> None:
    """Raise unless an argument is positive and finite."""
    check_number(name, value, "positive and finite", lambda v: 0 < v < math.inf)


def check_flag(name: str, value: object) -> None:
    """Raise ArgumentTypeError unless an argument is a bool."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be True or False, got {value!r}")


def check_above(name: str, value: object, bound: float) -> None:
    """Raise unless an argument is finite and above ``bound``."""
    check_number(name, value, f"a finite number above {bound:g}", lambda v: bound < v < math.inf)


def check_fraction(name: str, value: object) -> None:
    """Raise unless an argument is above 0 and at most 1."""
    check_number(name, value, "above 0 and at most 1", lambda v: 0 < v <= 1)


def check_decay(name: str, value: object) -> None:
    """Raise unless an argument is strictly between 0 and 1."""
    check_number(name, value, "between 0 and 1", lambda v: 0 < v < 1)


def check_whole(name: str, value: object, minimum: int = 1) -> None:
    """Raise unless an argument is a whole number of at least ``minimum``."""
    need = f"a whole number, {minimum} or more"
    check_number(name, value, need, lambda v: isinstance(v, int) and v >= minimum)
