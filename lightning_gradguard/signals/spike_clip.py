"""`SpikeClip`: cuts what is out of the ordinary for a tensor, with no threshold to choose."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
from lightning_gradguard.signals.stats import GradStats

#: Sigma of log‖g‖ before there is evidence, and how many steps of evidence it counts for: a factor of 5 is a
#: spike at step 1 then, while the first steps of healthy trainings pass.
PRIOR_SIGMA, PRIOR_STEPS = 0.4, 10

#: Smallest sigma of log‖g‖, so that a full-batch training may wiggle: less than a factor of 1.8 is no spike.
SIGMA_FLOOR = 0.15


class SpikeClipState(NamedTuple):
    """What is ordinary for each tensor, float32 [P] each.

    Attributes:
        seen: Ordinary steps that the level rests on; 0 before the first gradient.
        mean: Moving average of log‖g‖, the level.
        var: Moving variance of log‖g‖.
        streak: Outliers since the last ordinary step.
    """

    seen: Tensor
    mean: Tensor
    var: Tensor
    streak: Tensor


@dataclass(frozen=True)
class SpikeClip:
    """Cuts spikes of each tensor's norm: the bigger the spike, the closer to the tensor's typical norm.

    With x = log‖g‖, mean and sigma of x over the steps before, and z = (x - mean) / sigma, the limit is
    exp(mean + z_threshold · sigma). Where z exceeds z_threshold it is exp(mean + z_threshold² / z · sigma),
    which falls from there to exp(mean), the typical norm. Multiplying all gradients by a constant changes
    nothing.

    The averages get the clipped value, and unusually small norms count in the same way, so that neither a
    spike nor an empty batch distorts them. At first they are plain averages with a prior on sigma, so that
    step 1 is judged already. Outliers on more steps in a row than the level was seen, or on more than
    ``patience``, are the new level: other data or batch size, no spike. Norms that are 0 or not finite leave
    no trace.

    Args:
        z_threshold: z-score at which a spike begins. Default 4: clips 0.1 % of the steps of 70 healthy small
            trainings, 3 would clip 0.9 %, and at 5 more of the spikes below x10 pass.
        decay: Weight of the past in the averages. Default 0.97, a memory of 33 steps: at 0.9 healthy
            trainings are clipped twice as often; at 0.99 the fall of the norm in a good start passes for
            spread, and hides spikes.
        patience: Longest row of outliers that is still cut. Default 20: spikes last for a few steps, and a
            level that changed for good should not be clipped for longer.
        exclude: Names or patterns of tensors left alone.

    Raises:
        ValueError: If an argument is out of range.

    Source: the reciprocal limit is ZClip's (Kumar et al. 2025, arXiv:2504.02507); per tensor and in the log
    domain here.
    """

    z_threshold: float = 4.0
    decay: float = 0.97
    patience: int = 20
    exclude: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        check_positive("z_threshold", self.z_threshold)
        check_decay("decay", self.decay)
        check_steps("patience", self.patience)
        check_exclude(self.exclude)

    def init(self, stats: GradStats) -> Any:
        """No level yet, and the variance of the prior."""
        included_names(stats.layout.names, self.exclude)
        zero = torch.zeros_like(stats.norms)
        var = torch.full_like(zero, PRIOR_SIGMA**2)
        return SpikeClipState(seen=zero, mean=zero.clone(), var=var, streak=zero.clone())

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Compares each norm with the tensor's own past."""
        included = included_tensors(stats, self.exclude)
        counts = stats.finite & included & (stats.norms > 0)
        # A norm that does not count is taken for the typical one.
        norms = torch.where(counts, stats.norms, state.mean.exp())
        x = torch.where(counts, norms.log(), state.mean)
        reach = self.z_threshold * state.var.sqrt().clamp(min=SIGMA_FLOOR)
        distance = x - state.mean
        outlier = distance.abs() > reach
        streak = torch.where(outlier, state.streak + 1, 0.0)
        fresh = (state.seen == 0) | (streak > state.seen.clamp(max=self.patience))

        # z_threshold²/z · sigma is reach²/distance. Taken relative to the norm itself, so that no rounding in
        # log or exp puts the limit of an ordinary norm below it.
        excess = reach.square() / torch.maximum(distance, reach) - distance
        limits = torch.where(fresh, math.inf, norms * excess.exp())

        influence = torch.where(outlier, reach.square() / distance, distance)
        new = self._learn(state, influence, x, fresh, torch.where(fresh, 0.0, streak))
        kept = SpikeClipState(*(torch.where(counts, a, b) for a, b in zip(new, state, strict=True)))
        return tensor_clip(stats, included, limits), kept

    def _learn(
        self, state: SpikeClipState, influence: Tensor, x: Tensor, fresh: Tensor, streak: Tensor
    ) -> SpikeClipState:
        """The state after a step that counts; a ``fresh`` level starts from this step alone."""
        gain = (1 / (state.seen + 1)).clamp(min=1 - self.decay)
        mean = state.mean + gain * influence
        # A prior worth so many steps: the gain that would be right after them.
        evidence = (1 / (state.seen + PRIOR_STEPS)).clamp(min=1 - self.decay)
        var = state.var + evidence * (influence.square() * (1 - gain) - state.var)
        return SpikeClipState(
            seen=torch.where(fresh, 0.0, state.seen) + (streak == 0),
            mean=torch.where(fresh, x, mean),
            var=torch.where(fresh, PRIOR_SIGMA**2, var),
            streak=streak,
        )
