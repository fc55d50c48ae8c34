"""`SpikeClip`: cuts what is out of the ordinary for the tensors, with no threshold to choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.signals.clipping import (
    Clip,
    check_decay,
    check_exclude,
    check_positive,
    check_steps,
    included_names,
    included_tensors,
    tensor_clip,
)
from lightning_gradguard.signals.ordinary import (
    PRIOR_SIGMA,
    Bounds,
    SpikeClipState,
    bounds_of,
    learn,
    shorten,
    sigma_of,
    spread_gain,
)
from lightning_gradguard.signals.stats import GradStats


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

    def learn(self, rows: Sequence[GradStats], state: Any) -> tuple[Tensor, Any]:
        """The threshold in each of some steps that lay within `bounds`, float32 [k], and the state after them.

        Args:
            rows: The k steps, oldest first.
            state: The state before them.
        """
        included = included_tensors(rows[0], self.exclude)
        return learn(rows, state, included, self.z_threshold, self.decay)

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
