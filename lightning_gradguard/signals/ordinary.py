"""Ordinary steps of `SpikeClip`: where norms certainly lie in the next few, and what it learns from those at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.signals.stats import GradStats

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


def learn(
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
