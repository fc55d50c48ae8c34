"""`SteadyClip`, the recommended clipper."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import (
    Clip,
    among,
    check_exclude,
    global_norm,
    included_names,
    included_tensors,
    tensor_clip,
)
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.validation import check_flag

#: Part of the first norm at which the level of a tensor begins, with an adaptive optimizer.
SOFT_START = 0.03
#: Part of the distance to the newest norm that a level moves, in log‖g‖.
GAIN = 0.2
#: Largest rise of log level in a step, with an adaptive optimizer and with another one, and its largest fall.
ADAPTIVE_RISE, RISE, FALL = 0.02, 0.05, 0.05
#: Early moves are bounded by this over the number of steps: the first norm may be anything, and norms may fall by
#: powers of ten in the first steps.
EARLY = 2.0
#: Distance, in log‖g‖, from which a norm lies far below the level: a hundredth of it. Up to so many such steps in a row
#: are taken for batches without a signal, but for the first steps. Else the level would sink to nothing where every
#: third batch is one.
FAR, PATIENCE, FIRST_STEPS = math.log(0.01), 10.0, 20.0


@dataclass(frozen=True)
class SteadyClip:
    """Limit gradients to a level that follows their norms slowly.

    Let x = log‖g‖ and ℓ the logarithm of the level. A larger gradient is scaled down to the level, a smaller one is
    left as it is. Then ℓ moves towards x, by a fifth of the distance, but by no more than a few percent: a spike cannot
    lift it. So most steps are scaled a little, to nearly one size, and outliers do no more than other batches.
    Multiplying all gradients by a constant changes nothing. Steps that are not finite, and norms of 0, are ignored; so
    are norms below a hundredth of the level, after the first 20 steps and unless there are more than 10 in a row.

    It depends on the optimizer what is limited:

    - An **adaptive** one, such as Adam, divides each parameter's gradient by its own running size. There each tensor
      has a level of its own. It begins at 3 % of the tensor's first norm; if the optimizer has taken steps already, at
      the norm that its second moments tell, or without them at the first norm. It rises by up to 2 % a step, and falls
      by up to 5 %, so that it lies at the lower end of the norms. Only ratios between steps matter to such an
      optimizer, and large gradients of the first steps no longer weigh on its second moments, which would shorten steps
      for long.
    - With any **other** one, such as SGD, the step is the gradient itself, so its direction is kept: the level is one
      of the global norm. It begins at the first norm, without a soft start, and rises and falls by up to 5 % a step, so
      that it lies in the middle of the norms.

    In the first steps a level falls faster, and that of the global norm rises faster, too: after t steps by up to
    2 / (t + 1) of log‖g‖, since the first norm may be out of the ordinary. Without an optimizer
    (``Guard(named_parameters)``) the second holds.

    Args:
        soft_start: False to begin at the first norm with an adaptive optimizer, too.
        exclude: Names or patterns of tensors that are neither scaled nor part of the norm.

    Raises:
        TypeError: If an argument is of the wrong type.

    Source: found by experiment, see benchmarks/clipping.md; a limit that follows past norms as in AutoClip (Seetharaman
    et al. 2020, arXiv:2007.14469) and AdaGC (Wang et al. 2025, arXiv:2502.11034).
    """

    soft_start: bool = True
    exclude: tuple[str, ...] = field(default=(), kw_only=True)
    norms_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_flag("soft_start", self.soft_start)
        check_exclude(self.exclude)

    def init(self, stats: GradStats) -> Any:
        """Return levels from the optimizer's moments; none where there is no moment."""
        included_names(stats.layout.names, self.exclude)
        zeros = torch.zeros_like(stats.norms)
        # Moments are of single tensors, so they say nothing about a level of the global norm.
        moments = stats.moments if stats.adaptive else stats.layout.unknowns
        is_known = moments > zeros  # False for NaN
        is_new = moments.isnan() & torch.full_like(is_known, stats.adaptive and self.soft_start)
        return SteadyClipState(
            level=torch.where(is_known, moments.log(), zeros),
            seen=torch.where(is_known, torch.inf, zeros),
            soft=is_new.to(torch.float32),
            low=zeros.clone(),
            by_tensor=torch.full_like(stats.total, float(stats.adaptive)),
        )

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Compare norms with their levels, then move the levels."""
        number, zeros = stats.layout.constant, stats.layout.zeros
        included = included_tensors(stats, self.exclude)
        by_tensor = number(float(stats.adaptive))
        if stats.adaptive:
            start, rise, norms, log_norms = math.log(SOFT_START), ADAPTIVE_RISE, stats.norms, stats.log_norms
        else:
            start, rise, norms = 0.0, RISE, global_norm(stats, included).expand_as(zeros)
            log_norms = norms.log()
        counts = among(stats, included, stats.finite & (norms > zeros))
        # With another kind of optimizer than the state's, it begins again.
        seen = torch.where(state.by_tensor == by_tensor, state.seen, zeros)
        x = torch.where(counts, log_norms, state.level)
        first = x + state.soft * number(start) if start else x
        level = torch.where(seen == zeros, first, state.level)
        distance = x - level
        # Relative to the norm itself, so that no rounding in log or exp puts the limit of a smaller one below it.
        limits = torch.where(counts, stats.norms * (-distance).exp(), number(torch.inf))
        steps = seen + number(1.0)
        early = steps.reciprocal() * number(EARLY)
        lowest = -torch.maximum(early, number(FALL))
        highest = number(rise) if stats.adaptive else torch.maximum(early, number(rise))
        move = torch.clamp(distance * number(GAIN), lowest, highest)
        low = (state.low + number(1.0)) * (distance < number(FAR))
        follows = (low == zeros) | (low > number(PATIENCE)) | (seen < number(FIRST_STEPS))
        new = SteadyClipState(
            level=torch.where(counts, torch.where(follows, level + move, level), state.level),
            seen=torch.where(counts, steps, seen),
            soft=state.soft,
            low=torch.where(counts, low, state.low),
            by_tensor=torch.where(counts.any(), by_tensor, state.by_tensor),
        )
        return tensor_clip(stats, included, limits), new


class SteadyClipState(NamedTuple):
    """State of `SteadyClip`, float32: [P], but ``by_tensor`` [].

    Attributes:
        level: Logarithm of the level: of the tensor's norm, or of the global norm.
        seen: Steps that it has followed; 0 before its first gradient, inf if it began at the optimizer's moments.
        soft: 1 where the level begins softly.
        low: Steps in a row whose norm was far below the level.
        by_tensor: 1 if levels are of single tensors, 0 if they are of the global norm.
    """

    level: Tensor
    seen: Tensor
    soft: Tensor
    low: Tensor
    by_tensor: Tensor
