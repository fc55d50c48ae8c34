"""Headlines, names and numbers in messages.

Plain text, with each `name` in backticks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_gradguard.results import Fault

#: Headline of a mistake in the code, for which no fault fits.
MISTAKE = "A mistake in the code"

_HEADLINES = {
    Fault.NONFINITE.value: "The gradients or the loss are NaN or Inf",
    Fault.UNDERFLOW.value: "Gradients are too small for their number format",
    Fault.DISCONNECTED.value: "Layers that are used are not trained",
    Fault.DEAD.value: "Most units of a layer are dead: their gradient is exactly zero",
    Fault.VANISHING.value: "Gradients vanish on their way from the output to the input",
    Fault.VANISHING_IN_TIME.value: "Gradients vanish on their way back through the sequence",
    Fault.EXPLODING.value: "Gradients explode",
    Fault.SPIKE.value: "The gradient norm is far above its baseline",
    Fault.OVERSIZED_UPDATE.value: "Updates are too large for the weights",
    Fault.STALLED.value: "The weights hardly change",
}


#: Headlines of measures for which that of their fault is too narrow.
_BY_MEASURE = {
    "size (RMS) of the outputs over that of the targets": "The outputs are nothing beside their targets",
    "steps in which every gradient is exactly zero": "In many steps no weight gets a gradient at all",
}


def headline(fault: Fault | str, measure: str = "") -> str:
    """Return a fault as a sentence without period.

    Args:
        fault: Any fault or its value; one that is not built in counts as custom.
        measure: What was measured, if it is known.

    >>> headline(Fault.EXPLODING), headline("mixed_up")
    ('Gradients explode', 'Custom fault: mixed up')
    """
    if measure in _BY_MEASURE:
        return _BY_MEASURE[measure]
    return _HEADLINES.get(str(fault), f"Custom fault: {str(fault).replace('_', ' ')}")


def further_reading(fault: Fault) -> tuple[tuple[str, ...], str]:
    """Return TensorBoard tags and a documentation page.

    Args:
        fault: Any fault, also a custom one.
    """
    tags, page = _FURTHER.get(fault, ((), "how-to/halted.md"))
    return tuple(f"gradguard/{tag}" for tag in ("heatmap", *tags)), f"docs/{page}"


_FURTHER = {
    Fault.NONFINITE: (("nonfinite_total",), "how-to/halted.md"),
    Fault.UNDERFLOW: (("total_norm_log10",), "reference/faults.md"),
    Fault.DISCONNECTED: ((), "reference/faults.md"),
    Fault.DEAD: ((), "reference/faults.md"),
    Fault.VANISHING: (("depth_tilt_decades",), "explanation/depth-tilt.md"),
    Fault.VANISHING_IN_TIME: ((), "reference/faults.md"),
    Fault.EXPLODING: (("depth_tilt_decades", "total_norm_log10"), "explanation/depth-tilt.md"),
    Fault.SPIKE: (("total_norm_log10", "clip_scale"), "how-to/clipper.md"),
    Fault.OVERSIZED_UPDATE: (("update_ratio_log10",), "reference/faults.md"),
    Fault.STALLED: (("update_ratio_log10",), "reference/faults.md"),
}


def quote(name: str) -> str:
    r"""Return a tensor's name in backticks, escaped.

    >>> print(quote("net.0.weight"), quote("a`b\n"))
    `net.0.weight` `a\x60b\n`
    """
    escaped = name.replace("\\", "\\\\").replace("`", "\\x60")
    return "`" + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in escaped) + "`"


def listing(names: Sequence[str], most: int = 2) -> str:
    """Return the first quoted names; count the rest.

    >>> listing(["a", "b", "c"])
    '`a`, `b` and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(quote(name) for name in names[:most]) + more


def number(value: float) -> str:
    """Return a number with at most three digits.

    >>> number(0.000012345), number(2.3), number(1e9)
    ('1.23e-05', '2.3', '1e+09')
    """
    return f"{value:.3g}"


def fraction(ratio: float) -> str:
    """Return a step's size relative to the weights.

    >>> fraction(0.5), fraction(12.0), fraction(1.9e-9)
    ('50% of its size', '12 times its size', '1.9e-07% of its size')
    """
    return f"{number(100 * ratio)}% of its size" if ratio < 10 else f"{number(ratio)} times its size"


def power(exponent: float) -> str:
    """Return the number with this log10.

    It may exceed the range of a float.

    >>> power(-2.0), power(-400.5), power(-math.inf)
    ('0.01', '1e-400', '0')
    """
    if exponent == -math.inf:
        return "0"
    if not math.isfinite(exponent):
        return "NaN or Inf"
    return number(10.0**exponent) if abs(exponent) < 300 else f"1e{exponent:+.0f}"


def count(how_many: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun.

    >>> count(1, "layer"), count(12, "layer"), count(2, "loss", "losses")
    ('1 layer', '12 layers', '2 losses')
    """
    return f"{how_many} {noun if how_many == 1 else plural or noun + 's'}"
