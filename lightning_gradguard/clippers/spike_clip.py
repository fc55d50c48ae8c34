"""Ordinary steps of `SpikeClip`: where norms certainly lie in the next few, and what it learns from those at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import (
    Clip,
    check_decay,
    check_exclude,
    check_positive,
    check_steps,
    included_names,
    included_tensors,
    tensor_clip,
)
from lightning_gradguard.stats.grad_stats import GradStats

#: Sigma of log‖g‖ before there is evidence, and how many steps of evidence it counts for: a factor of 7 in all
#: tensors is a spike at step 1 then, while the first steps of healthy trainings pass.
PRIOR_SIGMA, PRIOR_STEPS = 0.4, 10

#: Smallest sigma of log‖g‖, so that a full-batch training may wiggle: less than a factor of 2.1 in all is no spike.
SIGMA_FLOOR = 0.15

#: Weight of the past in the variances, a memory of 33 steps: the spread changes more slowly than the level.
SPREAD_DECAY = 0.97

#: Sigmas to which an outlier's distance, and any change, is shortened before the averages learn it.
INFLUENCE = 2.5

#: Steps in a row, that with which they are compared included, for which bounds hold.
WINDOW = 8

#: Of the distance at which a step were an outlier: what is left of it after a window, with a margin.
_LEFT = 0.8
#: Steps that a level must rest on; of so many a window can take no more from a sigma than `_LEFT` allows for.
_SEEN = 16.0


class SpikeClipState(NamedTuple):
    """What is ordinary, float32: [P], but ``joint_var`` [].

    Attributes:
        seen: Ordinary steps that a tensor's level rests on; 0 before its first gradient.
        mean: Moving average of log‖g‖, the level.
        var: Moving variance of log‖g‖, half the mean square of its change from one ordinary step to the next.
        streak: Outliers since the last ordinary step.
        last: log‖g‖ of the last ordinary step.
        joint_var: Moving variance of the mean of log‖g‖ over the tensors, likewise.
    """

    seen: Tensor
    mean: Tensor
    var: Tensor
    streak: Tensor
    last: Tensor
    joint_var: Tensor


class Bounds(NamedTuple):
    """Where no norm is an outlier in the next `WINDOW` - 1 steps, if those of all steps until then lie there, float32.

    Attributes:
        low, high: [P], of each tensor's norm; 0 for one that has no gradient now, NaN where nothing is certain.
        weights: [P], share of each tensor in the mean of all, over how far that may be from its level.
        level: [], mean of log‖g‖ of the tensors that count, in the same unit.
    """

    low: Tensor
    high: Tensor
    weights: Tensor
    level: Tensor

    def compare(self, stats: GradStats) -> tuple[Tensor, Tensor]:
        """How a step lies to them, float32 [] each, NaN where nothing is certain.

        Args:
            stats: Of the step.

        Returns:
            How far the farthest tensor is outside, 0 if none is; and how far all of them are from their level, where 1
            is at the bound.
        """
        # The largest, since the square of a small one would be 0; NaN stays NaN.
        outside = torch.linalg.vector_norm(
            torch.clamp(stats.norms, self.low, self.high) - stats.norms, torch.inf
        )
        # Where a weight is 0, a norm of 0 does not matter.
        return outside, torch.xlogy(self.weights, stats.norms).sum() - self.level


def bounds_of(
    stats: GradStats, state: SpikeClipState, included: Tensor, thresholds: tuple[float, float], decay: float
) -> Bounds:
    """The bounds after a step.

    Steps within a part f of the distance at which they were outliers move a level over a window by no more than
    (1 - decay^(WINDOW-1)) f of it, since it learns from all of them at one rate, while sigma shrinks to 0.85 of itself
    at most; f = 0.8 / (1 + that) leaves a margin.

    Args:
        stats: The step.
        state: The state after it.
        included: Bool [P], tensors that are judged.
        thresholds: Sigmas at which a tensor, and all of them, are outliers.
        decay: Weight of the past in a level.
    """
    number, zeros = stats.layout.constant, stats.layout.zeros
    alone, joint = (number(threshold * _LEFT / (2 - decay ** (WINDOW - 1))) for threshold in thresholds)
    has_gradient = stats.norms > zeros
    counts = has_gradient & included
    is_known = state.seen >= number(max(_SEEN, 1 / (1 - decay)))
    away = torch.where(is_known, sigma_of(stats, state.var) * alone, number(torch.nan))
    reach = torch.maximum(counts.sum(), number(1.0)) * sigma_of(stats, state.joint_var) * joint
    weights = counts / reach
    # What is left out may do as it likes, if it goes on having a gradient.
    free = torch.where(has_gradient, number(torch.inf), zeros)
    return Bounds(
        low=torch.where(counts, (state.mean - away).exp(), zeros),
        high=torch.where(counts, (state.mean + away).exp(), free),
        weights=weights,
        level=(weights * state.mean).sum(),
    )


def fold_in(
    rows: Sequence[GradStats], state: SpikeClipState, included: Tensor, z_threshold: float, decay: float
) -> tuple[Tensor, SpikeClipState]:
    """What `SpikeClip.update` makes of steps within bounds, one after the other: no tensor spikes, nothing is new.

    Args:
        rows: The k steps, oldest first.
        state: The state before them.
        included: Bool [P], tensors that are judged.
        z_threshold: Sigmas at which a tensor spikes.
        decay: Weight of the past in a level.

    Returns:
        The threshold in each step, float32 [k], and the state after them.
    """
    number, norms = rows[0].layout.constant, torch.stack([row.norms for row in rows])
    counts = (norms[0] > number(0.0)) & included
    x = torch.where(counts, norms.log(), state.mean)
    change = (x - torch.cat([state.last.unsqueeze(0), x[:-1]])) * counts
    joint_change = change.sum(1, keepdim=True) / torch.maximum(counts.sum(), number(1.0))
    # In the last column all tensors together, whose variance is followed in the same way.
    changes = torch.cat([change, joint_change], 1) * number(math.sqrt(0.5))
    learns = torch.cat([counts, counts.any().unsqueeze(0)])
    seen = torch.cat([state.seen, (state.seen * counts).amax().unsqueeze(0)])
    gains = spread_gain(number, seen + torch.arange(len(rows), device=seen.device).unsqueeze(1)) * learns
    mean, var = state.mean, torch.cat([state.var, state.joint_var.unsqueeze(0)])
    means, sigmas = [], []
    for now, moved, gain in zip(x.unbind(), changes.unbind(), gains.unbind(), strict=True):
        sigma = sigma_of(rows[0], var)
        means.append(mean)
        sigmas.append(sigma)
        var = var.lerp(shorten(number, moved, sigma).square(), gain)
        mean = torch.addcmul(mean, number(1 - decay), now - mean)
    reach = number(z_threshold) * torch.stack(sigmas)[:, :-1]
    limits = torch.where(included, norms * (reach - (x - torch.stack(means))).exp(), norms)
    return torch.linalg.vector_norm(limits, dim=1), SpikeClipState(
        seen=state.seen + counts * len(rows),
        mean=mean,
        var=var[:-1],
        streak=state.streak * ~counts,
        last=torch.where(counts, x[-1], state.last),
        joint_var=var[-1],
    )


def sigma_of(stats: GradStats, var: Tensor) -> Tensor:
    """Sigma of log‖g‖, not below its floor."""
    return torch.maximum(var.sqrt(), stats.layout.constant(SIGMA_FLOOR))


def shorten(number: Callable[[float], Tensor], distance: Tensor, sigma: Tensor) -> Tensor:
    """A distance of `INFLUENCE` sigmas at most."""
    reach = number(INFLUENCE) * sigma
    return torch.clamp(distance, -reach, reach)


def spread_gain(number: Callable[[float], Tensor], seen: Tensor) -> Tensor:
    """How much of a variance one more step is; a prior worth so many steps comes first."""
    return torch.maximum((seen + number(PRIOR_STEPS)).reciprocal(), number(1 - SPREAD_DECAY))


@dataclass(frozen=True)
class SpikeClip:
    """Cuts spikes to what is typical: of a single tensor, or of all tensors where they rise together.

    With x = log‖g‖ of a tensor and its level, the mean of x over the last steps, the distance is d = x - mean. A
    tensor spikes where d > z_threshold · sigma; all of them do where the mean of d over the tensors exceeds
    joint_threshold times that mean's own sigma. A bad batch moves all tensors at once and their noise partly
    cancels, so that the mean shows it where no single tensor does. A spike is cut to exp(mean), the tensor's
    typical norm; what does not spike is not touched. Multiplying all gradients by a constant changes nothing.

    Sigma is that of the change from one step to the next, by the root of two, which no drift widens: in a good
    start norms fall by powers of ten, and the spikes that follow at the learning rate's peak must not hide in
    that. Outliers, in both directions, move the level by 2.5 sigmas at most and leave the sigmas alone, so that
    neither a spike nor an empty batch distorts them. A prior on sigma lets step 1 be judged already. Outliers
    on more steps in a row than the level was seen, or on more than ``patience``, are the new level: other data
    or batch size, no spike. Norms that are 0 or not finite leave no trace.

    Norms that grow by more than 8 % at each step are taken for a spike, for as long as ``patience`` says.

    Args:
        z_threshold: z-score at which the spike of a single tensor begins.
        joint_threshold: z-score at which the spike of all tensors begins. With both defaults fewer than one
            step in a hundred of a healthy training is clipped, see benchmarks/clipping.md.
        decay: Weight of the past in the level. Default 0.9, a memory of 10 steps.
        patience: Longest row of outliers that is still cut. Default 20: spikes last for a few steps, and a
            level that changed for good should not be clipped for longer.
        exclude: Names or patterns of tensors left alone.

    Raises:
        ValueError: If an argument is out of range.

    Source: z-scores of norms after ZClip (Kumar et al. 2025, arXiv:2504.02507); sigma of differences as in
    control charts of individual values (Shewhart's moving range); bounded influence after Huber 1964; how they
    were put together by experiment, see benchmarks/clipping.md, "What was tried".
    """

    z_threshold: float = 9.0
    joint_threshold: float = 5.0
    decay: float = 0.9
    patience: int = 20
    exclude: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        check_positive("z_threshold", self.z_threshold)
        check_positive("joint_threshold", self.joint_threshold)
        check_decay("decay", self.decay)
        check_steps("patience", self.patience)
        check_exclude(self.exclude)

    def init(self, stats: GradStats) -> Any:
        """No level yet, and the variances of the prior."""
        included_names(stats.layout.names, self.exclude)
        zero = torch.zeros_like(stats.norms)
        var = torch.full_like(zero, PRIOR_SIGMA**2)
        joint = torch.full_like(stats.total, PRIOR_SIGMA**2)
        return SpikeClipState(zero, zero.clone(), var, zero.clone(), zero.clone(), joint)

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Compares each norm with the tensor's own past, and all of them with theirs."""
        number, zeros = stats.layout.constant, stats.layout.zeros
        included = included_tensors(stats, self.exclude)
        counts = stats.finite & included & (stats.norms > zeros)
        fresh = state.seen == zeros
        known = counts & ~fresh
        # A norm that does not count, or has no past, is taken for the typical one.
        x = torch.where(counts, stats.log_norms, state.mean)
        distance = (x - state.mean) * known
        among = torch.maximum(known.sum(), number(1.0))
        sigma, joint_sigma = sigma_of(stats, state.var), sigma_of(stats, state.joint_var)
        reach, joint_reach = number(self.z_threshold) * sigma, number(self.joint_threshold) * joint_sigma
        # No single tensor can make a spike of all.
        joint = torch.clamp(distance, -reach, reach).sum() / among
        outlier = ((distance.abs() > reach) | (joint.abs() > joint_reach)) & known
        streak = state.streak + number(1.0)
        fresh = fresh | (outlier & (streak > torch.minimum(state.seen, number(self.patience))))

        # Relative to the norm itself, so that no rounding in log or exp puts the limit of an ordinary norm below it.
        spike = (distance > reach) | (joint > joint_reach)
        excess = reach * ~spike - distance
        norms = torch.where(counts, stats.norms, state.mean.exp())
        limits = torch.where(fresh, number(math.inf), norms * excess.exp())

        usual = known & ~outlier
        change = (x - state.last) * usual
        new = self._learn(number, state, x, distance, change, sigma, usual, fresh & counts, counts)
        steps, joint_change = (state.seen * known).amax(), change.sum() / among
        joint_var = _spread(number, state.joint_var, joint_change, joint_sigma, steps, usual.any())
        return tensor_clip(stats, included, limits), SpikeClipState(*new, joint_var)

    def bounds(self, stats: GradStats, state: Any) -> Bounds:
        """Within which the next steps are certainly ordinary, so that they need not be judged one by one.

        Args:
            stats: The newest step.
            state: The state after it.
        """
        both = self.z_threshold, self.joint_threshold
        return bounds_of(stats, state, included_tensors(stats, self.exclude), both, self.decay)

    def fold_in(self, rows: Sequence[GradStats], state: Any) -> tuple[Tensor, Any]:
        """The threshold in each of some steps that lay within `bounds`, float32 [k], and the state after them.

        Args:
            rows: The k steps, oldest first.
            state: The state before them.
        """
        included = included_tensors(rows[0], self.exclude)
        return fold_in(rows, state, included, self.z_threshold, self.decay)

    def _learn(
        self,
        number: Callable[[float], Tensor],
        state: SpikeClipState,
        x: Tensor,
        distance: Tensor,
        change: Tensor,
        sigma: Tensor,
        usual: Tensor,
        fresh: Tensor,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors' part of the state after this step; a ``fresh`` level starts from it alone."""
        learnt = torch.where(usual, distance, shorten(number, distance, sigma))
        gain = torch.maximum((state.seen + number(1.0)).reciprocal(), number(1 - self.decay))
        var = _spread(number, state.var, change, sigma, state.seen, usual)
        ordinary = fresh | usual
        return (
            state.seen * ~fresh + ordinary,
            torch.where(fresh, x, torch.addcmul(state.mean, gain, learnt)),
            torch.where(fresh, number(PRIOR_SIGMA**2), var),
            (state.streak + counts) * ~ordinary,
            torch.where(ordinary, x, state.last),
        )


def _spread(
    number: Callable[[float], Tensor],
    var: Tensor,
    change: Tensor,
    sigma: Tensor,
    seen: Tensor,
    counts: Tensor,
) -> Tensor:
    """The variance after one more change between two steps, whose own sigma is larger by the root of two."""
    square = shorten(number, change * number(math.sqrt(0.5)), sigma).square()
    return var.lerp(square, spread_gain(number, seen) * counts)
