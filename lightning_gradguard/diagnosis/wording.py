"""How the doctor writes names and numbers into a sentence: plain text, with each `name` in backticks."""

from __future__ import annotations

import math
from collections.abc import Sequence


def quote(name: str) -> str:
    r"""A tensor's name in backticks, on one line: what would break out of them is escaped.

    >>> print(quote("net.0.weight"), quote("a`b\n"))
    `net.0.weight` `a\x60b\n`
    """
    escaped = name.replace("\\", "\\\\").replace("`", "\\x60")
    return "`" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped) + "`"


def listing(names: Sequence[str], most: int = 2) -> str:
    """Up to ``most`` quoted names, and how many more there are.

    >>> listing(["a", "b", "c"])
    '`a`, `b` and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(quote(name) for name in names[:most]) + more


def number(value: float) -> str:
    """Three digits at most.

    >>> number(0.000012345), number(2.3), number(1e9)
    ('1.23e-05', '2.3', '1e+09')
    """
    return f"{value:.3g}"


def power(exponent: float) -> str:
    """The number whose log10 is given; also one that a float cannot hold.

    >>> power(-2.0), power(-400.5), power(-math.inf)
    ('0.01', '1e-400', '0')
    """
    if exponent == -math.inf:
        return "0"
    if not math.isfinite(exponent):
        return "not finite"
    return number(10.0**exponent) if abs(exponent) < 300 else f"1e{exponent:+.0f}"


def count(how_many: int, noun: str, plural: str = "") -> str:
    """A number with its noun.

    >>> count(1, "layer"), count(12, "layer"), count(2, "remedy", "remedies")
    ('1 layer', '12 layers', '2 remedies')
    """
    return f"{how_many} {noun if how_many == 1 else plural or noun + 's'}"
