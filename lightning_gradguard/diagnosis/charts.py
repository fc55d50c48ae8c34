"""Charts of a diagnosis's HTML page.

They are positions in pixels and texts, which a template writes as SVG.

`heat_map` shows the newest steps, `fix_panels` the gradients over depth with each fix that was tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lightning_gradguard.charts import SCALE, bin_rows, cells_uri, elide, scale_uri
from lightning_gradguard.diagnosis.wording import power
from lightning_gradguard.introspection.gradient_profile import depth_tilt
from lightning_gradguard.stats.trends import HEALTHY_DEPTH_TILT, MIN_LAYERS

if TYPE_CHECKING:
    from lightning_gradguard.diagnosis.diagnosis import Diagnosis, Timeline


class Tick(NamedTuple):
    """A position on an axis, and its text."""

    place: float
    text: str


def round_stride(least: float) -> int:
    """Round up to one of 1, 2, 5, 10, 20, ...

    >>> [round_stride(x) for x in (0.0, 1.5, 6.0, 101.0)]
    [1, 2, 10, 200]
    """
    power = int(10 ** max(0, math.ceil(math.log10(max(least, 1.0))) - 1))
    return next(power * x for x in (1, 2, 5, 10) if power * x >= least)


# The heat map.

#: Largest number of rows, above which they are binned, and number of worst rows that are marked.
ROWS, MARKED = 150, 3
#: Largest width and height of the cells, of one column and of one row.
_WIDTH, _HEIGHT, _COLUMN, _ROW = 600.0, 420.0, 40.0, 22.0
#: Largest length of a row's label, characters; height of a line of text.
_LABEL, _LINE = 26, 13.0
#: Heights of a strip above the cells, of the gap between them, and of the loss curve below.
_STRIP, _GAP, _LOSS = 9.0, 7.0, 70.0
#: Ratio of the largest to the smallest loss from which the scale is logarithmic.
_FAR_APART = 50.0


class Row(NamedTuple):
    """Label of a row, empty without room for it.

    The worst rows are marked. ``name`` is the whole name.
    """

    middle: float
    text: str
    name: str
    worst: bool


class Strip(NamedTuple):
    """Left edges of columns with skipped or clipped steps."""

    name: str
    top: float
    columns: tuple[float, ...]


class Losses(NamedTuple):
    """Loss by step.

    Points of each line without a gap; the largest and the smallest loss as ticks.
    """

    lines: tuple[str, ...]
    ticks: tuple[Tick, ...]
    height: float
    logarithmic: bool


class HeatMap(NamedTuple):
    """Heat map of layers by steps.

    The upper left corner of the cells is the origin.

    Attributes:
        image: The cells, one pixel each, as the data URI of a PNG.
        scale: The colours from small to large, one pixel high, likewise.
        ends: Ends of the scale, decades.
        width: Width of all cells.
        height: Height of all cells.
        column: Width of one column.
        rows: Labels beside the cells.
        steps: Ticks below the cells.
        strips: Strips above the cells, at negative heights, ``thick`` each.
        thick: Height of a strip.
        onset: Middle of the column in which the fault began; None if it is older.
        has_nonfinite: True if a cell is NaN or Inf.
        has_blank: True if a cell has no gradient.
        losses: Loss curve below; None with fewer than two finite losses.
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


def heat_map(timeline: Timeline | None, step: int, parameters: Sequence[str]) -> HeatMap | None:
    """Lay out the heat map of the newest steps.

    None if there is nothing to draw.

    Args:
        timeline: The newest steps, if they are known.
        step: Step at which the fault began.
        parameters: Affected tensors, worst first. If a tensor has no row, the rows of its module are marked.
    """
    if timeline is None or not timeline.steps or not timeline.layers:
        return None
    names, cells = bin_rows(timeline.layers, np.array(timeline.rms_log10, dtype=np.float64), ROWS)
    column = min(_COLUMN, _WIDTH / len(timeline.steps))
    height = min(_ROW * len(names), _HEIGHT)
    return HeatMap(
        image=cells_uri(cells),
        scale=scale_uri(),
        ends=SCALE,
        width=column * len(timeline.steps),
        height=height,
        column=column,
        rows=_rows(names, height, _ranks(timeline.layers, parameters[:MARKED])),
        steps=_step_ticks(timeline.steps, column),
        strips=_strips({"skipped": timeline.skipped, "clipped": timeline.clipped}, column),
        thick=_STRIP,
        onset=column * (timeline.steps.index(step) + 0.5) if step in timeline.steps else None,
        has_nonfinite=bool(np.isnan(cells).any()),
        has_blank=bool(np.isneginf(cells).any()),
        losses=_losses(timeline.losses, column),
    )


def _ranks(layers: Sequence[str], parameters: Sequence[str]) -> dict[int, int]:
    """Return row index to rank of the parameters."""
    size, ranks = math.ceil(len(layers) / ROWS), dict[int, int]()
    for rank, parameter in enumerate(parameters):
        module = parameter.rpartition(".")[0]
        same_module = [layer for layer in layers if module and layer.rpartition(".")[0] == module]
        for layer in [parameter] if parameter in layers else same_module:
            ranks.setdefault(layers.index(layer) // size, rank)
    return ranks


def _rows(names: Sequence[str], height: float, ranks: Mapping[int, int]) -> tuple[Row, ...]:
    """Label the worst rows, then others with room."""
    high = height / len(names)
    others = [i for i in range(0, len(names), math.ceil(_LINE / high)) if i not in ranks]
    rows: list[Row] = []
    for i in [*sorted(ranks, key=ranks.__getitem__), *others]:
        middle = high * (i + 0.5)
        is_free = all(abs(middle - row.middle) >= _LINE - 1 for row in rows if row.text)
        if is_free or i in ranks:
            rows.append(Row(middle, elide(names[i], _LABEL) if is_free else "", names[i], i in ranks))
    return tuple(rows)


def _step_ticks(steps: Sequence[int], column: float) -> tuple[Tick, ...]:
    """Return ticks at multiples of a round number."""
    stride = round_stride((max(steps) - min(steps)) / max(1.0, column * len(steps) / 80))
    return tuple(Tick(column * (j + 0.5), f"{s:,}") for j, s in enumerate(steps) if s % max(stride, 1) == 0)


def _strips(flags: Mapping[str, Sequence[bool]], column: float) -> tuple[Strip, ...]:
    """Stack a strip for each kind of event upwards."""
    occurred = [
        (name, [column * j for j, on in enumerate(own) if on]) for name, own in flags.items() if any(own)
    ]
    return tuple(
        Strip(name, -_GAP - _STRIP - (_STRIP + 3) * i, tuple(columns))
        for i, (name, columns) in enumerate(occurred)
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
    # A line of one point is drawn as a dot: from the point to itself.
    drawn = tuple(" ".join(points * 2 if len(points) == 1 else points) for points in lines if points)
    # Enough digits to tell the two ends apart.
    digits = next((d for d in range(3, 9) if f"{low:.{d}g}" != f"{high:.{d}g}"), 3)
    ticks = [Tick(place(x), f"{loss:.{digits}g}") for x, loss in {top: high, bottom: low}.items()]
    return Losses(drawn, tuple(ticks), _LOSS, logarithmic)


# Gradients over depth, one panel for each fix that was tried.

#: Size of a panel without its labels, and distance of the crosses from its edges.
WIDTH, HEIGHT, EDGE = 230.0, 120.0, 7.0
#: Largest number of layers whose dots can be told apart.
DOTS = 40


class Dot(NamedTuple):
    """A layer, with its text under the pointer."""

    x: float
    y: float
    title: str


class Line(NamedTuple):
    """A profile of gradients over depth.

    Attributes:
        points: Points of a line through the layers with a gradient, as SVG writes them; empty if there are none.
        dots: Layers with a gradient, if there are at most `DOTS` layers.
        crosses: Layers without a gradient, at the lower edge, and layers with NaN or Inf, at the upper edge.
    """

    points: str
    dots: tuple[Dot, ...]
    crosses: tuple[Dot, ...]


class Panel(NamedTuple):
    """One fix.

    Attributes:
        rank: Its rank among all fixes, from 1.
        name: Its name.
        tilt: Depth tilt with the fix, decades; None if too few layers get a gradient.
        good: True if the tilt is healthy and the median layer is within the band.
        line: The profile with the fix.
    """

    rank: int
    name: str
    tilt: float | None
    good: bool
    line: Line


class FixPanels(NamedTuple):
    """Panels of the fixes tried, on one scale.

    Attributes:
        before: The profile without a fix, the same in each panel.
        tilt: Depth tilt without a fix; None as in `Panel`.
        band: Upper edge and height of the healthy range, the same in each panel, at the level of the best fix with a
            healthy tilt; None if there is none.
        panels: Best first.
        ticks: Exponents of ten.
        has_absent: True if there is a cross at the lower edge.
        has_nonfinite: True if there is a cross at the upper edge.
    """

    before: Line
    tilt: float | None
    band: tuple[float, float] | None
    panels: tuple[Panel, ...]
    ticks: tuple[Tick, ...]
    has_absent: bool
    has_nonfinite: bool


def fix_panels(diagnosis: Diagnosis) -> FixPanels | None:
    """Lay out a panel for each fix tried.

    None if no fix was tried, or too few layers have a profile.

    Args:
        diagnosis: The diagnosis, with profiles.
    """
    layers, before = diagnosis.layers, diagnosis.profile
    tried = [(i, r) for i, r in enumerate(diagnosis.remedies, 1) if len(r.profile) == len(layers)]
    if len(layers) < MIN_LAYERS or len(before) != len(layers) or not tried:
        return None
    profiles = [before, *(remedy.profile for _, remedy in tried)]
    band = next((healthy_band(profile) for profile in profiles[1:] if _has_healthy_tilt(profile)), ())
    values = [x for drawn in (*profiles, band) for x in drawn if math.isfinite(x)]
    if not values:
        return None
    scale = _Scale(min(values) - 0.5, max(values) + 0.5, layers)
    return FixPanels(
        before=scale.line(before),
        tilt=_tilt(before),
        band=scale.band(band) if band else None,
        panels=tuple(
            Panel(
                rank=rank,
                name=remedy.name,
                tilt=_tilt(remedy.profile),
                good=_has_healthy_tilt(remedy.profile) and _is_within(remedy.profile, band),
                line=scale.line(remedy.profile),
            )
            for rank, remedy in tried
        ),
        ticks=scale.ticks(),
        has_absent=any(-math.inf in profile for profile in profiles),
        has_nonfinite=any(math.inf in profile for profile in profiles),
    )


def healthy_band(profile: Sequence[float]) -> tuple[float, float]:
    """Return the healthy range around a profile, decades.

    The level is where the line of the median slope ends at the output; the last layer itself may have any gradient.

    Args:
        profile: log10(‖g‖/‖w‖) of the layers, with enough finite ones for a tilt.

    Returns:
        Lower and upper end, decades.
    """
    live = [x for x in profile if math.isfinite(x)]
    slope = (depth_tilt(live) or 0.0) / (len(live) - 1)
    output = median(x + slope * (len(live) - 1 - i) for i, x in enumerate(live))
    return output - HEALTHY_DEPTH_TILT[1], output - HEALTHY_DEPTH_TILT[0]


def _has_healthy_tilt(profile: Sequence[float]) -> bool:
    tilt = _tilt(profile)
    return tilt is not None and HEALTHY_DEPTH_TILT[0] <= round(tilt, 1) <= HEALTHY_DEPTH_TILT[1]


def _is_within(profile: Sequence[float], band: Sequence[float]) -> bool:
    """Return True if the median layer is in the band.

    Gradients that are all too large may still have a healthy tilt.
    """
    return bool(band) and band[0] <= median(x for x in profile if math.isfinite(x)) <= band[1]


def _tilt(profile: Sequence[float]) -> float | None:
    return depth_tilt([x for x in profile if math.isfinite(x)])


class _Scale(NamedTuple):
    """Scale of a panel.

    Decades go from the lower to the upper edge, layers from left to right.
    """

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
