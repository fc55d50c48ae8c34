"""The heat map and the loss on a diagnosis's page: places and texts, in pixels, which a template writes as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lightning_gradguard.charts.heatmap import SCALE, bin_rows, cells_uri, scale_uri
from lightning_gradguard.charts.labels import shorten
from lightning_gradguard.diagnosis.wording import power
from lightning_gradguard.introspection.gradient_profile import depth_tilt
from lightning_gradguard.stats.depth_profile import HEALTHY_DEPTH_TILT, MIN_LAYERS

if TYPE_CHECKING:
    from lightning_gradguard.diagnosis.diagnosis import Diagnosis, Timeline

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


def heat_map(course: Timeline | None, step: int, parameters: Sequence[str]) -> HeatMap | None:
    """The heat map of the newest steps; None where there is nothing to draw.

    Args:
        course: The newest steps, if they are known.
        step: Where the fault began.
        parameters: Tensors concerned, worst first. Those of the same module are marked where the tensor is no row.
    """
    if course is None or not course.steps or not course.layers:
        return None
    names, cells = bin_rows(course.layers, np.array(course.rms_log10, dtype=np.float64), ROWS)
    column = min(_COLUMN, _WIDTH / len(course.steps))
    height = min(_ROW * len(names), _HEIGHT)
    return HeatMap(
        image=cells_uri(cells),
        scale=scale_uri(),
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


#: Size of a picture without its labels, and how far crosses stand from its edges.
WIDTH, HEIGHT, EDGE = 230.0, 120.0, 7.0
#: Most layers whose dots can be told apart.
DOTS = 40


class Dot(NamedTuple):
    """A layer, with what is shown when it is pointed at."""

    x: float
    y: float
    title: str


class Line(NamedTuple):
    """A profile: points of a line through the layers with a gradient, these layers if they are few, and the others.

    Attributes:
        points: As SVG writes them; empty if no layer has a gradient.
        dots: Layers with a gradient, if there are at most `DOTS`.
        crosses: Layers without one, at the lower edge, or with one that is not finite, at the upper.
    """

    points: str
    dots: tuple[Dot, ...]
    crosses: tuple[Dot, ...]


class Panel(NamedTuple):
    """One remedy.

    Attributes:
        rank: Its place among all remedies, from 1.
        name: Its name.
        tilt: With it, decades; None with too few layers that get a gradient.
        good: Whether its tilt is healthy and its median layer within the band.
        line: The profile with it.
    """

    rank: int
    name: str
    tilt: float | None
    good: bool
    line: Line


class Panels(NamedTuple):
    """All of them, on one scale.

    Attributes:
        before: The profile without a remedy, the same in each.
        tilt: Without a remedy; None as in `Panel`.
        band: Upper edge and height of what is healthy, the same in each: at the level of the best remedy with a healthy
            tilt; None if there is none.
        panels: Best first.
        ticks: Exponents of ten.
        has_absent: Whether there is a cross at the lower edge.
        has_nonfinite: Whether there is one at the upper edge.
    """

    before: Line
    tilt: float | None
    band: tuple[float, float] | None
    panels: tuple[Panel, ...]
    ticks: tuple[Tick, ...]
    has_absent: bool
    has_nonfinite: bool


def panels_of(diagnosis: Diagnosis) -> Panels | None:
    """Pictures of the remedies that were tried; None where there are none, or too few layers for a profile."""
    layers, before = diagnosis.layers, diagnosis.profile
    tried = [(i, r) for i, r in enumerate(diagnosis.remedies, 1) if len(r.profile) == len(layers)]
    if len(layers) < MIN_LAYERS or len(before) != len(layers) or not tried:
        return None
    profiles = [before, *(remedy.profile for _, remedy in tried)]
    band = next((healthy_band(profile) for profile in profiles[1:] if _is_level(profile)), ())
    values = [x for drawn in (*profiles, band) for x in drawn if math.isfinite(x)]
    if not values:
        return None
    scale = _Scale(min(values) - 0.5, max(values) + 0.5, layers)
    return Panels(
        before=scale.line(before),
        tilt=_tilt(before),
        band=scale.band(band) if band else None,
        panels=tuple(
            Panel(
                rank=rank,
                name=remedy.name,
                tilt=_tilt(remedy.profile),
                good=_is_level(remedy.profile) and _is_within(remedy.profile, band),
                line=scale.line(remedy.profile),
            )
            for rank, remedy in tried
        ),
        ticks=scale.ticks(),
        has_absent=any(-math.inf in profile for profile in profiles),
        has_nonfinite=any(math.inf in profile for profile in profiles),
    )


def healthy_band(profile: Sequence[float]) -> tuple[float, float]:
    """What a layer may have for a healthy tilt, decades, at the level of a profile that has a tilt.

    Its level is where the line of the median slope ends at the output: the last layer itself may have any.
    """
    live = [x for x in profile if math.isfinite(x)]
    slope = (depth_tilt(live) or 0.0) / (len(live) - 1)
    output = median(x + slope * (len(live) - 1 - i) for i, x in enumerate(live))
    return output - HEALTHY_DEPTH_TILT[1], output - HEALTHY_DEPTH_TILT[0]


def _is_level(profile: Sequence[float]) -> bool:
    tilt = _tilt(profile)
    return tilt is not None and HEALTHY_DEPTH_TILT[0] <= round(tilt, 1) <= HEALTHY_DEPTH_TILT[1]


def _is_within(profile: Sequence[float], band: Sequence[float]) -> bool:
    """Whether the median layer is in a band: gradients that are all too large alike have no tilt."""
    return bool(band) and band[0] <= median(x for x in profile if math.isfinite(x)) <= band[1]


class _Scale(NamedTuple):
    """Decades from the lower to the upper edge, and layers from left to right."""

    low: float
    high: float
    layers: tuple[str, ...]

    def place(self, decades: float) -> float:
        return HEIGHT * (self.high - decades) / (self.high - self.low)

    def line(self, profile: Sequence[float]) -> Line:
        dots, crosses = [], []
        for i, (decades, name) in enumerate(zip(profile, self.layers, strict=True)):
            x = WIDTH * i / (len(self.layers) - 1)
            if math.isfinite(decades):
                dots.append(Dot(x, self.place(decades), f"{name}: {power(decades)}"))
            elif math.isinf(decades):
                crosses.append(Dot(x, -EDGE if decades > 0 else HEIGHT + EDGE, name))
        points = " ".join(f"{dot.x:.1f},{dot.y:.1f}" for dot in dots)
        return Line(points, tuple(dots) if len(profile) <= DOTS else (), tuple(crosses))

    def band(self, ends: Sequence[float]) -> tuple[float, float]:
        top, bottom = self.place(ends[1]), self.place(ends[0])
        return top, bottom - top

    def ticks(self) -> tuple[Tick, ...]:
        stride = round_stride((self.high - self.low) / 5)
        first = math.ceil(self.low / stride) * stride
        return tuple(Tick(self.place(k), str(k)) for k in range(first, math.floor(self.high) + 1, stride))


def _tilt(profile: Sequence[float]) -> float | None:
    return depth_tilt([x for x in profile if math.isfinite(x)])
