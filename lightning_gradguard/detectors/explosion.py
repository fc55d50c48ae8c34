"""Detectors of exploding, spiking and non-finite gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.detectors.base import (
    NoState,
    Reading,
    is_norm_spike,
    profile_score,
    reading,
    updates_of_small,
)
from lightning_gradguard.results import Fault, Quantity
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.trends import ALARM_Z, WARM_UP
from lightning_gradguard.validation import check_above, check_number, check_positive

#: Smallest `Spike.ratio` at which a norm below twice its baseline is certainly no spike: the baseline moves a little
#: while steps are deferred.
_FAST_PATH_RATIO = 3.0
#: Applied update ratio above which a step changes a layer too much.
_LARGE_UPDATE = 0.1
#: First step at which a depth tilt counts: a net that starts out chaotic may recover before.
_TILT_FROM_STEP = 15
#: Growth of the baseline norm in decades that no healthy training shows while its loss diverges.
_DIVERGING_GROWTH = 3.0
#: Steps that could change the loss by as much as it is, from which on a loss that rises is blamed on them. Healthy
#: trainings whose loss rises above its start reach 0.7 of it, those that come apart 30.
_DRIVEN = 4.0
#: Factors by which one of the first steps exceeds all before it, in norm and loss, and all after it, in both,
#: to be an outlier. Healthy trainings reach 6 and 4, and 15.
_RISE, _LOSS_RISE, _FALL = 300.0, 30.0, 1000.0
#: Steps after an outlier until it is told from a loss that is learned, and the largest change of the loss that the
#: outlier's own update may have made, as a part of its loss.
_AFTER, _REACH = 4, 0.3
#: Change of the loss, over its size, that a step may have made and that explains a rise after it.
_OWN = 3.0


@dataclass(frozen=True)
class NonFinite:
    """Detect a non-finite gradient, global norm or loss.

    A global norm whose square overflows float32 counts as non-finite. Tensors are named in backward order, so the first
    is the one nearest to the origin.
    """

    fault: ClassVar[Fault] = Fault.NONFINITE
    measures: ClassVar[tuple[str, ...]] = (
        "tensors with a non-finite gradient norm",
        "losses that are not finite",
    )
    fast_path_safe: ClassVar[bool] = True

    def init(self, stats: GradStats) -> Any:
        """Return an empty state."""
        return NoState()

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Evaluate one step."""
        infinite = stats.layout.constant(torch.inf)
        good = stats.norms < infinite  # False for NaN
        score = torch.where(good, -infinite, stats.layout.depth)
        count, measure = (~good).sum(), None
        if stats.has_loss:
            # If only the global norm overflows, neither counts, and all tensors share in it.
            measure = ~(stats.loss.abs() < infinite) & good.all()
            count = count + measure
        return reading(
            stats, ~stats.finite, count, 0.0, score=score, cleared=stats.finite, measure=measure
        ), state


class SpikeState(NamedTuple):
    """State of `Spike`: what the first steps showed, and the step before; float32 [] each.

    Of the first steps those count that are evaluated in full, as the first ten are, and outliers.

    Attributes:
        norm, loss: Largest global norm so far, and the absolute loss of that step.
        highest: Largest absolute loss so far.
        norm_after, loss_after: Largest of either since that step.
        since: Steps since that step.
        reach: Change of the loss that it may have made, over ``loss``.
        told: 1 if that step was raised.
        rose: 1 if norm and loss jumped at the newest step that was evaluated.
    """

    norm: Tensor
    loss: Tensor
    highest: Tensor
    norm_after: Tensor
    loss_after: Tensor
    since: Tensor
    reach: Tensor
    told: Tensor
    rose: Tensor


@dataclass(frozen=True)
class Spike:
    """Detect a global norm far above its baseline.

    Raised after 25 steps, when the z-score of log‖g‖ exceeds ``z`` and ‖g‖ exceeds ``ratio`` times its baseline, the
    geometric mean. An event: it is counted, and clipped where a clipper is set, but never halts.

    It is a warning in three cases: the norm is ten times its baseline and the loss jumps too (by 20 mean deviations, at
    least halfway back to its start), and they did not at the step before; the norm is a million times its baseline
    and ten times that of the first steps; or no loss is given. Otherwise it is INFO: the gradient of a healthy net may
    jump while its loss does not, and once a net has converged. If the batch is smaller than usual, both have to jump by
    more, as its noise does.

    In the first 25 steps there is no baseline yet, and a warning needs an outlier beyond doubt. Either the norm exceeds
    all norms so far 300 times, and the loss all losses so far 30 times. Or one of the first steps exceeds the four
    after it a thousand times in both, and its own update was too small to lower the loss that far. Healthy trainings
    stay below 6 and 4, and below 16.

    Args:
        z: Alarm level of the z-score, dimensionless. Default 6.
        ratio: Smallest multiple of the baseline, above 1. Default 3, so that a nearly deterministic run does not raise
            for a small change.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is out of range.
    """

    z: float = ALARM_Z
    ratio: float = 3.0
    fault: ClassVar[Fault] = Fault.SPIKE
    measures: ClassVar[tuple[str, ...]] = (
        "global norm over its baseline",
        "global norm over that of the other first steps",
    )
    event: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("z", self.z)
        check_above("ratio", self.ratio, 1.0)

    @property
    def fast_path_safe(self) -> bool:
        """True if twice the baseline is no spike."""
        return self.ratio >= _FAST_PATH_RATIO

    def init(self, stats: GradStats) -> Any:
        """Return a state without a step so far."""
        zero = torch.zeros_like(stats.total)
        return SpikeState(zero, zero, zero, zero, zero, zero, torch.full_like(zero, torch.nan), zero, zero)

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Evaluate one step."""
        trends, number = stats.trends, stats.layout.constant
        start, jump = trends.loss_start, trends.jump
        loss_is_high = stats.loss > torch.sub(start, start.abs(), alpha=0.5)
        # The noise of a gradient grows as the square root of the number of samples falls.
        rose = (trends.loss_jump > 20 * stats.noise) & (jump > 10 * stats.noise)
        # A batch that is an outlier comes without notice. If loss and norm had jumped at the step before, the training
        # itself left its valley, as a recurrent net that has converged may; the fast path accepts no such step.
        loss_jumps = rose & loss_is_high
        if not stats.passed:
            loss_jumps = loss_jumps & (state.rose == 0)
        state = state._replace(rose=rose.to(state.rose.dtype))
        # Before there is an early norm, surge is NaN, which counts as large.
        huge = (jump > number(1e6)) & ~(jump.log10() + trends.surge < number(1))
        no_loss = trends.loss != trends.loss
        ceiling = loss_jumps | huge | no_loss
        raised = is_norm_spike(stats, self.z, self.ratio)
        if not stats.is_first:
            return reading(stats, raised, jump, self.ratio, score=stats.relative, ceiling=ceiling), state
        rises, outlier, factor, state = self._compare_first(stats, state)
        early = rises | outlier
        found = reading(
            stats,
            raised | early,
            torch.where(early, factor, jump),
            torch.where(rises, _RISE, torch.where(outlier, _FALL, self.ratio)),
            score=stats.relative,
            ceiling=ceiling | early,
            measure=torch.where(early, 1.0, 0.0),
        )
        return found, state

    def _compare_first(
        self, stats: GradStats, state: SpikeState
    ) -> tuple[Tensor, Tensor, Tensor, SpikeState]:
        """Compare the first steps with each other.

        Returns:
            Whether this step is an outlier, whether an earlier one was, and by which factor; bool [], bool [], float32
            []. Last the new state.
        """
        before = stats.trends.before.steps
        is_first, loss = before < WARM_UP, stats.loss.abs()
        unknown = loss.isnan()
        rise = stats.total / state.norm
        loss_rises = torch.where(unknown, rise > _RISE**2, loss > _LOSS_RISE * state.highest)
        moved = torch.linalg.vector_norm(torch.nan_to_num(stats.updates, nan=0.0) * stats.weights)
        # A step that could change the loss by several times what it was explains what comes after it.
        is_own = state.norm * moved / state.loss >= _OWN
        rises = is_first & (before >= 1) & (state.norm > 0) & (rise > _RISE) & loss_rises & ~is_own
        largest = (stats.total >= state.norm) | ~is_first
        since = torch.where(largest, 0.0, state.since + 1)
        norm = torch.where(largest, stats.total, state.norm)
        height = torch.where(largest, loss, state.loss)
        norm_after = torch.where(largest, 0.0, torch.maximum(state.norm_after, stats.total))
        loss_after = torch.where(largest, 0.0, torch.maximum(state.loss_after, loss))
        reach = torch.where(since == 1, norm * moved / height, state.reach)
        told = torch.where(largest, rises.to(norm.dtype), state.told)
        fall = norm / norm_after
        # Steps without any gradient say nothing about what is usual.
        falls = (fall > _FALL) & (norm_after > 0) & (height > _FALL * loss_after) & (reach < _REACH)
        outlier = is_first & (since == _AFTER) & (before < _AFTER + 4) & falls & (told == 0)
        factor = torch.where(rises, rise, fall)
        highest = torch.maximum(state.highest, loss)
        after = SpikeState(norm, height, highest, norm_after, loss_after, since, reach, told, state.rose)
        if not stats.elapsed:  # such a step may be accepted without asking, unless it is an outlier
            after = SpikeState(*(torch.where(rises, a, b) for a, b in zip(after, state, strict=True)))
        return rises, outlier & (stats.elapsed > 0), factor, after


class ExplodingState(NamedTuple):
    """State of `Exploding`.

    Attributes:
        steps: float32 [], leaky count of steps with a spike of the norm.
        hot, hot_loss: float32 [], norm and loss of the step before if it was a spike, else 0.
        driven: float32 [], leaky count of steps that could change the loss by as much as it is.
        raised, over: Bool [], what tilt and loss showed at the last full evaluation: an explosion, or its end.
        value, limit, measure: float32 [], the reading of that evaluation.
        time_tilt: float32 [], the newest that was measured, decades.
    """

    steps: Tensor
    hot: Tensor
    hot_loss: Tensor
    driven: Tensor
    raised: Tensor
    over: Tensor
    value: Tensor
    limit: Tensor
    measure: Tensor
    time_tilt: Tensor


@dataclass(frozen=True)
class Exploding:
    """Detect gradients that grow without bound.

    They grow towards the input, towards the start of a sequence, or from step to step. Raised in one of five cases:

    - The depth tilt (decades by which gradients fall from the last layer to the first) is at or below ``tilt``, so that
      they grow towards the input. Counts from step 15 on, and only while the loss makes no progress.
    - The time tilt (decades by which gradients fall from the last to the first tenth of a sequence) is at or below
      ``time_tilt``, and the loss makes no progress: a recurrence enlarges them at each step. Measured as by `TimeTilt`.
    - The leaky count of spikes of the norm reaches ``hot_steps``: +1 for a step that `Spike` would raise, -1 for any
      other. A spike does not count if norm and loss are smaller than at the spike of the step before, and the mean
      loss is below half of its start: a task that changed at once, such as a target network that is copied now and
      then, is being learned.
    - The loss and its running mean exceed ``loss_ratio`` times the starting loss, and a layer's update is more than a
      tenth of its weight: harder data, or an adversary, raise a loss without that. Growth of the baseline norm by three
      decades counts as well as a large update. A loss that falls as far below zero counts too then, since it has no
      lower bound.
    - The loss had fallen by half, and now it and its running mean are a tenth above its start: worse than untrained.
      For at least four steps gradient times update was as large as the loss, so that the steps themselves may raise it;
      harder data, or an adversary, do not need that.

    Tilts and loss are evaluated at full evaluations only.

    Args:
        tilt: Depth tilt in decades (factors of ten), negative. Default -1.8: healthy runs without progress stay above
            -1.4, chaotic tanh networks lie below -2.1 until they recover.
        hot_steps: Leaky count of steps with a spike of the norm. Default 5.
        loss_ratio: Multiple of the starting loss, above 1. Default 3.
        time_tilt: Time tilt in decades, negative. Default -3: healthy recurrent nets stay above -0.6.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is out of range.
    """

    tilt: float = -1.8
    hot_steps: int = 5
    loss_ratio: float = 3.0
    time_tilt: float = -3.0
    fault: ClassVar[Fault] = Fault.EXPLODING
    measures: ClassVar[tuple[str, ...]] = (
        "depth tilt in decades (negative: growing towards the input)",
        "steps with a norm far above its baseline",
        "absolute running mean of the loss over its start",
        "decades from the last to the first steps of the sequence (negative: growing towards the start)",
        "running mean of the loss, which had fallen, over its start",
    )
    quantities: ClassVar[tuple[Quantity | None, ...]] = (
        Quantity.DEPTH_TILT,
        None,
        None,
        Quantity.TIME_TILT,
        None,
    )
    fast_path_safe: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("tilt", self.tilt, "negative and finite", lambda v: -math.inf < v < 0)
        check_number("time_tilt", self.time_tilt, "negative and finite", lambda v: -math.inf < v < 0)
        check_positive("hot_steps", self.hot_steps)
        check_above("loss_ratio", self.loss_ratio, 1.0)

    def init(self, stats: GradStats) -> Any:
        """Return a state without a spike so far."""
        zero, unknown = torch.zeros_like(stats.total), torch.full_like(stats.total, torch.nan)
        return ExplodingState(zero, zero, zero, zero, zero > 0, zero == 0, unknown, unknown, zero, unknown)

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Evaluate one step."""
        number = stats.layout.constant
        _, hot, hot_loss, driven, raised, over, value, limit, measure, time_tilt = state
        if stats.elapsed:
            time_tilt = torch.where(stats.time_tilt.isnan(), time_tilt, stats.time_tilt)
            change = torch.where(stats.trends.reach > number(1.0), number(1.0), number(-stats.elapsed / 16))
            driven = torch.clamp(driven + change, 0.0, 2.0 * _DRIVEN)
            raised, over, value, limit, measure = self._evaluate_tilts_and_loss(stats, time_tilt, driven)
        # Each step that the fast path accepted was no spike.
        steps = torch.clamp(state.steps - stats.passed, min=0.0) if stats.passed else state.steps
        hot = number(0.0) if stats.passed else hot
        spike, start = is_norm_spike(stats, ALARM_Z, 3.0), stats.trends.loss_start
        is_low = stats.trends.loss < torch.sub(start, start.abs(), alpha=0.5)
        settles = (stats.total < hot) & (stats.loss < hot_loss) & is_low
        change = torch.where(spike, torch.where(settles, number(0.0), number(1.0)), number(-1.0))
        hot = torch.where(spike, stats.total, number(0.0))
        hot_loss = torch.where(spike, stats.loss, number(0.0))
        count = torch.clamp(steps + change, 0.0, 2.0 * self.hot_steps)
        spiking = count >= number(self.hot_steps)
        # If the tilt raised, the profile says which layers; otherwise the largest gradients do.
        tilted = raised & (measure == number(0.0)) & ~spiking
        in_time = raised & (measure == number(3.0)) & ~spiking
        score = torch.where(tilted, profile_score(stats, worst_low=False), stats.relative)
        outside = (tilted & ~stats.trends.in_worst) | (in_time & ~stats.recurrent)
        found = reading(
            stats,
            raised | spiking,
            torch.where(spiking, count, value),
            torch.where(spiking, number(self.hot_steps), limit),
            score=torch.where(outside, number(-torch.inf), score),
            cleared=over & (count == number(0.0)),
            measure=torch.where(spiking, number(1.0), measure),
            near=~over & stats.trends.no_progress if stats.elapsed else None,
        )
        return found, ExplodingState(
            count, hot, hot_loss, driven, raised, over, value, limit, measure, time_tilt
        )

    def _evaluate_tilts_and_loss(
        self, stats: GradStats, time_tilt: Tensor, driven_steps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return raised, over, value, limit and measure, [] each."""
        trends, number = stats.trends, stats.layout.constant
        no_progress = trends.no_progress | trends.plateau
        tilted = (trends.tilt <= self.tilt) & no_progress & (trends.steps >= _TILT_FROM_STEP)
        start, has_grown = trends.loss_start, trends.surge > _DIVERGING_GROWTH
        ratio, is_positive = trends.loss / start, start > 0
        bottomless = (trends.loss < -self.loss_ratio * start.abs()) & has_grown
        # A weight that began small, such as the last layer of a critic, has to grow.
        ratios = torch.where(stats.weights > stats.layout.floors, stats.updates, updates_of_small(stats))
        large = (ratios > _LARGE_UPDATE) & stats.layout.is_layer
        driven = (large.any() & (trends.steps >= 4)) | has_grown
        risen = is_positive & (ratio > self.loss_ratio) & (stats.loss > self.loss_ratio * start)
        diverges = (risen & driven) | bottomless
        relapses = trends.fell_and_rose & (stats.loss > start) & (driven_steps >= _DRIVEN)
        in_time = (time_tilt <= self.time_tilt) & trends.no_progress & ~diverges & ~tilted & ~relapses
        raised = tilted | diverges | relapses | in_time
        near = (is_positive & (ratio > 0.8 * self.loss_ratio)) | (trends.tilt <= self.tilt + 0.5)
        near |= trends.fell_and_rose
        by_loss = diverges | relapses

        def choose(if_diverges: Tensor, if_relapses: Tensor, if_in_time: Tensor, otherwise: Tensor) -> Tensor:
            others = torch.where(relapses, if_relapses, torch.where(in_time, if_in_time, otherwise))
            return torch.where(diverges, if_diverges, others)

        return (
            raised,
            ~(raised | near),
            torch.where(by_loss, ratio.abs(), torch.where(in_time, time_tilt, trends.tilt)),
            choose(number(self.loss_ratio), number(1.1), number(self.time_tilt), number(self.tilt)),
            choose(number(2.0), number(4.0), number(3.0), number(0.0)),
        )
