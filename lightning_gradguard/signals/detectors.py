"""Detectors of gradients that explode or are not finite.

Each turns one step's statistics into a `Reading`, by pure `init` and `update`, without a host read.

A detector is a frozen dataclass with a ``fault``, ``measures``, ``init(stats) -> state`` and
``update(stats, state) -> (Reading, state)``, where the state is a NamedTuple of tensors, possibly empty.
Nothing else is needed to write one: no registry, no base class. `reading` fills in what is left out.

Severity, patience and silence are not decided here but in ``verdicts``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.signals.reading import Detector as Detector
from lightning_gradguard.signals.reading import (
    Nothing,
    Reading,
    above,
    hot,
    norm_score,
    positive,
    profile_score,
    reading,
)
from lightning_gradguard.signals.stats import GradStats
from lightning_gradguard.signals.trends import ALARM_Z, trends_of
from lightning_gradguard.verdicts.faults import Fault

#: Applied update ratio above which a step changes a layer by too much.
_LARGE_UPDATE = 0.1
#: Steps from which a tilt towards the input counts: a net that begins in chaos may tame itself before long.
_CHAOS = 15
#: Decades of growth of the usual norm that no healthy training shows while its loss leaves all bounds.
_SURGE = 3.0


@dataclass(frozen=True)
class NonFinite:
    """Flags a step whose gradients, global norm or loss are not finite.

    A global norm that overflows float32 counts as non-finite. Names the tensors in backward order, so the
    first is the one nearest to where it began.
    """

    fault: ClassVar[Fault] = Fault.NONFINITE
    measures: ClassVar[tuple[str, ...]] = (
        "tensors with a non-finite gradient norm",
        "losses that are not finite",
    )

    def init(self, stats: GradStats) -> Any:
        """Remembers nothing."""
        return Nothing()

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        bad = ~torch.isfinite(stats.norms)
        score = torch.where(bad, stats.layout.depth, -torch.inf)
        # Neither: the global norm of finite norms overflows, and all of them are at it.
        only_loss = ~bad.any() & ~stats.loss.isfinite() & stats.has_loss
        count = torch.where(only_loss, 1, bad.sum())
        measure = torch.where(only_loss, 1.0, 0.0)
        return reading(stats, ~stats.finite, count, 0.0, score=score, measure=measure), state


@dataclass(frozen=True)
class Spike:
    """Flags a single step whose global norm is far above what is usual.

    Raised when the z-score of log‖g‖ exceeds ``z`` and ‖g‖ exceeds ``ratio`` times its geometric mean, after
    25 steps. An event: it is counted, and clipped where a clipper is set; it never halts. It is said aloud where the
    norm is ten times the usual and the loss has leapt too (by 20 mean deviations, half way to its start at least), or
    the norm is a million times the usual and ten times that of the first steps, or no loss is given; else it is only
    noted (INFO), for the gradient of a healthy net may leap where its loss does not, and where it has converged.

    Args:
        z: Alarm level of the z-score, dimensionless. Default 6.
        ratio: Smallest multiple of the usual norm, so that a nearly deterministic run does not alarm at a wiggle.
    """

    z: float = ALARM_Z
    ratio: float = 3.0
    fault: ClassVar[Fault] = Fault.SPIKE
    measures: ClassVar[tuple[str, ...]] = ("global norm over its usual value",)
    event: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("z", self.z)
        above("ratio", self.ratio, 1.0)

    def init(self, stats: GradStats) -> Any:
        """Remembers nothing; the baseline is in the shared trends."""
        return Nothing()

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        trends = trends_of(stats)
        raised = hot(trends, self.z, self.ratio)
        high = stats.loss > trends.loss_start - 0.5 * trends.loss_start.abs()
        leapt = (trends.loss_jump > 20) & high & (trends.jump > 10)
        # NaN, before there is an early norm, counts as large.
        large = (trends.jump > 1e6) & ~(torch.log10(trends.jump) + trends.surge < 1)
        loud = leapt | large | trends.loss.isnan()
        ceiling = torch.where(loud, 1.0, 0.0)
        seen = reading(stats, raised, trends.jump, self.ratio, score=norm_score(stats), ceiling=ceiling)
        return seen, state


class HotState(NamedTuple):
    """Leaky count of hot steps, float32 []."""

    steps: Tensor


@dataclass(frozen=True)
class Exploding:
    """Flags gradients that grow without bound, towards the input or from step to step.

    Raised when the depth tilt is at or below ``tilt`` decades while the loss falls no more, from step 15 on, or when
    the leaky count of hot steps (+1 for a step that `Spike` would flag, -1 for any other) reaches ``hot_steps``, or
    when the loss and its running mean exceed
    ``loss_ratio`` times its start and a layer is changed by more than a tenth of its weight: harder data, or an
    adversary, raise a loss without that. It will do, too, if the usual norm has grown by three decades; then a loss
    that falls as far below zero counts as well, for it will never end.

    Args:
        tilt: Depth tilt in decades from input to output, negative. Default -1.8: healthy runs without progress stay
            above -1.4, chaotic tanh networks lie below -2.1 until they are tamed.
        hot_steps: Leaky count of hot steps. Default 5.
        loss_ratio: Multiple of the starting loss. Default 3.
    """

    tilt: float = -1.8
    hot_steps: int = 5
    loss_ratio: float = 3.0
    fault: ClassVar[Fault] = Fault.EXPLODING
    measures: ClassVar[tuple[str, ...]] = (
        "depth tilt in decades (negative: growing towards the input)",
        "steps in a row with a norm far above the usual",
        "running mean of the loss over its start, in size",
    )

    def __post_init__(self) -> None:
        positive("-tilt", -self.tilt)
        above("hot_steps", self.hot_steps, 0)
        above("loss_ratio", self.loss_ratio, 1.0)

    def init(self, stats: GradStats) -> Any:
        """No hot step yet."""
        return HotState(torch.zeros_like(stats.total))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        trends = trends_of(stats)
        change = torch.where(hot(trends, ALARM_Z, 3.0), 1.0, -1.0)
        count = torch.clamp(state.steps + change, 0.0, 2.0 * self.hot_steps)
        far = trends.surge > _SURGE
        growth = torch.where(trends.loss_start > 0, trends.loss / trends.loss_start, torch.nan)
        bottomless = (trends.loss < -self.loss_ratio * trends.loss_start.abs()) & far
        growth = torch.where(bottomless, trends.loss.abs() / trends.loss_start.abs(), growth)
        still = trends.stuck | trends.flat
        tilted = (trends.tilt <= self.tilt) & still & (trends.steps >= _CHAOS)
        updates = torch.where(stats.layout.is_layer, torch.nan_to_num(stats.updates), 0.0)
        risen = (growth > self.loss_ratio) & (stats.loss > self.loss_ratio * trends.loss_start)
        driven = (updates.max() > _LARGE_UPDATE) & (trends.steps >= 4)
        heated, grown = count >= self.hot_steps, (risen & (driven | far)) | bottomless
        measure = torch.where(heated, 1.0, torch.where(grown, 2.0, 0.0))
        value = torch.where(heated, count, torch.where(grown, growth, trends.tilt))
        limit = torch.where(heated, float(self.hot_steps), torch.where(grown, self.loss_ratio, self.tilt))
        # The profile says which layers when it is what raised; else the largest gradients.
        score = torch.where(
            tilted & ~heated & ~grown, profile_score(stats, worst_low=False), norm_score(stats)
        )
        raised = tilted | heated | grown
        cleared = (
            ~raised & (count == 0) & ~(growth > 0.8 * self.loss_ratio) & ~(trends.tilt <= self.tilt + 0.5)
        )
        return (
            reading(stats, raised, value, limit, score=score, cleared=cleared, measure=measure),
            HotState(count),
        )
