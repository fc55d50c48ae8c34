"""The one pass over the gradients: `measure` turns them into `GradStats`, vectors of P numbers on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gradguard.signals.layout import Layout
from lightning_gradguard.signals.shards import align_gradients, local

if TYPE_CHECKING:
    from lightning_gradguard.signals.trends import Trends

#: Of which a foreach norm in float32 is none, or refused.
_WIDE = frozenset({torch.float64, torch.complex32, torch.complex64, torch.complex128})
_LARGEST = math.sqrt(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class GradStats:
    """One step's gradients of P tensors, reduced to vectors; everything lies on the device of the first tensor.

    Attributes:
        layout: The static facts.
        gradients: The P gradients, None where there is none.
        norms: float32 [P], L2 norm of each gradient; 0 where there is none.
        present: Bool [P], whether there is a gradient.
        weights: float32 [P], L2 norm of each parameter at its last refresh, at least ``layout.floors``.
        updates: float32 [P], applied update ratio ‖Δw‖/‖w‖ of the newest sampled step; NaN before the first.
        dead: float32 [P], share of output rows with an all-zero gradient at the newest sampled step.
        lost: float32 [P], share of a half-precision gradient lost to its dtype, likewise.
        sampled_steps: Steps that a new sample of ``updates`` stands for; 0 where it is an old one.
        low_precision: Whether gradients are computed, or scaled, in half precision.
        resting: Whether the learning rate is below a tenth of its peak, so that small updates are meant.
        cut: Bool [P], tensors that took part in the forward pass but have no path from the loss.
        unused: Bool [P], trainable tensors that took no part in the forward pass.
        ran: Bool [P], trainable tensors that took part in it.
        recurrent: Bool [P], tensors that are applied again and again in one pass.
        time_tilt: float32 [], decades by which gradients fall from the last to the first tenth of a sequence;
            NaN where nobody asked.
        total: float32 [], global norm.
        loss: float32 [], NaN when none was given.
        finite: Bool [], whether the global norm, and the loss if given, are finite.
        has_loss: Whether a loss was given.
        trends: Running statistics up to this step, which detectors share; set by the guard.
    """

    layout: Layout
    gradients: tuple[Tensor | None, ...]
    norms: Tensor
    present: Tensor
    weights: Tensor
    updates: Tensor
    total: Tensor
    loss: Tensor
    finite: Tensor
    has_loss: bool
    dead: Tensor
    lost: Tensor
    cut: Tensor
    unused: Tensor
    ran: Tensor
    recurrent: Tensor
    time_tilt: Tensor
    sampled_steps: int = 0
    resting: bool = False
    low_precision: bool = False
    trends: Trends | None = None


def measure(layout: Layout, weights: Tensor, updates: Tensor, loss: Tensor | None = None) -> GradStats:
    """Measures the gradients that lie on the parameters now, with one read of each.

    Where they are spread over ranks, every rank has to call it.

    Args:
        layout: The watched tensors.
        weights: float32 [P] weight norms, from `weight_norms`.
        updates: float32 [P] applied update ratios.
        loss: Scalar loss of this step, or None.
    """
    gradients = gradients_of(layout)
    return stats_of(layout, gradients, _whole_norms(gradients, layout), weights, updates, loss)


def stats_of(
    layout: Layout,
    gradients: tuple[Tensor | None, ...],
    norms: Tensor,
    weights: Tensor,
    updates: Tensor,
    loss: Tensor | None,
) -> GradStats:
    """What follows from the norms of gradients, float32 [P]; the other arguments as in `measure`."""
    total = torch.linalg.vector_norm(norms)
    # Its square must be finite too, or an optimizer's second moment is not; false for NaN.
    finite = total < _LARGEST
    value = torch.full_like(total, torch.nan)
    if loss is not None:
        value = loss.detach().to(total.device, torch.float32).reshape(())
        finite = finite & torch.isfinite(value)
    zeros = torch.zeros_like(norms)
    return GradStats(
        layout=layout,
        gradients=gradients,
        norms=norms,
        present=layout.presence(gradients),
        weights=torch.maximum(weights, layout.floors),
        updates=updates,
        total=total,
        loss=value,
        finite=finite,
        has_loss=loss is not None,
        dead=zeros,
        lost=zeros,
        cut=zeros > 0,
        unused=zeros > 0,
        ran=zeros > 0,
        recurrent=zeros > 0,
        time_tilt=torch.full_like(total, torch.nan),
    )


def gradients_of(layout: Layout) -> tuple[Tensor | None, ...]:
    """The gradients as they lie on the parameters now, each spread over ranks as its parameter is."""
    if layout.shards is not None:
        align_gradients(layout.parameters)
    return tuple(p.grad for p in layout.parameters)


def weight_norms(layout: Layout) -> Tensor:
    """L2 norm of each parameter, float32 [P]: one read of the weights, so refreshed only every few steps.

    Where they are spread over ranks, every rank has to call it.
    """
    if layout.shards is not None:
        return _whole_norms(layout.parameters, layout)
    return local_norms([p.detach() for p in layout.parameters], layout)


def unit_norms(tensor: Tensor) -> Tensor:
    """L2 norm per output unit, broadcastable to ``tensor``: over all but the first dimension.

    Vectors and scalars are one unit. float32, or float64 for float64 input.

    Source: Brock et al. 2021, arXiv:2102.06171, section 4.1.
    """
    stored = dense(tensor)
    dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
    dims = list(range(1, stored.ndim)) if stored.ndim > 1 else None
    stored = stored.abs() if stored.is_complex() else stored  # refuses a real dtype argument
    norms: Tensor = torch.linalg.vector_norm(stored, dim=dims, keepdim=dims is not None, dtype=dtype)
    return norms


def local_norms(tensors: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """L2 norm of what this rank holds of each tensor, float32 [P], 0 for None.

    One foreach call for each device and kind of dtype.
    """
    device = layout.numel.device
    if layout.shards is not None:
        tensors = [None if t is None else local(t).detach() for t in tensors]
    present = [t for t in tensors if t is not None]
    if len(present) == len(tensors) and _is_one_kind(present):
        # The everyday case, in which looking at each tensor would cost more than its norm.
        return torch.stack(torch._foreach_norm(present, 2, dtype=torch.float32)).to(device)
    buckets: dict[tuple[torch.device, bool], list[int]] = {}
    plain = [None if t is None else real(dense(t)) for t in tensors]
    for index, tensor in enumerate(plain):
        if tensor is not None:
            buckets.setdefault((tensor.device, tensor.dtype == torch.float64), []).append(index)
    pieces: list[Tensor] = []
    where: list[int] = []
    for (_, double), indices in buckets.items():
        group = [t for i in indices if (t := plain[i]) is not None]
        # float64 refuses a narrower dtype argument; half precision would overflow in its own.
        norms = (
            torch._foreach_norm(group, 2) if double else torch._foreach_norm(group, 2, dtype=torch.float32)
        )
        pieces.append(torch.stack(norms).to(device, torch.float32))
        where += indices
    if not pieces:
        return torch.zeros(len(tensors), device=device, dtype=torch.float32)
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if where == list(range(len(tensors))):
        return joined
    # By hand with precision="64-true" the default is another.
    zeros = torch.zeros(len(tensors), device=device, dtype=torch.float32)
    return zeros.index_copy_(0, torch.tensor(where, device=device), joined)


def _is_one_kind(tensors: Sequence[Tensor]) -> bool:
    """Whether one foreach call takes all of them: dense, real, of one dtype up to float32, on one device."""
    dtypes = {t.dtype for t in tensors}
    return (
        len(dtypes) == 1
        and not dtypes & _WIDE
        and {t.layout for t in tensors} == {torch.strided}
        and len({t.device for t in tensors}) == 1
    )


def _whole_norms(tensors: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """L2 norm of each tensor, float32 [P]; where they are spread, every rank has to call it."""
    norms = local_norms(tensors, layout)
    if layout.shards is None:
        return norms
    return layout.shards.add_up([layout.shards.squares(norms)])[0].sqrt().to(torch.float32)


def weight_means(layout: Layout) -> Tensor:
    """Mean of each parameter's elements, float32 [P]; where they are spread over ranks, every rank has to call it."""
    parts = [
        real(local(p).detach()).sum(dtype=torch.float32) / (1 + p.is_complex()) for p in layout.parameters
    ]
    sums = torch.stack([part.to(layout.numel.device) for part in parts])
    if layout.shards is not None:
        sums = layout.shards.add_up([sums * layout.shards.shares])[0].to(torch.float32)
    return sums / layout.numel


def dense(tensor: Tensor) -> Tensor:
    """The values that a sparse tensor stores, each once; any other tensor as it is."""
    return tensor.coalesce()._values() if tensor.layout == torch.sparse_coo else tensor


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers; any other tensor as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
