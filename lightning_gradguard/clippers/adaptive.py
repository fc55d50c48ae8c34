"""Clippers whose threshold follows past norms.

`AutoClip`, `ZClip` and `AdaGC` are from the literature. They equal their references on finite streams and differ where
those fail: a step that is not finite, or whose norm is exactly 0, is left out of the history, since one such step can
disable a clipper for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import (
    Clip,
    among,
    check_exclude,
    global_clip,
    global_norm,
    included_names,
    included_tensors,
    tensor_clip,
)
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.validation import check_decay, check_number, check_positive, check_whole

#: Norms that `AutoClip` keeps exactly, and how many positive finite bfloat16 numbers there are, 0 included.
EXACT, BINS = 2048, 0x7F80


class AutoClipState(NamedTuple):
    """State of `AutoClip`.

    Attributes:
        seen: int64 [], number of norms seen.
        first: float32 [EXACT], the first of them; inf where there is none yet.
        bins: int32 [BINS], how many of all norms round to each bfloat16 number.
    """

    seen: Tensor
    first: Tensor
    bins: Tensor


@dataclass(frozen=True)
class AutoClip:
    """Limit the global norm to a past percentile.

    It is a percentile of all global norms so far, the current one included. So the current norm moves its threshold by
    one rank at most.

    The percentile is exact, with linear interpolation, for the first 2,048 steps. From then on each norm counts as the
    nearest bfloat16 number. That puts the threshold within 2^-8 (0.4 %) of the exact one, in constant memory (140 kB).

    Args:
        percentile: Above 0, up to 100. Default 10, as in the paper: nine steps of ten are scaled down.
        exclude: Names or patterns of tensors that are neither scaled nor part of the norm.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``percentile`` is out of range.

    Source: Seetharaman et al. 2020, arXiv:2007.14469.
    """

    percentile: float = 10.0
    exclude: tuple[str, ...] = field(default=(), kw_only=True)
    norms_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("percentile", self.percentile, "above 0, up to 100", lambda v: 0 < v <= 100)
        check_exclude(self.exclude)

    def init(self, stats: GradStats) -> Any:
        """Return an empty history."""
        included_names(stats.layout.names, self.exclude)
        bins = torch.zeros(BINS, dtype=torch.int32, device=stats.norms.device)
        return AutoClipState(bins[0].to(torch.int64), stats.norms.new_full((EXACT,), math.inf), bins)

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Add the norm, then clip to the percentile."""
        included = included_tensors(stats, self.exclude)
        norm = global_norm(stats, included)
        number = stats.layout.constant
        new = _remember(number, state, norm, stats.finite & (norm > number(0.0)))
        # A state can hold numbers that are no norms, if its file is damaged.
        limit = self._threshold(number, new).clamp(min=0.0)
        coefficient = torch.where(norm > limit, limit / norm, number(1.0))
        return global_clip(stats, included, norm, coefficient, limit), new

    def _threshold(self, number: Callable[[float], Tensor], state: AutoClipState) -> Tensor:
        """Return the percentile, float32 []; inf at first."""
        last = torch.clamp(state.seen - 1, min=0)
        # In integers: float32 loses the fraction of a large rank, and not every device has float64.
        rank = last * round(self.percentile * 10**7)
        low, fraction = rank // 10**9, (rank % 10**9).to(torch.float32) / 10**9
        ranks = torch.stack([low, torch.minimum(low + 1, last)])
        exact = state.first.sort().values[torch.clamp(ranks, max=EXACT - 1)]
        numbers = torch.searchsorted(state.bins.cumsum(0), ranks, right=True).clamp(max=BINS - 1)
        rounded = numbers.to(torch.int16).view(torch.bfloat16).to(torch.float32)
        below, above = torch.where(state.seen <= EXACT, exact, rounded).unbind()
        return torch.where(state.seen > 0, below + fraction * (above - below), number(math.inf))


def _remember(
    number: Callable[[float], Tensor], state: AutoClipState, norm: Tensor, counts: Tensor
) -> AutoClipState:
    """Add ``norm`` to the history if it counts."""
    place = torch.arange(EXACT, device=norm.device) == state.seen
    # Positive floats sort as their bits do, so the bits of a bfloat16 are the number of its bin.
    bin_ = torch.where(counts, norm, number(0.0)).to(torch.bfloat16).view(torch.int16).to(torch.int64)
    return AutoClipState(
        seen=state.seen + counts.to(torch.int64),
        first=torch.where(place & counts, norm, state.first),
        bins=state.bins.index_add(0, bin_.clamp(max=BINS - 1).reshape(1), counts.to(torch.int32).reshape(1)),
    )


class ZClipState(NamedTuple):
    """State of `ZClip`.

    Number of norms seen, int64 []; mean and variance of the global norm, float32 [].
    """

    seen: Tensor
    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class ZClip:
    """Limit global norms with an outlying z-score.

    The further out a norm lies, the more it is scaled down.

    z = (‖g‖ - mean) / (sigma + 1e-6). Where z > z_threshold the limit is mean + z_threshold² / z · sigma, and enters
    the moving averages in place of the norm. The first ``warmup_steps`` norms give mean and variance.

    Args:
        z_threshold: z-score of an outlier, dimensionless.
        decay: Weight of the past in the moving averages.
        warmup_steps: Steps before z-scores count.
        max_grad_norm: Largest global norm at any step, warm-up included; None for no such limit.
        exclude: Names or patterns of tensors that are neither scaled nor part of the norm.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.

    Source: Kumar et al. 2025, arXiv:2504.02507; defaults and order of operations of ``zclip`` 1.0.0.
    """

    z_threshold: float = 2.5
    decay: float = 0.97
    warmup_steps: int = 25
    max_grad_norm: float | None = 1.0
    exclude: tuple[str, ...] = field(default=(), kw_only=True)
    norms_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("z_threshold", self.z_threshold)
        check_decay("decay", self.decay)
        check_whole("warmup_steps", self.warmup_steps)
        if self.max_grad_norm is not None:
            check_positive("max_grad_norm", self.max_grad_norm)
        check_exclude(self.exclude)

    def init(self, stats: GradStats) -> Any:
        """Return a state without a norm so far."""
        included_names(stats.layout.names, self.exclude)
        zero = torch.zeros((), device=stats.norms.device, dtype=torch.float32)
        return ZClipState(seen=zero.to(torch.int64), mean=zero, var=zero.clone())

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Compare the norm with its moving averages."""
        number, included = stats.layout.constant, included_tensors(stats, self.exclude)
        norm = global_norm(stats, included)
        warm = state.seen < self.warmup_steps
        sigma = state.var.sqrt()
        unit = sigma + 1e-6
        z = (norm - state.mean) / unit
        outlier = ~warm & (z > number(self.z_threshold))
        reach = unit * self.z_threshold
        threshold, adaptive = (
            torch.where(warm, number(math.inf), state.mean + away)
            for away in (reach, torch.where(outlier, self.z_threshold**2 / z * sigma, reach))
        )
        limit = adaptive.clamp(min=0.0, max=self.max_grad_norm)
        coefficient = torch.where(norm > limit, limit / (norm + 1e-6), number(1.0))
        new = self._average(number, state, torch.where(outlier, adaptive, norm), warm)
        counts = stats.finite & (norm > number(0.0))
        kept = ZClipState(*(torch.where(counts, a, b) for a, b in zip(new, state, strict=True)))
        threshold = threshold.clamp(min=0.0, max=self.max_grad_norm)
        return global_clip(stats, included, norm, coefficient, threshold), kept

    def _average(
        self, number: Callable[[float], Tensor], state: ZClipState, norm: Tensor, warm: Tensor
    ) -> ZClipState:
        """Return the next mean and variance."""
        seen, change = state.seen + 1, norm - state.mean
        gain = torch.where(warm, seen.float().reciprocal(), number(1 - self.decay))
        mean = state.mean + gain * change
        rest = norm - mean
        # After warm-up the reference takes the distance from the new mean; an exact variance needs both (Welford).
        square = torch.where(warm, change, rest) * rest
        return ZClipState(seen=seen, mean=mean, var=state.var + gain * (square - state.var))


class AdaGCState(NamedTuple):
    """State of `AdaGC`.

    Steps seen, int64 []; γ of each tensor, float32 [P], inf where no gradient was seen.
    """

    seen: Tensor
    gamma: Tensor


@dataclass(frozen=True)
class AdaGC:
    """Limit each tensor's norm by its past.

    The limit is a multiple of γ, a moving average of the tensor's clipped norms.

    For ``warmup_steps``: global clipping to ``warmup_norm``, and γ = the tensor's smallest clipped norm.
    Then ‖g‖ <= factor · γ, and γ = decay · γ + (1 - decay) · ‖clipped g‖.

    Args:
        factor: Largest ratio ‖g‖ / γ, 1 or more. At 1.05 the limit grows by at most 0.1 % a step.
        decay: Weight of the past in γ.
        warmup_steps: Steps of global clipping.
        warmup_norm: Largest global norm during warm-up, in the gradient's unit.
        exclude: Names or patterns of tensors that are neither scaled nor part of the norm.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.

    Source: Wang et al. 2025, arXiv:2502.11034, algorithm 1.
    """

    factor: float = 1.05
    decay: float = 0.98
    warmup_steps: int = 100
    warmup_norm: float = 1.0
    exclude: tuple[str, ...] = field(default=(), kw_only=True)
    norms_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("factor", self.factor, "1 or more, and finite", lambda v: 1 <= v < math.inf)
        check_decay("decay", self.decay)
        check_whole("warmup_steps", self.warmup_steps)
        check_positive("warmup_norm", self.warmup_norm)
        check_exclude(self.exclude)

    def init(self, stats: GradStats) -> Any:
        """Return a state without a norm so far."""
        included_names(stats.layout.names, self.exclude)
        seen = torch.zeros((), dtype=torch.int64, device=stats.norms.device)
        return AdaGCState(seen=seen, gamma=torch.full_like(stats.norms, math.inf))

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Compare each norm with its tensor's γ."""
        number, included = stats.layout.constant, included_tensors(stats, self.exclude)
        total = global_norm(stats, included)
        warm = state.seen < self.warmup_steps
        ceiling = number(self.warmup_norm)
        early = global_clip(stats, included, total, torch.clamp(ceiling / total, max=1.0), ceiling)
        late = tensor_clip(stats, included, (self.factor * state.gamma).clamp(min=0.0))
        pairs: Any = zip(early, late, strict=True)
        clip = Clip(*(torch.where(warm, a, b) for a, b in pairs))
        average = self.decay * state.gamma + (1 - self.decay) * clip.norms
        lowest = torch.minimum(state.gamma, clip.norms)
        gamma = torch.where(warm | torch.isinf(state.gamma), lowest, average)
        counts = among(stats, included, stats.finite & (stats.norms > number(0.0)))
        return clip, AdaGCState(
            seen=state.seen + (stats.finite & (total > number(0.0))).to(torch.int64),
            gamma=torch.where(counts, gamma, state.gamma),
        )
