"""`samples` of tensors that are spread over ranks: each adds what it holds of what one process would read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_gradguard.signals.layout import LOW_PRECISION, Layout
from lightning_gradguard.signals.norms import real
from lightning_gradguard.signals.samples import SAMPLES, row_stride, stride_of
from lightning_gradguard.signals.shards import Shards, local


def sample_part(layout: Layout, shards: Shards) -> Tensor:
    """What this rank holds of `samples.sample`, float64 [P, SAMPLES]; summed over ranks it is the sample."""
    rows = []
    for index, parameter in enumerate(layout.parameters):
        part = real(local(parameter).detach())
        numbers, places = _elements(shards, index, part)
        rows.append(_at(numbers, part.reshape(-1)[places], shards))
    return torch.stack(rows) * shards.shares[:, None]


def live_part(gradients: Sequence[Tensor | None], layout: Layout, shards: Shards) -> Tensor:
    """Which sampled rows have an element other than zero in this rank's part, float64 [P, SAMPLES]."""
    rows = [shards.shares.new_zeros(SAMPLES) for _ in gradients]
    for index, part in _layers(gradients, layout):
        count = shards.shapes[index][0]
        numbers, places = shards.held(index, (count,), row_stride(count), SAMPLES)
        rows[index] = _at(numbers, (real(part)[places].flatten(1) != 0).any(1), shards)
    return torch.stack(rows)


def dead_from(live: Tensor, gradients: Sequence[Tensor | None], layout: Layout, shards: Shards) -> Tensor:
    """`samples.dead_shares` from the sum of `live_part` over ranks, float32 [P]."""
    counts = [0.0] * len(gradients)
    for index, _ in _layers(gradients, layout):
        rows = shards.shapes[index][0]
        counts[index] = float(len(range(0, rows, row_stride(rows))[:SAMPLES]))
    read = torch.tensor(counts, device=live.device)
    return torch.where(read > 0, 1 - (live > 0).sum(1) / read.clamp(min=1), 0.0)


def lost_part(gradients: Sequence[Tensor | None], layout: Layout, shards: Shards) -> Tensor:
    """What this rank adds to `samples.lost_shares`, float64 [P]."""
    shares = [shards.shares.new_zeros(())] * len(gradients)
    for index, gradient in enumerate(gradients):
        if gradient is None or gradient.dtype not in LOW_PRECISION or not gradient.numel():
            continue
        part = local(gradient)
        _, places = _elements(shards, index, part)
        small = part.reshape(-1)[places].abs() < torch.finfo(part.dtype).tiny
        whole = len(range(0, gradient.numel(), stride_of(gradient.shape))[:SAMPLES])
        shares[index] = small.sum().to(shares[index]) / whole
    return torch.stack(shares) * shards.shares


def _layers(gradients: Sequence[Tensor | None], layout: Layout) -> Iterator[tuple[int, Tensor]]:
    """The layers with a gradient, as `samples.dead_shares` takes them: index, and what this rank holds."""
    for index in sorted(layout.layer_indices):
        gradient = gradients[index]
        if gradient is not None and gradient.layout == torch.strided:
            yield index, local(gradient)


def _elements(shards: Shards, index: int, part: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and places of the sampled elements that this rank holds; ``part`` is what it holds, as real numbers."""
    shape = tuple(shards.shapes[index])
    shape += (2,) * (part.ndim - len(shape))
    return shards.held(index, shape, stride_of(shape), SAMPLES)


def _at(numbers: Tensor, values: Tensor, shards: Shards) -> Tensor:
    """Values at their numbers, zeros elsewhere, float64 [SAMPLES]."""
    row = shards.shares.new_zeros(SAMPLES)
    return row.index_copy(0, numbers, values.to(row.device, row.dtype))
