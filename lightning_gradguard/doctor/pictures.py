"""The heat map and the loss on a diagnosis's page: places and texts, in pixels, which a template writes as SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_gradguard.sinks.cells import SCALE, binned, paint
from lightning_gradguard.sinks.tags import shorten

if TYPE_CHECKING:
    from lightning_gradguard.doctor.diagnosis import Course

#: Rows of the heat map, of which more are binned, and rows that are marked.
ROWS, MARKED = 150, 3
#: Room of the heat map, its widest column and its highest row.
_WIDTH, _HEIGHT, _COLUMN, _ROW = 600.0, 420.0, 40.0, 22.0
#: Room of a row's label in characters, and of a line of text.
_LABEL, _LINE = 26, 13.0
#: Heights of a strip above the heat map, of the gap between them, and of the loss below.
_STRIP, _GAP, _LOSS = 9.0, 7.0, 70.0
#: Losses that differ by such a factor are drawn on a logarithmic scale.
_FAR_APART = 50.0


class Tick(NamedTuple):
    """A place on an axis, and what stands there."""

    place: float
    text: str


class Row(NamedTuple):
    """Label of a row; empty where there is no room. The worst are marked."""

    middle: float
    text: str
    worst: bool


class Strip(NamedTuple):
    """Left edges of the columns in which something was done."""

    name: str
    top: float
    columns: tuple[float, ...]


class Losses(NamedTuple):
    """Loss by step: points of each line without a gap, and the largest and the smallest loss as ticks."""

    lines: tuple[str, ...]
    ticks: tuple[Tick, ...]
    height: float
    logarithmic: bool


class HeatMap(NamedTuple):
    """Layers by steps. The upper left corner of the cells is the origin.

    Attributes:
        image: The cells, one pixel each, as the data URI of a PNG.
        scale: The colours from the small to the large, one pixel high, the same way.
        ends: Ends of the scale, decades.
        width: Of all cells.
        height: Of all cells.
        column: Width of one column.
        rows: What stands beside them.
        steps: Ticks below.
        strips: Above the cells, at negative heights, ``thick`` each.
        thick: Height of a strip.
        onset: Middle of the column in which the fault began; None if it is not among them.
        has_nonfinite: Whether a cell is not finite.
        has_blank: Whether a cell has no gradient.
        losses: Drawn below; None if there are not two.
    """

    image: str
    scale: str
    ends: tuple[float, float]
    width: float
    height: float
    column: float
    rows: tuple[Row, ...]
    steps: tuple[Tick, ...]
    strips: tuple[Strip, ...]
    thick: float
    onset: float | None
    has_nonfinite: bool
    has_blank: bool
    losses: Losses | None


def heat_map(course: Course | None, step: int, parameters: Sequence[str]) -> HeatMap | None:
    """The heat map of the newest steps; None where there is nothing to draw.

    Args:
        course: The newest steps, if they are known.
        step: Where the fault began.
        parameters: Tensors concerned, worst first. Those of the same module are marked where the tensor is no row.
    """
    if course is None or not course.steps or not course.layers:
        return None
    names, cells = binned(course.layers, np.array(course.rms_log10, dtype=np.float64), ROWS)
    column = min(_COLUMN, _WIDTH / len(course.steps))
    height = min(_ROW * len(names), _HEIGHT)
    return HeatMap(
        image=_png(cells),
        scale=_png(np.linspace(*SCALE, 97).reshape(1, -1)),
        ends=SCALE,
        width=column * len(course.steps),
        height=height,
        column=column,
        rows=_rows(names, height, _ranks(course.layers, parameters[:MARKED])),
        steps=_step_ticks(course.steps, column),
        strips=_strips({"skipped": course.skipped, "clipped": course.clipped}, column),
        thick=_STRIP,
        onset=column * (course.steps.index(step) + 0.5) if step in course.steps else None,
        has_nonfinite=bool(np.isnan(cells).any()),
        has_blank=bool(np.isneginf(cells).any()),
        losses=_losses(course.losses, column),
    )


def _ranks(layers: Sequence[str], parameters: Sequence[str]) -> dict[int, int]:
    """Row to the rank of the parameter it stands for, worst first."""
    size, ranks = math.ceil(len(layers) / ROWS), dict[int, int]()
    for rank, parameter in enumerate(parameters):
        module = parameter.rpartition(".")[0]
        kin = [layer for layer in layers if module and layer.rpartition(".")[0] == module]
        for layer in [parameter] if parameter in layers else kin:
            ranks.setdefault(layers.index(layer) // size, rank)
    return ranks


def _rows(names: Sequence[str], height: float, ranks: Mapping[int, int]) -> tuple[Row, ...]:
    """The worst rows, which have the first choice of place for their labels, and evenly spaced others."""
    high = height / len(names)
    others = [i for i in range(0, len(names), math.ceil(_LINE / high)) if i not in ranks]
    rows: list[Row] = []
    for i in [*sorted(ranks, key=ranks.__getitem__), *others]:
        middle = high * (i + 0.5)
        is_free = all(abs(middle - row.middle) >= _LINE - 1 for row in rows if row.text)
        if is_free or i in ranks:
            rows.append(Row(middle, shorten(names[i], _LABEL) if is_free else "", i in ranks))
    return tuple(rows)


def _step_ticks(steps: Sequence[int], column: float) -> tuple[Tick, ...]:
    """Steps that are multiples of a round number, not more than there is room for."""
    stride = round_stride((max(steps) - min(steps)) / max(1.0, column * len(steps) / 80))
    return tuple(Tick(column * (j + 0.5), f"{s:,}") for j, s in enumerate(steps) if s % max(stride, 1) == 0)


def round_stride(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that is no smaller.

    >>> [round_stride(x) for x in (0.0, 1.5, 6.0, 101.0)]
    [1, 2, 10, 200]
    """
    power = int(10 ** max(0, math.ceil(math.log10(max(least, 1.0))) - 1))
    return next(power * x for x in (1, 2, 5, 10) if power * x >= least)


def _strips(flags: Mapping[str, Sequence[bool]], column: float) -> tuple[Strip, ...]:
    """One for each thing that was done at all, upwards from the cells."""
    done = [(name, [column * j for j, on in enumerate(own) if on]) for name, own in flags.items() if any(own)]
    return tuple(
        Strip(name, -_GAP - _STRIP - (_STRIP + 3) * i, tuple(columns))
        for i, (name, columns) in enumerate(done)
    )


def _losses(losses: Sequence[float], column: float) -> Losses | None:
    known = [loss for loss in losses if math.isfinite(loss)]
    if len(known) < 2:
        return None
    low, high = min(known), max(known)
    logarithmic = low > 0 and high > _FAR_APART * low
    scaled = [math.log10(loss) if logarithmic and loss > 0 else loss for loss in losses]
    bottom, top = min(x for x in scaled if math.isfinite(x)), max(x for x in scaled if math.isfinite(x))

    def place(x: float) -> float:
        return _LOSS * (0.5 if top == bottom else (top - x) / (top - bottom))

    lines: list[list[str]] = [[]]
    for j, x in enumerate(scaled):
        if math.isfinite(x):
            lines[-1].append(f"{column * (j + 0.5):.1f},{place(x):.1f}")
        elif lines[-1]:
            lines.append([])
    # Enough digits to tell the two apart.
    digits = next((d for d in range(3, 9) if f"{low:.{d}g}" != f"{high:.{d}g}"), 3)
    ticks = [Tick(place(x), f"{loss:.{digits}g}") for x, loss in {top: high, bottom: low}.items()]
    # A line of one point is drawn as a dot.
    return Losses(
        tuple(" ".join(p * 2 if len(p) == 1 else p) for p in lines if p), tuple(ticks), _LOSS, logarithmic
    )


def _png(cells: NDArray[np.floating[Any]]) -> str:
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, paint(cells), format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
