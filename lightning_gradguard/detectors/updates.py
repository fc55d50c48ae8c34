"""Detectors of updates that are too large or small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.detectors.base import Reading, reading, updates_of_small
from lightning_gradguard.results import Fault
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.trends import WARM_UP
from lightning_gradguard.validation import check_positive

#: Steps without progress after which large updates count as harmful; fewer than `DeadUnits` needs, whose fault often
#: follows from them.
_WAIT = 17
#: Steps for which large updates are remembered: the weights that they made do not recover.
_MEMORY = 4 * WARM_UP
#: Loss over that of the best constant guess, above which little more was learnt than a guess; and the part of a step
#: without progress that such a step counts for. A healthy LSTM under SGD at 5 is above it for 8 steps.
_GUESSING, _GUESSING_STEP = 0.9, 1 / 3
#: Update ratio up to which a layer has stopped, whatever its earlier updates were.
_MOVING = 1e-6
#: Multiple of the limit for a layer with a normalization right behind it, and under the loss of a policy gradient.
_TURN = 3.0
#: Longest healthy stretch of low learning rates, over the training before it at the peak rate. Cosine and linear
#: schedules rest for a fifth or less; halving the rate every tenth of a training, for 3.
_LONGEST_REST = 2.0
#: The same for a loss that has made progress and stands still.
_PLATEAU_REST = 8.0
#: Steps with one and the same rate before it is raised which a warm-up by steps does not have, and the multiple of the
#: smallest update that counts then.
_STAIR, _STAIRS = 16, 20.0
#: Share of elements that change below which a model that is no better than a constant guess loses most updates to
#: rounding.
_FEW = 0.2
#: Leaky count of steps in which every gradient is exactly zero, and what other steps take off it.
_EMPTY, _EMPTY_LEAK = 4.0, 0.1
#: Relative deviation up to which two norms are the same. Clipping leaves 1e-6.
_SAME = 1e-4


class LargeUpdates(NamedTuple):
    """State of `UpdateRatio`.

    Attributes:
        large: float32 [P], steps in a row with a large update.
        since: float32 [P], steps since there were enough of them.
        idle: float32 [P], steps without progress since then.
        solid: Bool [P], whether the weight was more than a tenth of a common initialization at the start.
        largest: float32 [P], largest update that is remembered; 0 without.
    """

    large: Tensor
    since: Tensor
    idle: Tensor
    solid: Tensor
    largest: Tensor


@dataclass(frozen=True)
class UpdateRatio:
    """Detect updates too large for their weight.

    ratio = ‖Δw‖ / ‖w‖, from a strided sample taken before and after the step, in the first eight steps and then in
    every eighth to 64th, as full evaluations come.

    Raised when a layer exceeds ``limit`` in all samples of ``steps`` steps, and the loss, if given, has since made no
    progress in 17 more steps than it has, or, where that is known, has not beaten a constant guess in 51: the first
    steps may be large, and with normalization behind a layer even many. Large updates are remembered for 100 steps,
    since the weights that they made do not recover. A layer that has stopped moving is not raised. Of the steps between
    two full evaluations at most eight count.

    A weight that began below a tenth of a common initialization, such as the last layer of a policy, is not judged in
    the first 50 steps, and counts as large as that initialization afterwards: it has to grow.

    While the loss falls, no step counts as one without progress. A layer with a normalization right behind it is raised
    only above three times ``limit``, and only while its updates are large: its direction alone matters, which recovers,
    and under weight decay its size settles where an update turns it by √(2 · learning rate · decay). The same holds for
    all layers under the loss of a policy gradient, which rises and falls with the rewards.

    Args:
        limit: Largest healthy ratio, dimensionless. Default 0.1; 1e-3 is typical.
        steps: Steps for which the ratio has to exceed it.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is not positive and finite.

    Source: CS231n notes, "ratio of weights:updates".
    """

    limit: float = 0.1
    steps: int = 4
    fault: ClassVar[Fault] = Fault.OVERSIZED_UPDATE
    measures: ClassVar[tuple[str, ...]] = ("largest applied update over weight",)
    slow: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)
        check_positive("steps", self.steps)

    def init(self, stats: GradStats) -> Any:
        """Return a state without a large update."""
        zeros = torch.zeros_like(stats.norms)
        solid = stats.weights > stats.layout.floors
        return LargeUpdates(zeros, torch.full_like(zeros, torch.inf), zeros, solid, zeros)

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Evaluate one step."""
        trends = stats.trends
        has_size = state.solid | (trends.steps > 2 * WARM_UP)
        lenient = stats.normalised | stats.surrogate
        limits = torch.where(lenient, _TURN * self.limit, self.limit)
        ratios = torch.where(state.solid, stats.updates, updates_of_small(stats))
        large = (ratios > limits) & stats.layout.is_layer & has_size
        count = torch.where(large, state.large + float(stats.sampled_steps), 0.0)
        # One step that replaces nearly the whole weight is enough, except at the start.
        replaced = large & (ratios > 0.9) & (trends.steps > 2 * WARM_UP)
        since = torch.where((count >= self.steps) | replaced, 0.0, state.since + stats.elapsed)
        no_loss = trends.loss.isnan()
        # This loss has to be high too: the running mean may still hold what the first steps did.
        is_high = stats.loss > 0.9 * torch.minimum(trends.loss_start, trends.first_loss)
        is_idle = (trends.no_progress & is_high & ~trends.falling) | trends.relapsed
        # Whatever the loss has lost since the start, a model that does not beat a constant guess has learnt nothing. It
        # counts for less, since healthy language models learn the frequencies of the words first.
        guessing = torch.where(stats.excess > _GUESSING, _GUESSING_STEP, -1.0)
        idle = state.idle + torch.where(is_idle, 1.0, guessing) * stats.elapsed
        recovers = lenient & (count < self.steps)
        remembered = ((since <= _MEMORY) | (state.idle > _WAIT)) & ~recovers
        idle = torch.where(remembered, torch.clamp(idle, 0.0, 2.0 * _WAIT), 0.0)
        moving = remembered & ~(stats.updates <= _MOVING)
        found = moving & ((idle > _WAIT) | no_loss)
        over = ~(moving & ((idle > 0) | no_loss)).any()
        # The newest update may be small again, so the value is the largest that is remembered.
        largest = torch.maximum(state.largest, torch.where(large, ratios, 0.0))
        largest = torch.where(remembered, largest, 0.0)
        score = torch.where(remembered, largest, -torch.inf)
        near = moving.any()
        result = reading(stats, found.any(), largest.max(), self.limit, score=score, cleared=over, near=near)
        return result, LargeUpdates(count, since, idle, state.solid, largest)


class StillSteps(NamedTuple):
    """State of `Stalled`, float32 [] each.

    Attributes:
        steps: Steps without movement.
        rounded: Steps whose updates were lost to rounding.
        few: Steps of which most updates were lost.
        empty: Leaky count of steps in which every gradient is exactly zero.
        scaled: Steps with one and the same scaled norm.
        norm: That norm; NaN at first.
    """

    steps: Tensor
    rounded: Tensor
    few: Tensor
    empty: Tensor
    scaled: Tensor
    norm: Tensor


@dataclass(frozen=True)
class Stalled:
    """Detect weights that do not change.

    Raised while the loss makes no progress, from step 30 on, when for ``steps`` steps one of these holds:

    - The median update ratio ‖Δw‖/‖w‖ of the layers is below ``limit``, and no layer's above 100 times ``limit``.
      Suspended while the learning rate is below a tenth of its peak, unless it has been for twice as long as the
      training before: a schedule ends with low rates, and no schedule begins with them. After eight times as long, a
      loss that stands still above half of its start is enough. A rate that is raised in stairs of 16 steps or more is
      that of a warm-up which is advanced once an epoch: then 20 times ``limit`` count.
    - Fewer than ``changed`` of the elements change at a step, in the median layer, and the rate is not low. This is
      for weights in half precision, which lose an update of less than half the distance to the next number, while the
      few elements that move make the ratio look healthy. Elements without a gradient do not count. While the loss is
      no better than that of a constant guess, and the rate has been the same for long, a fifth is too few.
    - With a gradient scaler, the norm times the scale is one and the same short decimal number, such as 1.0, and the
      norm is none: gradients were clipped to it before they were unscaled.

    Also raised when every gradient is exactly zero in one of ten steps, for a leaky count of four, while the loss is
    above half of its start and does not fall: of a loss that is not near zero no batch has nothing to teach, unless the
    output is saturated.

    A depth tilt or dead units explain it better and take precedence.

    Args:
        limit: Smallest update ratio that changes a weight, dimensionless.
        steps: Steps for which the condition has to hold. Default 24, three samples: the gradient of a converged net is
            large in one batch and nothing in the next.
        changed: Smallest healthy share of elements that change, in the median layer.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is not positive and finite.
    """

    limit: float = 1e-6
    steps: int = 24
    changed: float = 0.08
    fault: ClassVar[Fault] = Fault.STALLED
    measures: ClassVar[tuple[str, ...]] = (
        "median applied update over weight",
        "median share of elements that a step changes",
        "steps in a row with one and the same gradient norm before it is unscaled",
        "steps in which every gradient is exactly zero",
    )
    slow: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)
        check_positive("steps", self.steps)
        check_positive("changed", self.changed)

    def init(self, stats: GradStats) -> Any:
        """Return a state without a step so far."""
        zero = torch.zeros_like(stats.total)
        return StillSteps(zero, zero, zero, zero, zero, torch.full_like(zero, torch.nan))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Evaluate one step."""
        trends, number = stats.trends, stats.layout.constant
        live_layers = stats.layout.is_layer & trends.live
        may_rest = 0 < stats.rest <= _LONGEST_REST
        ratios = torch.where(live_layers, stats.updates, number(torch.nan))
        median = torch.nanmedian(ratios, 0).values
        fastest = torch.nan_to_num(ratios, nan=0.0).max()
        slowest = (_STAIRS if stats.stair >= _STAIR else 1.0) * self.limit
        is_still = (median < slowest) & (fastest < 100 * slowest)
        held = torch.where(is_still, state.steps + stats.elapsed, number(0.0))
        counts = held > 0
        stands = trends.plateau if stats.rest > _PLATEAU_REST else trends.no_progress
        stalled = (held >= self.steps) & (trends.no_progress | stands) & (not may_rest)
        # Of several, what comes later says more.
        raised, value, limit, measure = stalled, median, number(slowest), number(0.0)
        score = torch.where(live_layers, -stats.updates, number(-torch.inf))
        # Not the global norm: the squares of tiny norms are zero in float32.
        # A batch with a loss of nothing, such as one whose labels are all ignored, has nothing to teach.
        is_empty = stats.present.any() & (stats.norms == 0).all() & (stats.loss > 0.5 * trends.loss)
        empty = torch.clamp(
            state.empty + torch.where(is_empty, number(1.0), number(-_EMPTY_LEAK)), 0.0, 2.0 * _EMPTY
        )
        start = torch.minimum(trends.loss_start, trends.first_loss)
        vacant = (empty >= _EMPTY) & (start > 0) & (trends.loss > 0.5 * start) & ~trends.falling
        none = number(0.0)
        before, state = state, StillSteps(held, none, none, empty, none, number(torch.nan))
        found = [(vacant & ~stalled, empty, number(_EMPTY), 3.0)]
        if stats.changed is not stats.layout.unknowns:  # weights in half precision
            lost, share, fewest, state = self._find_rounding(
                stats, before, state, live_layers, may_rest=may_rest
            )
            found.append((lost, share, fewest, 1.0))
            rank = torch.where(live_layers, -torch.nan_to_num(stats.changed, nan=1.0), number(-torch.inf))
            score = torch.where(lost, rank, score)
            counts = counts | (state.rounded > 0)
        if stats.loss_scale is not number(torch.nan):  # a gradient scaler
            shrunk, state = self._find_clipping(stats, before, state)
            found.append((shrunk, state.scaled, number(self.steps), 2.0))
            score = torch.where(shrunk, torch.where(live_layers, -stats.updates, number(-torch.inf)), score)
            counts = counts | (state.scaled > 0)
        for is_found, its_value, its_limit, its_measure in found:
            raised = raised | is_found
            value = torch.where(is_found, its_value, value)
            limit = torch.where(is_found, its_limit, limit)
            measure = torch.where(is_found, number(its_measure), measure)
        near = ((counts & trends.no_progress) | (empty > 1)) & (not may_rest)
        raised = raised & (trends.steps >= WARM_UP + 5)
        return reading(stats, raised, value, limit, score=score, measure=measure, near=near), state

    def _find_rounding(
        self, stats: GradStats, before: StillSteps, after: StillSteps, live_layers: Tensor, *, may_rest: bool
    ) -> tuple[Tensor, Tensor, Tensor, StillSteps]:
        """Return whether updates are lost to rounding, the share that is not, its limit, and the new state."""
        trends, number = stats.trends, stats.layout.constant
        shares = torch.where(live_layers, stats.changed, number(torch.nan))
        share = torch.nanmedian(shares, 0).values
        is_known = 2 * (~shares.isnan()).sum() > live_layers.sum()
        few = torch.where((share < _FEW) & is_known, before.few + stats.elapsed, number(0.0))
        is_rounded = (share < self.changed) & is_known
        rounded = torch.where(is_rounded, before.rounded + stats.elapsed, number(0.0))
        lost = (rounded >= self.steps) & trends.no_progress & (not may_rest)
        # A rate that has not changed for long is no warm-up.
        guesses = (few >= 2 * self.steps) & (stats.excess > _GUESSING) & (stats.steady >= 2 * self.steps)
        fewest = torch.where(guesses, number(_FEW), number(self.changed))
        return lost | guesses, share, fewest, after._replace(few=few, rounded=rounded)

    def _find_clipping(
        self, stats: GradStats, before: StillSteps, after: StillSteps
    ) -> tuple[Tensor, StillSteps]:
        """Return whether gradients were clipped before they were unscaled, and the new state."""
        norm = stats.total * stats.loss_scale
        is_same = ((norm - before.norm).abs() <= _SAME * norm) & _is_short(norm) & ~_is_short(stats.total)
        scaled = torch.where(is_same, before.scaled + stats.elapsed, stats.layout.constant(0.0))
        after = after._replace(scaled=scaled, norm=torch.where(is_same, before.norm, norm))
        return (scaled >= self.steps) & stats.trends.no_progress, after


def _is_short(norm: Tensor) -> Tensor:
    """Test for a decimal number of two digits, bool []."""
    digits = norm / 10.0 ** (torch.floor(norm.log10()) - 1)
    return (digits - digits.round()).abs() <= _SAME * digits
