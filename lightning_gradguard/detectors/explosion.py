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

from lightning_gradguard.detectors.base import Detector as Detector
from lightning_gradguard.detectors.base import NoState, Reading, above, hot, positive, profile_score, reading
from lightning_gradguard.results import Fault, Quantity
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.trends import ALARM_Z

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
    fast_path_safe: ClassVar[bool] = True

    def init(self, stats: GradStats) -> Any:
        """Remembers nothing."""
        return NoState()

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        infinite = stats.layout.constant(torch.inf)
        good = stats.norms < infinite  # which NaN is not
        score = torch.where(good, -infinite, stats.layout.depth)
        count, measure = (~good).sum(), None
        if stats.has_loss:
            # Neither: the global norm of finite norms overflows, and all of them are at it.
            measure = ~(stats.loss.abs() < infinite) & good.all()
            count = count + measure
        return reading(
            stats, ~stats.finite, count, 0.0, score=score, cleared=stats.finite, measure=measure
        ), state


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

    @property
    def fast_path_safe(self) -> bool:
        """Whether twice the usual norm is certainly none: what is usual changes a little in a row of quiet steps."""
        return self.ratio >= 3.0

    def init(self, stats: GradStats) -> Any:
        """Remembers nothing; the baseline is in the shared trends."""
        return NoState()

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        trends, number = stats.trends, stats.layout.constant
        start, jump = trends.loss_start, trends.jump
        high = stats.loss > torch.sub(start, start.abs(), alpha=0.5)
        leapt = (trends.loss_jump > number(20)) & high & (jump > number(10))
        # NaN, before there is an early norm, counts as large.
        large = (jump > number(1e6)) & ~(jump.log10() + trends.surge < number(1))
        loud = leapt | large | (trends.loss != trends.loss)
        raised = hot(stats, self.z, self.ratio)
        return reading(stats, raised, jump, self.ratio, score=stats.relative, ceiling=loud), state


class ExplodingState(NamedTuple):
    """What is remembered.

    Attributes:
        steps: float32 [], leaky count of hot steps.
        raised, over: Bool [], what tilt and loss said at the last closer look: that it explodes, or that it is over.
        value, limit, measure: float32 [], likewise.
    """

    steps: Tensor
    raised: Tensor
    over: Tensor
    value: Tensor
    limit: Tensor
    measure: Tensor


@dataclass(frozen=True)
class Exploding:
    """Flags gradients that grow without bound, towards the input or from step to step.

    Raised when the depth tilt is at or below ``tilt`` decades while the loss falls no more, from step 15 on, or when
    the leaky count of hot steps (+1 for a step that `Spike` would flag, -1 for any other) reaches ``hot_steps``, or
    when the loss and its running mean exceed
    ``loss_ratio`` times its start and a layer is changed by more than a tenth of its weight: harder data, or an
    adversary, raise a loss without that. It will do, too, if the usual norm has grown by three decades; then a loss
    that falls as far below zero counts as well, for it will never end. Tilt and loss are looked at in closer looks.

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
    quantities: ClassVar[tuple[Quantity | None, ...]] = (Quantity.DEPTH_TILT, None, None)
    fast_path_safe: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("-tilt", -self.tilt)
        above("hot_steps", self.hot_steps, 0)
        above("loss_ratio", self.loss_ratio, 1.0)

    def init(self, stats: GradStats) -> Any:
        """No hot step yet."""
        zero, unknown = torch.zeros_like(stats.total), torch.full_like(stats.total, torch.nan)
        return ExplodingState(zero, zero > 0, zero == 0, unknown, unknown, zero)

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        number = stats.layout.constant
        _, raised, over, value, limit, measure = state
        if stats.elapsed:
            raised, over, value, limit, measure = self._look(stats)
        steps = torch.clamp(state.steps - stats.passed, min=0.0) if stats.passed else state.steps
        change = torch.where(hot(stats, ALARM_Z, 3.0), number(1.0), number(-1.0))
        count = torch.clamp(steps + change, 0.0, 2.0 * self.hot_steps)
        heated = count >= number(self.hot_steps)
        # The profile says which layers when it is what raised; else the largest gradients.
        tilted = raised & (measure == number(0.0)) & ~heated
        seen = reading(
            stats,
            raised | heated,
            torch.where(heated, count, value),
            torch.where(heated, number(self.hot_steps), limit),
            score=torch.where(tilted, profile_score(stats, worst_low=False), stats.relative),
            cleared=over & (count == number(0.0)),
            measure=torch.where(heated, number(1.0), measure),
        )
        return seen, ExplodingState(count, raised, over, value, limit, measure)

    def _look(self, stats: GradStats) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What tilt and loss say: raised, over, value, limit and measure."""
        trends = stats.trends
        still = trends.no_progress | trends.plateau
        tilted = (trends.tilt <= self.tilt) & still & (trends.steps >= _CHAOS)
        start, far = trends.loss_start, trends.surge > _SURGE
        growth, rising = trends.loss / start, start > 0
        bottomless = (trends.loss < -self.loss_ratio * start.abs()) & far
        large = (stats.updates > _LARGE_UPDATE) & stats.layout.is_layer
        driven = (large.any() & (trends.steps >= 4)) | far
        risen = rising & (growth > self.loss_ratio) & (stats.loss > self.loss_ratio * start)
        grown = (risen & driven) | bottomless
        raised = tilted | grown
        near = (rising & (growth > 0.8 * self.loss_ratio)) | (trends.tilt <= self.tilt + 0.5)
        return (
            raised,
            ~(raised | near),
            torch.where(grown, growth.abs(), trends.tilt),
            torch.where(grown, self.loss_ratio, self.tilt),
            torch.where(grown, 2.0, 0.0),
        )
