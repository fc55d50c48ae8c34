"""Log records of gradient histograms and number formats."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from lightning_gradguard.forms import check_form
from lightning_gradguard.loggers.base import LogRecord
from lightning_gradguard.stats.histogram import SPREAD, edges

#: What a histogram can be of.
Quantity = Literal["gradient", "weight", "update", "activation"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

_READ = {
    "gradient": (
        "A drift to the left, over time or from late layers to early ones, is vanishing. A drift to the right is "
        "exploding. A peak in the leftmost bin is exact zeros: dead units or underflow."
    ),
    "weight": (
        "A drift to the right is weights that grow, to the left weights that decay. A peak in the leftmost bin is "
        "exact zeros."
    ),
    "update": (
        "What the optimizer's step added to each element. About three decades left of the weights is usual. A peak in "
        "the leftmost bin is elements that did not change."
    ),
    "activation": (
        "The output of the module in one forward pass. A peak in the leftmost bin is exact zeros: units that are off. "
        "A drift to the right from layer to layer is a signal that grows."
    ),
}
_WHAT = {
    "gradient": "the gradient of `{name}`",
    "weight": "the weight `{name}`, before the step",
    "update": "the update of `{name}`",
    "activation": "the output of module `{name}`",
}
_LOG10_NOTE = (
    "**log10 of the magnitude** of {what}, all elements. One unit is a decade, a factor of ten. {read} NaN and "
    "infinity are not counted."
)
_VALUE_NOTE = (
    f"**Values** of {{what}}, all elements. The axis is as wide as the largest magnitude, but no wider than "
    f"{SPREAD:.0f} root mean squares to each side. Values beyond it are counted in the outer bins. NaN and infinity "
    "are not counted."
)


def histogram_record(
    counts: Mapping[str, Sequence[float]],
    *,
    quantity: Quantity = "gradient",
    limits: Mapping[str, float] | None = None,
    group: str = "gradguard",
) -> LogRecord:
    """Return a record of histograms.

    The tag ends with the tensor's full name, as messages have it.

    Args:
        counts: 30 counts for each tensor that is shown, by its name.
        quantity: What is counted.
        limits: For histograms of values, half the width of each axis; those of log10 have one axis.
        group: Beginning of the tag group, for a second optimizer "gradguard_1".
    """
    axis, note = ("log10", _LOG10_NOTE) if limits is None else ("value", _VALUE_NOTE)
    kind = "hist" if quantity == "gradient" else quantity
    tags = {name: f"{group}_{kind}_{axis}/{name}" for name in counts}
    # Filled in once and cut where the name goes, since notes are built for each histogram of each step.
    begin, end = note.format(what=_WHAT[quantity], read=_READ[quantity]).split("{name}")
    return LogRecord(
        histograms={tags[name]: column for name, column in counts.items()},
        notes={tag: f"{begin}{name}{end}" for name, tag in tags.items()},
        edges={} if limits is None else {tags[name]: edges(limits[name]) for name in counts},
    )


def activations_record(
    shares: Mapping[str, tuple[float | None, float | None]], *, step: int, group: str = "gradguard"
) -> LogRecord:
    """Return a record with a table of saturated and dead units.

    Args:
        shares: For each module, the share of its output that is saturated, and of its units that are dead; None where
            that has no meaning.
        step: For the table's heading.
        group: As in `histogram_record`.
    """
    note = (
        "**Saturated**: share of the module's output that lies within 1 % of its range from an end, where gradients "
        "are nearly zero; of a module that is called often, in its first 8 calls. **Dead**: share of its units that "
        "gave zero for the whole batch, and get no gradient."
    )
    rows = [
        f"| {_code(name)} | " + " | ".join("" if x is None else _percent(x) for x in pair) + " |"
        for name, pair in shares.items()
        if pair != (None, None)
    ]
    if not rows:
        return LogRecord()
    table = "\n".join(["| module | saturated | dead |", "|---|---|---|", *rows])
    tag = f"{group}_activations/table"
    return LogRecord(texts={tag: f"### Activations, step {step:,}\n\n{note}\n\n{table}"}, notes={tag: note})


def update_ratio_record(ratios: Mapping[str, float], *, group: str = "gradguard") -> LogRecord:
    """Return a record of log10 of ‖Δw‖ / ‖w‖, one scalar for each tensor.

    Args:
        ratios: Ratio of each tensor by its name; one that is 0 or not finite is left out.
        group: As in `histogram_record`.
    """
    tags = {f"{group}_update_ratio_log10/{name}": (name, x) for name, x in ratios.items() if 0 < x < math.inf}
    note = (
        "log10 of the size of the applied update of `{name}` relative to the weight. About -3 is usual. Above -1 the "
        "steps are too large; below -6 nothing is learned."
    )
    return LogRecord(
        scalars={tag: math.log10(x) for tag, (_, x) in tags.items()},
        notes={tag: note.format(name=name) for tag, (name, _) in tags.items()},
    )


class ShownTensors:
    """Choice of the tensors that are shown, the same in every run of a model.

    They are spread evenly over the model, weights of layers before biases and norms, so two runs can be compared and a
    course over depth is seen. A histogram is read over time, so a tensor that is shown stays, also while it has
    no gradient; a place that is free goes to tensors that come later, as where layers are unfrozen.

    Args:
        most: Largest number shown at a time, at least 1.

    Raises:
        ValueError: If ``most`` is below 1.
    """

    def __init__(self, most: int = 24) -> None:
        if most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        self._most = most
        self._shown: list[str] = []

    def choose(self, names: Sequence[str], first: Collection[str] = ()) -> list[str]:
        """Return the names to show, in the given order.

        Args:
            names: Tensors that there are now, in the model's order.
            first: Those of them that are shown before others.
        """
        known = set(self._shown)
        waiting = [name for name in names if name not in known]
        for group in ([n for n in waiting if n in first], [n for n in waiting if n not in first]):
            self._shown += _spread(group, self._most - len(self._shown))
        shown = set(self._shown)
        return [name for name in names if name in shown]

    def state_dict(self) -> list[str]:
        """Return the state as plain types."""
        return list(self._shown)

    def load_state_dict(self, state: list[str]) -> None:
        """Continue with the tensors of `state_dict`.

        Raises:
            ValueError: If it has another form.
        """
        check_form(state, [str], "the state")
        self._shown = list(dict.fromkeys(state))[: self._most]


def _spread(names: Sequence[str], number: int) -> list[str]:
    """Return a number of names at even distances, the first and the last among them."""
    if number >= len(names):
        return list(names)
    if number <= 1:
        return list(names[:number])
    return [names[round(i * (len(names) - 1) / (number - 1))] for i in range(number)]


class Format(NamedTuple):
    """Bounds of a number format.

    Attributes:
        tag: Its name in tags.
        title: Its name in the table.
        normal: Smallest normal number; below it digits are lost.
        subnormal: Smallest number above zero.
        overflow: Smallest float32 above the largest number.
    """

    tag: str
    title: str
    normal: float
    subnormal: float
    overflow: float

    @classmethod
    def of(cls, tag: str, title: str, dtype: torch.dtype) -> Format:
        """Return the bounds of a torch dtype."""
        numbers = torch.finfo(dtype)
        overflow = float(np.nextafter(np.float32(numbers.max), np.float32(np.inf)))
        return cls(tag, title, numbers.smallest_normal, numbers.smallest_normal * numbers.eps, overflow)


FORMATS = (
    Format.of("fp16", "fp16", torch.float16),
    Format.of("bf16", "bf16", torch.bfloat16),
    Format.of("e4m3", "fp8 e4m3", torch.float8_e4m3fn),
    Format.of("e5m2", "fp8 e5m2", torch.float8_e5m2),
)

#: Elements below each of these are counted: the three bounds of each format, and infinity for all finite ones.
THRESHOLDS: tuple[float, ...] = (*(x for f in FORMATS for x in (f.normal, f.subnormal, f.overflow)), math.inf)

#: A cell of the table is bold from this share of elements that are lost or overflow.
BOLD = 0.01

_TABLE_NOTE = (
    "Share of the gradient's nonzero elements that would **lose digits** / **be lost** if they were cast without a "
    "scale, and that would **overflow**, if any do. An element loses digits below the smallest normal number of the "
    "format. It is lost below the smallest number, where it rounds to that number or to zero. A loss scale of 2^k "
    "divides all bounds of a format by 2^k. fp8 is meant to be used with a loss scale."
)
_SCALAR_NOTE = (
    "Share of all nonzero gradient elements below {bound:.3g}, the smallest {kind}number of {title}."
)


def exponents_record(
    below: Mapping[str, Sequence[float]],
    rows: Sequence[str],
    *,
    step: int,
    group: str = "gradguard",
) -> LogRecord:
    """Return a record of losses in narrow formats.

    It has eight scalars over all tensors, and a table with rows for some of them: the shares of elements that would
    lose digits, be lost or overflow in each of `FORMATS`.

    Args:
        below: For each parameter, the number of its nonzero elements below each of `THRESHOLDS`.
        rows: Parameters that have a row in the table.
        step: For the table's heading.
        group: Beginning of the tag group, for a second optimizer "gradguard_1".
    """
    group = f"{group}_exponents"
    whole = [sum(column) for column in zip(*below.values(), strict=True)]
    bounds = [("subnormal", "normal "), ("lost", "")]
    tags = {
        f"{group}/{f.tag}_{name}": _SCALAR_NOTE.format(bound=bound, kind=kind, title=f.title)
        for f in FORMATS
        for (name, kind), bound in zip(bounds, (f.normal, f.subnormal), strict=True)
    }
    shares = [x for coarse, lost, _ in _shares(whole) for x in (coarse, lost)]
    lines = [
        f"### Gradients in narrow number formats, step {step:,}",
        _TABLE_NOTE,
        "\n".join(
            [
                "| loses digits / lost | " + " | ".join(f.title for f in FORMATS) + " |",
                "|---" * (1 + len(FORMATS)) + "|",
                "| smallest normal / number | "
                + " | ".join(f"{f.normal:.1e} / {f.subnormal:.1e}" for f in FORMATS)
                + " |",
                _row(f"**all {len(below):,} tensors**", whole),
                *(_row(_code(name), below[name]) for name in rows),
            ]
        ),
    ]
    table = f"{group}/table"
    return LogRecord(
        scalars=dict(zip(tags, shares, strict=True)),
        texts={table: "\n\n".join(lines)},
        notes={**tags, table: _TABLE_NOTE},
    )


def _shares(below: Sequence[float]) -> list[tuple[float, float, float]]:
    """Return for each format the shares coarse, lost, overflowing."""
    whole = below[-1]
    parts = [x / whole if whole else math.nan for x in below[:-1]]
    # If nothing overflows, both counts were summed in the same order, so the difference is exactly zero.
    return [
        (coarse, lost, 1 - fits)
        for coarse, lost, fits in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]


def _row(title: str, below: Sequence[float]) -> str:
    if not below[-1]:
        return f"| {title} |" + " all zero |" * len(FORMATS)
    return f"| {title} | " + " | ".join(_cell(*shares) for shares in _shares(below)) + " |"


def _cell(coarse: float, lost: float, over: float) -> str:
    parts = [f"{_percent(coarse)} / {_percent(lost)}"] if coarse or not over else []
    parts += [f"{_percent(over)} overflow"] if over else []
    text = ", ".join(parts)
    return f"**{text}**" if max(lost, over) >= BOLD else text


def _code(name: str) -> str:
    """Return a name as code for a cell of a table."""
    cell = name.replace("|", "\\|")
    return f"`` {cell} ``" if "`" in cell else f"`{cell}`"


def _percent(share: float) -> str:
    percent = 100 * share
    if 0 < percent < 0.1:
        return "<0.1 %"  # a small share must not read as zero
    return f"{percent:.1f} %" if 0 < percent < 9.95 else f"{percent:.0f} %"
