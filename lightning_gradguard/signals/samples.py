"""What is read only now and then, and only in part: samples of weights and of gradients."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradguard.signals.layout import Layout
from lightning_gradguard.signals.stats import dense, real

#: Elements of each tensor, and output rows of each weight, that stand for it.
SAMPLES = 64
#: Elements that are compared with zero at once.
_TOGETHER = 2**22

LOW_PRECISION = (torch.float16, torch.bfloat16)


def sample(layout: Layout) -> Tensor:
    """A copy of up to `SAMPLES` evenly strided elements of each parameter, float32 [P, SAMPLES], zeros behind."""
    views, places = _views(layout)
    device = layout.numel.device
    if any(view.device != device for view in views):
        views = [view.to(device) for view in views]
    picked = torch.cat(views).to(torch.float32)
    rows = torch.zeros(len(views) * SAMPLES, device=device, dtype=torch.float32)
    return rows.index_copy_(0, places, picked).view(len(views), SAMPLES)


def update_ratios(before: Tensor, after: Tensor, layout: Layout) -> Tensor:
    """Applied update ratio ‖Δw‖/‖w‖ of each tensor, float32 [P], from two results of `sample`.

    Works for every optimizer, since it looks at the weights alone. ‖w‖ is the larger of before and after, so that a
    zero-initialised layer may begin to move, and no ratio exceeds 2.

    Source: CS231n notes, "ratio of weights:updates".
    """
    base = torch.maximum(torch.linalg.vector_norm(before, dim=1), torch.linalg.vector_norm(after, dim=1))
    moved: Tensor = torch.linalg.vector_norm(after - before, dim=1)
    return moved / torch.clamp(base, min=torch.finfo(torch.float32).tiny)


def dead_shares(gradients: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """Share of a layer's output rows whose gradient is exactly zero, float32 [P]; 0 for other tensors.

    From up to `SAMPLES` evenly strided rows, each read whole.
    """
    device = layout.numel.device
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, gradient in enumerate(gradients):
        if gradient is not None and index in layout.layer_indices and gradient.layout == torch.strided:
            groups[gradient.shape, gradient.dtype, gradient.device].append(index)
    where: list[int] = []
    shares: list[Tensor] = []
    for indices in groups.values():
        rows = [_rows(gradients[i]) for i in indices]
        # Layers of one shape together, since calls cost more than arithmetic; not all, since memory is bounded.
        together = max(1, _TOGETHER // max(1, rows[0].numel()))
        for begin in range(0, len(rows), together):
            part = torch.stack(rows[begin : begin + together]).flatten(2)
            if part.numel():
                shares.append((part == 0).all(2).mean(1, dtype=torch.float32).to(device))
                where += indices[begin : begin + together]
    zeros = torch.zeros(len(gradients), device=device, dtype=torch.float32)
    return zeros.index_copy_(0, layout.indices(tuple(where)), torch.cat(shares)) if shares else zeros


def lost_shares(gradients: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """Share of a half-precision gradient's elements that are zero or subnormal in its dtype, float32 [P].

    By count, from up to `SAMPLES` elements; 0 for gradients of higher precision, which lose nothing that matters.
    """
    zero = torch.zeros((), device=layout.numel.device, dtype=torch.float32)
    shares = []
    for gradient in gradients:
        if gradient is None or gradient.dtype not in LOW_PRECISION or not gradient.numel():
            shares.append(zero)
            continue
        small = _strided(dense(gradient)).abs() < torch.finfo(gradient.dtype).tiny
        shares.append(small.float().mean().to(zero.device))
    return torch.stack(shares)


def stride_of(shape: Sequence[int]) -> int:
    """From one sampled element to the next; shares no factor with a row, or all would come from a few columns."""
    stride = max(1, math.prod(shape) // SAMPLES)
    width = shape[-1] if shape else 1
    while stride > 1 and math.gcd(stride, width) > 1:
        stride -= 1
    return stride


def row_stride(rows: int) -> int:
    """From one sampled row to the next."""
    return max(1, rows // SAMPLES)


def _rows(gradient: Tensor | None) -> Tensor:
    """Up to `SAMPLES` rows."""
    assert gradient is not None
    rows = real(gradient)
    return rows if len(rows) <= SAMPLES else rows[:: row_stride(len(rows))][:SAMPLES]


def _views(layout: Layout) -> tuple[list[Tensor], Tensor]:
    """Views of the sampled elements of each parameter, and their places in rows; made anew when memory moves."""
    try:
        memory = tuple([p.data_ptr() for p in layout.parameters])
    except RuntimeError:  # a fake tensor has none
        memory = ()
    known = layout.views.get(SAMPLES)
    if known is None or known[0] != memory or not memory:
        views = [_strided(real(p.detach())) for p in layout.parameters]
        spans = [range(i * SAMPLES, i * SAMPLES + view.numel()) for i, view in enumerate(views)]
        places = torch.tensor([place for span in spans for place in span], dtype=torch.long)
        known = layout.views[SAMPLES] = memory, views, places.to(layout.numel.device)
    return known[1], known[2]


def _strided(tensor: Tensor) -> Tensor:
    """Up to `SAMPLES` elements."""
    return tensor.reshape(-1)[:: stride_of(tensor.shape)][:SAMPLES]
