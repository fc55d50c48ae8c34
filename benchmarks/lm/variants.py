"""Variants of `SpikeClip`: one class with a switch for each design question."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import Clip, tensor_clip
from lightning_gradguard.stats.grad_stats import GradStats

PRIOR_SIGMA, PRIOR_STEPS, PATIENCE, SPREAD_DECAY = 0.4, 10, 20, 0.97


class VariantState(NamedTuple):
    """State like `SpikeClipState`; ``last`` holds the last step, ordinary or not."""

    seen: Tensor
    mean: Tensor
    var: Tensor
    streak: Tensor
    last: Tensor
    joint_var: Tensor


@dataclass(frozen=True)
class Variant:
    """Per-tensor clipper on log norms.

    Args:
        z_threshold: z-score of a tensor's norm above which it counts as a spike.
        joint: z-score of the mean distance of all tensors above which all spike together; inf turns the rule off.
        response: Target of the cut: "reciprocal" uses ZClip's rule, "typical" cuts to the mean, "redescending" cuts
            as far below the mean as the norm lies above the threshold.
        influence: Number of sigmas that a distance is limited to before it updates the statistics; None for ZClip's
            rule.
        level_decay: Weight of the past in the level.
        differences: If True, sigma is that of the change between steps, and the influence of one tensor on the mean
            is bounded.
    """

    z_threshold: float = 5.0
    joint: float = 3.5
    response: str = "typical"
    influence: float | None = 2.5
    level_decay: float = 0.97
    differences: bool = False

    def init(self, stats: GradStats) -> Any:
        zero = torch.zeros_like(stats.norms)
        var = torch.full_like(zero, PRIOR_SIGMA**2)
        return VariantState(zero, zero.clone(), var, zero.clone(), zero.clone(), var.mean())

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        counts = stats.finite & (stats.norms > 0)
        x = torch.where(counts, stats.norms.log(), state.mean)
        known = counts & (state.seen > 0)
        floor = 0.15 if self.differences else 0.1
        sigma, joint_sigma = (var.sqrt().clamp(min=floor) for var in (state.var, state.joint_var))
        distance, change = (torch.where(known, x - old, 0.0) for old in (state.mean, state.last))
        reach, joint_reach = self.z_threshold * sigma, self.joint * joint_sigma
        bound = reach if self.differences else torch.full_like(reach, math.inf)
        count = known.sum().clamp(min=1)
        together = torch.clamp(distance, -bound, bound).sum() / count
        outlier = known & ((distance.abs() > reach) | (together.abs() > joint_reach))
        streak = torch.where(outlier, state.streak + 1, 0.0)
        fresh = (state.seen == 0) | (streak > state.seen.clamp(max=PATIENCE))
        beyond = torch.maximum(
            distance - reach, torch.where(together > joint_reach, together - joint_reach, 0.0)
        )
        cut = {
            "reciprocal": torch.minimum(reach.square() / distance.clamp(min=1e-6), distance),
            "typical": torch.zeros_like(x),
            "redescending": -beyond.clamp(min=0),
        }[self.response]
        spike = (distance > reach) | (together > joint_reach)
        excess = torch.where(spike, cut, reach) - distance
        limits = torch.where(
            fresh, math.inf, torch.where(counts, stats.norms, state.mean.exp()) * excess.exp()
        )
        clip = tensor_clip(stats, stats.present, limits)

        if self.influence is None:
            moved, joint = torch.where(distance.abs() > reach, reach.square() / distance, distance), together
        else:
            moved, joint = self._shorten(distance, sigma), self._shorten(together, joint_sigma)
        gain = (1 / (state.seen + 1)).clamp(min=1 - self.level_decay)
        square, joint_square = moved.square() * (1 - gain), joint.square()
        if self.differences:
            square = self._shorten(change / math.sqrt(2), sigma).square()
            joint_square = self._shorten(change.sum() / count / math.sqrt(2), joint_sigma).square()
        weight = (1 / (state.seen + PRIOR_STEPS)).clamp(min=1 - SPREAD_DECAY)
        new = (
            torch.where(fresh, 1.0, state.seen + ~outlier),
            torch.where(fresh, x, state.mean + gain * moved),
            torch.where(fresh, PRIOR_SIGMA**2, state.var + weight * (square - state.var)),
            torch.where(fresh, 0.0, streak),
            x,
        )
        joint_var = state.joint_var + torch.where(known, weight, 1.0).min() * (joint_square - state.joint_var)
        kept = [torch.where(counts, a, b) for a, b in zip(new, state[:5], strict=True)]
        return clip, VariantState(*kept, torch.where(known.any(), joint_var, state.joint_var))

    def _shorten(self, distance: Tensor, sigma: Tensor) -> Tensor:
        bound = (self.influence or math.inf) * sigma
        return torch.clamp(distance, -bound, bound)
