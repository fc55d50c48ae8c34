"""Detectors of gradients that vanish, explode or are not finite.

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
from lightning_gradguard.signals.trends import ALARM_Z, WARM_UP, trends_of
from lightning_gradguard.verdicts.faults import Fault

#: Applied update ratio above which a step changes a layer by too much.
_LARGE_UPDATE = 0.1
#: Decades of growth of the usual norm that no healthy training shows together with a rising loss.
_SURGE = 2.5


@dataclass(frozen=True)
class NonFinite:
    """Flags a step whose gradients, global norm or loss are not finite.

    A global norm that overflows float32 counts as non-finite. Names the tensors in backward order, so the
    first is the one nearest to where it began.
    """

    fault: ClassVar[Fault] = Fault.NONFINITE
    measures: ClassVar[tuple[str, ...]] = ("tensors with a non-finite gradient norm",)

    def init(self, stats: GradStats) -> Any:
        """Remembers nothing."""
        return Nothing()

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        bad = ~torch.isfinite(stats.norms)
        score = torch.where(bad, stats.layout.depth, -torch.inf)
        return reading(stats, ~stats.finite, bad.sum(), 0.0, score=score), state


@dataclass(frozen=True)
class Spike:
    """Flags a single step whose global norm is far above what is usual.

    Raised when the z-score of log‖g‖ exceeds ``z`` and ‖g‖ exceeds ``ratio`` times its geometric mean, after
    25 steps. An event: it is counted, and clipped where a clipper is set; it never halts. It is said aloud where the
    norm is ten times the usual and the loss has leapt too (by 20 mean deviations, to above its start), or the norm is
    a million times the usual, or no loss is given; else it is only noted (INFO), for the gradient of a healthy net
    may leap where its loss does not.

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
        leapt = (trends.loss_jump > 20) & (stats.loss > trends.loss_start) & (trends.jump > 10)
        loud = leapt | (trends.jump > 1e6) | trends.loss.isnan()
        ceiling = torch.where(loud, 1.0, 0.0)
        seen = reading(stats, raised, trends.jump, self.ratio, score=norm_score(stats), ceiling=ceiling)
        return seen, state


class HotState(NamedTuple):
    """Leaky count of hot steps, float32 []."""

    steps: Tensor


@dataclass(frozen=True)
class Exploding:
    """Flags gradients that grow without bound, towards the input or from step to step.

    Raised when the depth tilt is at or below ``tilt`` decades while the loss falls no more (half as much again,
    and it is raised even if the loss falls), or when the leaky count of hot steps (+1 for a step that `Spike`
    would flag, -1 for any other) reaches ``hot_steps``, or when the loss and its running mean exceed
    ``loss_ratio`` times its start and a layer is changed by more than a tenth of its weight: harder data, or an
    adversary, raise a loss without that. It will do, too, if the usual norm has grown by 2.5 decades.

    Args:
        tilt: Depth tilt in decades from input to output, negative. Default -1.7: healthy runs stay above -0.9,
            chaotic tanh networks lie below -2.
        hot_steps: Leaky count of hot steps. Default 5.
        loss_ratio: Multiple of the starting loss. Default 3.
    """

    tilt: float = -1.7
    hot_steps: int = 5
    loss_ratio: float = 3.0
    fault: ClassVar[Fault] = Fault.EXPLODING
    measures: ClassVar[tuple[str, ...]] = (
        "depth tilt in decades (negative: growing towards the input)",
        "steps in a row with a norm far above the usual",
        "running mean of the loss over its start",
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
        growth = torch.where(trends.loss_start > 0, trends.loss / trends.loss_start, torch.nan)
        still = trends.stuck | trends.flat | (trends.tilt <= 1.5 * self.tilt)
        tilted = (trends.tilt <= self.tilt) & still & (trends.steps >= WARM_UP + 5)
        updates = torch.where(stats.layout.is_layer, torch.nan_to_num(stats.updates), 0.0)
        risen = (growth > self.loss_ratio) & (stats.loss > self.loss_ratio * trends.loss_start)
        driven = (updates.max() > _LARGE_UPDATE) & (trends.steps >= 4)
        far = trends.surge > _SURGE
        heated, grown = count >= self.hot_steps, risen & (driven | far)
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


@dataclass(frozen=True)
class DepthTilt:
    """Flags gradients that vanish from output to input.

    Raised when the depth tilt (`lightning_gradguard.signals.trends.depth_tilt`) is at or above ``limit`` while the
    loss falls no more, from step 30 on; half as much again, and it is raised even if the loss falls, for
    then other layers learn in place of the sick ones. Convergence lowers all layers together and leaves the tilt
    alone. Only a warning while the loss falls, or the applied update ratio of the sick layers stays above
    ``moving``: an adaptive optimizer still moves them.

    Args:
        limit: Depth tilt in decades. Default 3: healthy runs stay below 2.3 even when converged.
        clear: Tilt below which the condition is over. Default 2.5.
        moving: Update ratio above which a layer still learns, dimensionless. Default 1e-6.
    """

    limit: float = 3.0
    clear: float = 2.5
    moving: float = 1e-6
    fault: ClassVar[Fault] = Fault.VANISHING
    measures: ClassVar[tuple[str, ...]] = ("depth tilt in decades from input to output",)
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("clear", self.clear)
        above("limit", self.limit, self.clear)
        positive("moving", self.moving)

    def init(self, stats: GradStats) -> Any:
        """Remembers nothing; the profile is in the shared trends."""
        return Nothing()

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        trends = trends_of(stats)
        score = profile_score(stats, worst_low=True)
        still = trends.stuck | trends.flat
        steep = trends.tilt >= 1.5 * self.limit
        raised = (trends.tilt >= self.limit) & (still | steep) & (trends.steps >= WARM_UP + 5)
        # Not by indexing, which would read the index on the host.
        sickest = stats.updates.gather(0, torch.argmax(score).reshape(1)).reshape(())
        return (
            reading(
                stats,
                raised,
                trends.tilt,
                self.limit,
                score=score,
                cleared=~(trends.tilt >= self.clear) | ~(still | steep),
                ceiling=torch.where((sickest > self.moving) | ~still, 1.0, 2.0),
            ),
            state,
        )


class LastTilt(NamedTuple):
    """The newest time tilt, decades, float32 []; NaN before the first."""

    decades: Tensor


@dataclass(frozen=True)
class TimeTilt:
    """Flags recurrent nets whose gradients vanish from the last to the first steps of a sequence.

    Looked at every eight steps while the loss makes no progress, and only where something is applied again and again.

    Args:
        limit: Decades from the last to the first tenth of the steps. Default 6: healthy LSTM and GRU stay below 3.8.
    """

    limit: float = 6.0
    fault: ClassVar[Fault] = Fault.VANISHING_IN_TIME
    measures: ClassVar[tuple[str, ...]] = ("decades lost from the last to the first steps of the sequence",)
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("limit", self.limit)

    def init(self, stats: GradStats) -> Any:
        """Nothing asked yet."""
        return LastTilt(torch.full_like(stats.total, torch.nan))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step by the newest answer."""
        tilt = torch.where(stats.time_tilt.isnan(), state.decades, stats.time_tilt)
        raised = (tilt >= self.limit) & trends_of(stats).stuck
        score = torch.where(stats.recurrent, 1.0, -torch.inf)
        return reading(stats, raised, tilt, self.limit, score=score), LastTilt(tilt)
