"""Clippers without memory: `NormClip` and `AGC`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

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
from lightning_gradguard.stats.units import measure_units
from lightning_gradguard.validation import check_positive

#: The largest factor that makes every float32 number less.
_LESS = 1 - 2.0**-24


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
        return global_clip(stats, included, norm, coefficient, stats.layout.constant(self.max_norm)), state


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
        number, norms = stats.layout.constant, stats.norms
        measured = measure_units(
            stats, included_names(stats.layout.names, self.exclude) if self.exclude else None
        )
        ones = [number(1.0)] * len(stats.gradients)
        if measured is None:
            return Clip(tuple(ones), norms, torch.linalg.vector_norm(finite_or_zero(stats))), state
        units, gradients, weights = measured
        limits = torch.clamp(weights, min=self.eps) * self.clip_factor
        reach = torch.maximum(gradients, limits)
        if self.eps * self.clip_factor < 1e-6:  # the reference divides by no less, which matters only here
            reach = torch.where(gradients > limits, torch.clamp(gradients, min=1e-6), limits)
        multipliers = torch.where(gradients < number(torch.inf), limits / reach, number(1.0)).float()
        is_cut = multipliers < number(1.0)
        after, cuts = units.by_tensor(torch.stack([gradients * multipliers, is_cut]).float())
        before = norms.index_select(0, units.places)
        # An unclipped norm is unchanged to the bit, and a clipped one is less, however small the unit that is cut, so
        # that "clipped or not" is an exact question.
        after = torch.where(cuts > number(0.0), torch.minimum(after, before * number(_LESS)), before)
        in_force = limits.to(torch.float32)
        if units.elsewhere is not None:
            others = torch.where(units.elsewhere, finite_or_zero(stats), stats.layout.zeros)
            in_force = torch.cat([in_force, others])
        return Clip(
            units.spread(multipliers, ones),
            norms.index_copy(0, units.places, after),
            torch.linalg.vector_norm(in_force),
        ), state
