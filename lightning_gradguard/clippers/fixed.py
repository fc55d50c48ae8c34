"""Clippers without memory: `NormClip` and `AGC`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import (
    Clip,
    NoState,
    check_exclude,
    finite_or_zero,
    global_clip,
    global_norm,
    included_names,
    included_tensors,
)
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.norms import unit_norms
from lightning_gradguard.stats.sharding import local
from lightning_gradguard.validation import check_positive


@dataclass(frozen=True)
class NormClip:
    """Limit the global norm to ``max_norm``.

    coefficient = min(1, max_norm / (‖g‖ + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        max_norm: Largest global norm, in the gradient's unit.
        exclude: Names or patterns of tensors that are neither scaled nor part of the norm.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``max_norm`` is not positive and finite.

    Source: Pascanu et al. 2013, arXiv:1211.5063.
    """

    max_norm: float
    exclude: tuple[str, ...] = field(default=(), kw_only=True)
    norms_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("max_norm", self.max_norm)
        check_exclude(self.exclude)

    def init(self, stats: GradStats) -> Any:
        """Return an empty state."""
        included_names(stats.layout.names, self.exclude)
        return NoState()

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Compare the global norm with ``max_norm``."""
        included = included_tensors(stats, self.exclude)
        norm = global_norm(stats, included)
        coefficient = torch.clamp(self.max_norm / (norm + 1e-6), max=1.0)
        return global_clip(stats, included, norm, coefficient, torch.full_like(norm, self.max_norm)), state


@dataclass(frozen=True)
class AGC:
    """Limit each unit's gradient by its weight norm.

    Adaptive gradient clipping: ‖G_i‖ <= clip_factor · max(‖W_i‖, eps) for unit i: a row of a matrix, a filter of a
    convolution, or a whole vector or scalar. The floor ``eps`` lets a zero-initialised layer move. For sharded tensors
    the norms of all units take an all-reduce of their own.

    Args:
        clip_factor: Largest ratio ‖G_i‖ / ‖W_i‖, dimensionless. Default 0.01, as in the paper.
        eps: Smallest weight norm that counts as such.
        exclude: Names or patterns of tensors that are never scaled; the paper excludes the last layer.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``clip_factor`` or ``eps`` is not positive and finite.

    Source: Brock et al. 2021, arXiv:2102.06171, equation 3; the formula of ``timm.utils.adaptive_clip_grad``.
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    exclude: tuple[str, ...] = field(default=(), kw_only=True)
    memoryless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("clip_factor", self.clip_factor)
        check_positive("eps", self.eps)
        check_exclude(self.exclude)

    def init(self, stats: GradStats) -> Any:
        """Return an empty state."""
        included_names(stats.layout.names, self.exclude)
        return NoState()

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Compare each unit's gradient with its weight."""
        device = stats.norms.device
        included = included_names(stats.layout.names, self.exclude)
        gradients = {i: g for i, g in enumerate(stats.gradients) if g is not None and included[i]}
        units = _norms_of_units(stats, gradients)
        multipliers, norms, limits = [], [], []
        for index, norm in enumerate(stats.norms.unbind()):
            multiplier = torch.ones((), device=device, dtype=torch.float32)
            limit = finite_or_zero(norm)
            if index in units:
                multiplier, clipped, limit = self._clip_units(*units[index])
                # An unclipped norm is unchanged to the bit, so that "clipped or not" is an exact question.
                norm = torch.where((multiplier < 1).any().to(device), clipped.to(device), norm)
            multipliers.append(multiplier)
            norms.append(norm)
            limits.append(limit.to(device))
        threshold = torch.linalg.vector_norm(torch.stack(limits))
        return Clip(tuple(multipliers), torch.stack(norms), threshold), state

    def _clip_units(self, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return multipliers, clipped norm and limit, float32."""
        limit = torch.clamp(weight, min=self.eps) * self.clip_factor
        over = torch.isfinite(gradient) & (gradient > limit)
        multiplier = torch.where(over, limit / torch.clamp(gradient, min=1e-6), 1.0).to(torch.float32)
        norm = torch.linalg.vector_norm(gradient * multiplier)
        return multiplier, norm.to(torch.float32), torch.linalg.vector_norm(limit).to(torch.float32)


def _norms_of_units(stats: GradStats, gradients: dict[int, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Return whole unit norms of gradients and weights."""
    weights = {i: stats.layout.parameters[i] for i in gradients}
    shards = stats.layout.shards
    if shards is None:
        return {i: (unit_norms(g), unit_norms(weights[i].detach())) for i, g in gradients.items()}
    parts = [unit_norms(local(t).detach()) for t in (*gradients.values(), *weights.values())]
    norms = shards.unit_norms([*gradients, *weights], parts)
    return dict(zip(gradients, zip(norms, norms[len(gradients) :], strict=False), strict=True))
