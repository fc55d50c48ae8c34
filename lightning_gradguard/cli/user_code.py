"""Import objects named on the command line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class CommandError(ValueError):
    """Raised when a command cannot use its input."""


def import_object(spec: str, argument: str) -> Any:
    """Import an object by module and name.

    The current folder is searched too.

    Args:
        spec: Module and name, such as ``train:Model`` or ``train:Model.Inner``.
        argument: What the command calls this input, such as "--module"; for messages.

    Raises:
        CommandError: If the spec has another form, or the module or the name cannot be found.
    """
    name, _, path = spec.partition(":")
    if not name or not path:
        raise CommandError(f"{argument} must be MODULE:NAME, such as train:Model, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # user code may fail in any way
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == name
        here = [m.name for m in pkgutil.iter_modules([os.getcwd()])] if is_missing else []
        raise CommandError(f"cannot import {name}: {one_line(error)}{did_you_mean(name, here)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise CommandError(f"{spec}: {name} has no {part!r}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


def import_or_build(spec: str, argument: str, kinds: tuple[type, ...], returns: str) -> Any:
    """Import an object, and call it unless it is of a kind that is wanted.

    Args:
        spec: Module and name of an object, or of a class or function that returns one without arguments.
        argument: What the command calls this input; for messages.
        kinds: Kinds of objects that are wanted.
        returns: The kinds in words, such as "a model".

    Returns:
        The object, or what the call returned, of whatever kind that is.

    Raises:
        CommandError: If it cannot be imported or called.
    """
    found = import_object(spec, argument)
    if isinstance(found, kinds):
        return found
    if not callable(found):
        raise CommandError(f"{spec} must be {returns}, or return one when called, got {type(found).__name__}")
    try:
        return found()
    except (Exception, SystemExit) as error:  # user code may fail in any way
        raise CommandError(
            f"cannot call {spec} without arguments: {one_line(error)}{place_of(error)}; "
            f"name a function that takes none and returns {returns}"
        ) from error


def place_of(error: BaseException) -> str:
    """Return the innermost line of the user's own code that an error came through, in brackets.

    Empty if there is none.
    """
    package = str(Path(__file__).parents[1])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        is_library = frame.filename.startswith((package, "<")) or "site-packages" in frame.filename
        if not is_library and not frame.filename.startswith(os.path.dirname(os.__file__)):
            return f" ({os.path.basename(frame.filename)}, line {frame.lineno}, in {frame.name})"
    return ""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Suggest the most similar public choice, if any."""
    near = difflib.get_close_matches(name, [c for c in choices if not c.startswith("_")], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(error: BaseException) -> str:
    """Return an error as one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
