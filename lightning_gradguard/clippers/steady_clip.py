"""`SteadyClip`, the recommended clipper."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import (
    Clip,
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
#: Largest fall in the first step, where norms may fall by powers of ten, and the steps after which it has halved.
EARLY_FALL, EARLY_STEPS = 0.2, 20.0


@dataclass(frozen=True)
class SteadyClip:
    """Limit gradients to a level that follows their norms slowly.

    Let x = log‖g‖ and ℓ the logarithm of the level. A larger gradient is scaled down to the level, a smaller one is
    left as it is. Then ℓ moves towards x, by a fifth of the distance, but by no more than a few percent a step: a spike
    cannot lift it, and a batch without a signal cannot pull it down. So most steps are scaled a little, to nearly one
    size, and outliers do no more than other batches. Multiplying all gradients by a constant changes nothing. Steps
    that are not finite, and norms of 0, are ignored.

    It depends on the optimizer what is limited:

    - An **adaptive** one, such as Adam, divides each parameter's gradient by its own running size. There each tensor
      has a level of its own. It begins at 3 % of the tensor's first norm, or at the norm that the optimizer's second
      moments tell, if it has some; it rises by up to 2 % a step, and falls by up to 5 %, so that it lies at the lower
      end of the norms. Only ratios between steps matter to such an optimizer, and large gradients of the first steps
      no longer weigh on its second moments, which would shorten steps for long.
    - With any **other** one, such as SGD, the step is the gradient itself, so its direction is kept: the level is one
      of the global norm. It begins at the first norm, without a soft start, and rises and falls by up to 5 % a step, so
      that it lies in the middle of the norms.

    In the first 60 steps a level may fall faster, by up to 20 % at first, since norms fall by powers of ten there.
    Without an optimizer (``Guard(named_parameters)``) the second holds.

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
        # They are those of each tensor, and not of the global norm.
        moments = stats.moments if stats.adaptive else stats.layout.unknowns
        is_known = moments > stats.layout.zeros  # false for NaN
        zeros = torch.zeros_like(stats.norms)
        level = torch.where(is_known, moments.log(), zeros)
        # What the moments tell has no early steps any more.
        return SteadyClipState(level, torch.where(is_known, torch.inf, zeros))

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Compare norms with their levels, then move the levels."""
        number, zeros = stats.layout.constant, stats.layout.zeros
        included = included_tensors(stats, self.exclude)
        if stats.adaptive:
            start, rise = SOFT_START if self.soft_start else 1.0, ADAPTIVE_RISE
            norms, log_norms = stats.norms, stats.log_norms
        else:
            start, rise = 1.0, RISE
            norms = global_norm(stats, included).expand_as(zeros)
            log_norms = norms.log()
        counts = stats.finite & included & (norms > zeros)
        first = state.seen == zeros
        x = torch.where(counts, log_norms, state.level)
        level = torch.where(first, x + number(math.log(start)), state.level)
        distance = x - level
        # Relative to the norm itself, so that no rounding in log or exp puts the limit of a smaller one below it.
        limits = torch.where(counts, stats.norms * (-distance).exp(), number(torch.inf))
        early = (state.seen * number(1 / EARLY_STEPS) + number(1.0)).reciprocal() * number(EARLY_FALL)
        lowest = -torch.maximum(early, number(FALL))
        move = torch.minimum(torch.maximum(distance * number(GAIN), lowest), number(rise))
        new = SteadyClipState(torch.where(counts, level + move, state.level), state.seen + counts)
        return tensor_clip(stats, included, limits), new


class SteadyClipState(NamedTuple):
    """State of `SteadyClip`, float32 [P] each.

    Attributes:
        level: Logarithm of the level: of the tensor's norm, or of the global norm.
        seen: Steps that it has followed; 0 before its first gradient, inf if it began at the optimizer's moments.
    """

    level: Tensor
    seen: Tensor
