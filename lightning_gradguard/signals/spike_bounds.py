"""Where norms are certainly ordinary for `SpikeClip`, for a few steps, so that it need not judge each of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.signals.stats import GradStats

#: Steps in a row, that with which they are compared included, for which bounds hold.
WINDOW = 8
#: Of the distance at which a step were an outlier: what is left of it after a window, with a margin.
_LEFT = 0.8
#: Steps that a level must rest on; of so many a window can take no more from a sigma than `_LEFT` allows for.
_SEEN = 16.0


class Learnt(NamedTuple):
    """What is ordinary for each tensor, float32 [P]: steps it rests on, level of log‖g‖, distance of an outlier."""

    seen: Tensor
    level: Tensor
    reach: Tensor


class Bounds(NamedTuple):
    """Where no norm is an outlier in the next `WINDOW` - 1 steps, if those of all steps until then lie there, float32.

    Attributes:
        low, high: [P], of each tensor's norm; 0 for one that has no gradient now, NaN where nothing is certain.
        weights: [P], share of each tensor in the mean of all.
        level, reach: [], mean of log‖g‖ of the tensors that count, and how far it may be from there.
    """

    low: Tensor
    high: Tensor
    weights: Tensor
    level: Tensor
    reach: Tensor

    def hold(self, stats: GradStats) -> Tensor:
        """Whether a step lies within them, bool [].

        Args:
            stats: Of the step.
        """
        inside = (torch.clamp(stats.norms, self.low, self.high) == stats.norms).all()
        # Where a weight is 0, a norm of 0 does not matter.
        distance = torch.xlogy(self.weights, stats.norms).sum() - self.level
        return inside & (distance.abs() <= self.reach)


def bounds_of(stats: GradStats, included: Tensor, learnt: Learnt, reach: Tensor, decay: float) -> Bounds:
    """The bounds after a step.

    Steps within a part f of the distance at which they were outliers move a level over a window by no more than
    (1 - decay^(WINDOW-1)) f of it, since it learns from all of them at one rate, while sigma shrinks to 0.85 of itself
    at most; f = 0.8 / (1 + that) leaves a margin.

    Args:
        stats: The step.
        included: Bool [P], tensors that are judged.
        learnt: What is ordinary for each tensor after it.
        reach: float32 [], how far the mean of log‖g‖ over the tensors may be from its level, else all are outliers.
        decay: Weight of the past in a level.
    """
    number, zeros = stats.layout.constant, stats.layout.zeros
    part = number(_LEFT / (2 - decay ** (WINDOW - 1)))
    has_gradient = stats.norms > zeros
    counts = has_gradient & included
    is_known = learnt.seen >= number(max(_SEEN, 1 / (1 - decay)))
    away = torch.where(is_known, learnt.reach * part, number(torch.nan))
    weights = counts / torch.maximum(counts.sum(), number(1.0))
    # What is left out may do as it likes, if it goes on having a gradient.
    free = torch.where(has_gradient, number(torch.inf), zeros)
    return Bounds(
        low=torch.where(counts, (learnt.level - away).exp(), zeros),
        high=torch.where(counts, (learnt.level + away).exp(), free),
        weights=weights,
        level=(weights * learnt.level).sum(),
        reach=reach * part,
    )
