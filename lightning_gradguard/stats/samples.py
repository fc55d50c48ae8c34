"""What is read only now and then, and only in part: samples of weights and of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_gradguard.stats.layout import LOW_PRECISION, Layout
from lightning_gradguard.stats.norms import dense, real
from lightning_gradguard.stats.sharding import Shards, local

#: Elements of each tensor, and output rows of each weight, that stand for it.
SAMPLES = 64
#: Elements that are compared with zero at once: so few that they stay in a CPU's cache.
_TOGETHER = 2**16


def sample(layout: Layout) -> Tensor:
    """A copy of up to `SAMPLES` evenly strided elements of each parameter, float32 [P, SAMPLES], zeros behind."""
    views, places = _views(layout)
    device = layout.numel.device
    if any(view.device != device for view in views):
        views = [view.to(device) for view in views]
    picked = torch.cat(views).to(torch.float32)
    if places is None:
        return picked.view(len(views), SAMPLES)
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


def median_update(updates: Tensor, layout: Layout) -> Tensor:
    """Median of the update ratios of the layers, float32 []; NaN where none is known."""
    return updates[layout.layers].nanmedian(0).values if layout.layers.numel() else layout.constant(torch.nan)


def dead_shares(gradients: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """Share of a layer's output rows whose gradient is exactly zero, float32 [P]; 0 for other tensors.

    From up to `SAMPLES` evenly strided rows, each read whole.
    """
    where: list[int] = []
    shares: list[Tensor] = []
    for layers in layout.alike:
        some = {i: _rows(g) for i in layers if (g := gradients[i]) is not None and g.layout == torch.strided}
        if some:
            largest = torch.cat(_largest_of_rows(list(some.values())))
            shares.append((largest == 0).mean(1, dtype=torch.float32).to(layout.zeros.device))
            where += some
    return (
        layout.zeros.index_copy(0, layout.indices(tuple(where)), torch.cat(shares))
        if shares
        else layout.zeros
    )


def _largest_of_rows(tensors: list[Tensor]) -> list[Tensor]:
    """Largest magnitude in each row of tensors of one shape, [n, rows] each.

    To compare each element with zero would take a CPU four times as long, and a norm's squares would underflow.
    """
    if 2 * tensors[0].numel() > _TOGETHER:
        return [t.flatten(1).abs().amax(1)[None] for t in tensors]
    # Several at a time, since calls cost more than arithmetic; not all, since memory is bounded.
    width = _TOGETHER // max(1, tensors[0].numel())
    chunks = [torch.stack(tensors[begin : begin + width]) for begin in range(0, len(tensors), width)]
    return [chunk.flatten(2).abs().amax(2) for chunk in chunks]


def lost_shares(gradients: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """Share of a half-precision gradient's elements that are zero or subnormal in its dtype, float32 [P].

    By count, from up to `SAMPLES` elements; 0 for gradients of higher precision, which lose nothing that matters.
    """
    shares, where = [], []
    for index, gradient in enumerate(gradients):
        if gradient is not None and gradient.dtype in LOW_PRECISION and gradient.numel():
            small = _strided(dense(gradient)).abs() < torch.finfo(gradient.dtype).tiny
            shares.append(small.float().mean().to(layout.zeros.device))
            where.append(index)
    if not shares:
        return layout.zeros
    return layout.zeros.index_copy(0, layout.indices(tuple(where)), torch.stack(shares))


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


def _rows(gradient: Tensor) -> Tensor:
    """Up to `SAMPLES` rows."""
    rows = real(gradient)
    return rows if len(rows) <= SAMPLES else rows[:: row_stride(len(rows))][:SAMPLES]


def _views(layout: Layout) -> tuple[list[Tensor], Tensor | None]:
    """Views of the sampled elements of each parameter, and their places in rows unless they fill them.

    Made anew when memory moves.
    """
    try:
        memory = tuple([p.data_ptr() for p in layout.parameters])
    except RuntimeError:  # a fake tensor has none
        memory = ()
    known = layout.views.get(SAMPLES)
    if known is None or known[0] != memory or not memory:
        views = [_strided(real(p.detach())) for p in layout.parameters]
        places = None
        if any(view.numel() < SAMPLES for view in views):
            spans = [range(i * SAMPLES, i * SAMPLES + view.numel()) for i, view in enumerate(views)]
            numbers = [place for span in spans for place in span]
            places = torch.tensor(numbers, dtype=torch.long).to(layout.numel.device)
        known = layout.views[SAMPLES] = memory, views, places
    return known[1], known[2]


def _strided(tensor: Tensor) -> Tensor:
    """Up to `SAMPLES` elements."""
    return _flat(tensor)[:: stride_of(tensor.shape)][:SAMPLES]


def _flat(tensor: Tensor) -> Tensor:
    """All elements in the order of memory: a view of a tensor that is laid out otherwise too, such as channels last."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).reshape(-1)


def local_sample(layout: Layout, shards: Shards) -> Tensor:
    """What this rank holds of `samples.sample`, float64 [P, SAMPLES]; summed over ranks it is the sample."""
    rows = []
    for index, parameter in enumerate(layout.parameters):
        part = real(local(parameter).detach())
        numbers, places = _elements(shards, index, part)
        rows.append(_at(numbers, part.reshape(-1)[places], shards))
    return torch.stack(rows) * shards.shares[:, None]


def local_live_rows(gradients: Sequence[Tensor | None], layout: Layout, shards: Shards) -> Tensor:
    """Which sampled rows have an element other than zero in this rank's part, float64 [P, SAMPLES]."""
    rows = [shards.shares.new_zeros(SAMPLES) for _ in gradients]
    for index, part in _layers(gradients, layout):
        count = shards.shapes[index][0]
        numbers, places = shards.local_entries(index, (count,), row_stride(count), SAMPLES)
        rows[index] = _at(numbers, (real(part)[places].flatten(1) != 0).any(1), shards)
    return torch.stack(rows)


def dead_shares_from_rows(
    live: Tensor, gradients: Sequence[Tensor | None], layout: Layout, shards: Shards
) -> Tensor:
    """`samples.dead_shares` from the sum of `local_live_rows` over ranks, float32 [P]."""
    counts = [0.0] * len(gradients)
    for index, _ in _layers(gradients, layout):
        rows = shards.shapes[index][0]
        counts[index] = float(len(range(0, rows, row_stride(rows))[:SAMPLES]))
    read = torch.tensor(counts, device=live.device)
    return torch.where(read > 0, 1 - (live > 0).sum(1) / read.clamp(min=1), 0.0)


def local_lost_shares(gradients: Sequence[Tensor | None], layout: Layout, shards: Shards) -> Tensor:
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
    return shards.local_entries(index, shape, stride_of(shape), SAMPLES)


def _at(numbers: Tensor, values: Tensor, shards: Shards) -> Tensor:
    """Values at their numbers, zeros elsewhere, float64 [SAMPLES]."""
    row = shards.shares.new_zeros(SAMPLES)
    return row.index_copy(0, numbers, values.to(row.device, row.dtype))
