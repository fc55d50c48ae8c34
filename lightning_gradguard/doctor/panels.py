"""Gradients over depth without and with each remedy that was tried: small pictures side by side, in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from lightning_gradguard.doctor.pictures import Tick, round_stride
from lightning_gradguard.doctor.trials.profile import HEALTHY, MIN_LAYERS, depth_tilt
from lightning_gradguard.doctor.wording import power

if TYPE_CHECKING:
    from lightning_gradguard.doctor.diagnosis import Diagnosis

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
    """What a layer may have for the tilt to be `HEALTHY`, decades, at the level of a profile that has a tilt.

    Its level is where the line of the median slope ends at the output: the last layer itself may have any.
    """
    live = [x for x in profile if math.isfinite(x)]
    slope = (depth_tilt(live) or 0.0) / (len(live) - 1)
    output = median(x + slope * (len(live) - 1 - i) for i, x in enumerate(live))
    return output - HEALTHY[1], output - HEALTHY[0]


def _is_level(profile: Sequence[float]) -> bool:
    tilt = _tilt(profile)
    return tilt is not None and HEALTHY[0] <= round(tilt, 1) <= HEALTHY[1]


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
