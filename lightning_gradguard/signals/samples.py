"""What is read only now and then, and only in part: samples of weights and of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradguard.signals.layout import Layout
from lightning_gradguard.signals.stats import dense, real

#: Elements of each tensor, and output rows of each weight, that stand for it.
SAMPLES = 64

LOW_PRECISION = (torch.float16, torch.bfloat16)


def sample(layout: Layout) -> Tensor:
    """A copy of up to `SAMPLES` evenly strided elements of each parameter, float32 [P, SAMPLES], zeros behind."""
    device = layout.numel.device
    rows = []
    for parameter in layout.parameters:
        picked = _strided(real(parameter.detach())).to(device, torch.float32)
        rows.append(torch.nn.functional.pad(picked, (0, SAMPLES - picked.numel())))
    return torch.stack(rows)


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
    zero = torch.zeros((), device=layout.numel.device)
    shares = []
    for index, gradient in enumerate(gradients):
        if index not in layout.layer_indices or gradient is None or gradient.layout != torch.strided:
            shares.append(zero)
            continue
        rows = real(gradient)[:: max(1, len(gradient) // SAMPLES)][:SAMPLES].flatten(1)
        shares.append((rows == 0).all(1).float().mean().to(zero.device) if rows.numel() else zero)
    return torch.stack(shares)


def lost_shares(gradients: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """Share of a half-precision gradient's elements that are zero or subnormal in its dtype, float32 [P].

    By count, from up to `SAMPLES` elements; 0 for gradients of higher precision, which lose nothing that matters.
    """
    zero = torch.zeros((), device=layout.numel.device)
    shares = []
    for gradient in gradients:
        if gradient is None or gradient.dtype not in LOW_PRECISION or not gradient.numel():
            shares.append(zero)
            continue
        small = _strided(dense(gradient)).abs() < torch.finfo(gradient.dtype).tiny
        shares.append(small.float().mean().to(zero.device))
    return torch.stack(shares)


def _strided(tensor: Tensor) -> Tensor:
    """Up to `SAMPLES` elements; the stride shares no factor with a row, or all would come from a few columns."""
    stride = max(1, tensor.numel() // SAMPLES)
    width = tensor.shape[-1] if tensor.ndim else 1
    while stride > 1 and math.gcd(stride, width) > 1:
        stride -= 1
    return tensor.reshape(-1)[::stride][:SAMPLES]
