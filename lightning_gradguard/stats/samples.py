"""Samples that are read at some steps only.

Elements of weights, dead rows, and elements lost to half precision.

Each quantity has two forms: of whole tensors, and the part of it that one rank holds if they are sharded, which
`collect` sums over ranks. Both take the same elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.stats.layout import LOW_PRECISION, Layout
from lightning_gradguard.stats.norms import dense, real
from lightning_gradguard.stats.sharding import Shards, local

#: Elements of each tensor, and output rows of each weight, that represent it.
SAMPLES = 64
#: Fewest elements with a gradient of which a share means anything.
FEWEST_FED = 16
#: Elements that are compared with zero at once, few enough to stay in a CPU's cache.
_TOGETHER = 2**16


# Weights before and after a step


def sample(layout: Layout) -> Tensor:
    """Return sampled elements of parameters, float32 [P, SAMPLES].

    A copy, evenly strided, padded with zeros.
    """
    views, places = _sample_views(layout)
    device = layout.numel.device
    if {view.device for view in views} != {device}:
        views = [view.to(device) for view in views]
    picked = torch.cat(views).to(torch.float32)
    if places is None:
        return picked.view(len(views), SAMPLES)
    rows = torch.zeros(len(views) * SAMPLES, device=device, dtype=torch.float32)
    return rows.index_copy_(0, places, picked).view(len(views), SAMPLES)


def local_sample(layout: Layout, shards: Shards) -> Tensor:
    """Return this rank's `sample`, float64 [P, SAMPLES]."""
    rows = []
    for index, parameter in enumerate(layout.parameters):
        part = real(local(parameter).detach())
        numbers, places = _local_elements(shards, index, part)
        rows.append(_at(numbers, part.reshape(-1)[places], shards))
    return torch.stack(rows) * shards.shares[:, None]


def update_ratios(before: Tensor, after: Tensor) -> Tensor:
    """Return applied update ratios ‖Δw‖/‖w‖, float32 [P].

    Works for every optimizer, since it looks at the weights alone. ‖w‖ is the larger of before and after, so that a
    zero-initialised layer may begin to move, and no ratio exceeds 2.

    Args:
        before: `sample` before the step.
        after: `sample` after it.

    Source: CS231n notes, "ratio of weights:updates".
    """
    base = torch.maximum(torch.linalg.vector_norm(before, dim=1), torch.linalg.vector_norm(after, dim=1))
    moved: Tensor = torch.linalg.vector_norm(after - before, dim=1)
    return moved / torch.clamp(base, min=torch.finfo(torch.float32).tiny)


def fed_elements(gradients: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """Return sampled elements with a gradient, bool [P, SAMPLES].

    Those of `sample` that are stored in half precision, where a small update is rounded away, and whose gradient is not
    zero: inputs that are always zero, rows that were not looked up and pruned weights get none.
    """
    rows, where = [], []
    for index, (parameter, gradient) in enumerate(zip(layout.parameters, gradients, strict=True)):
        if parameter.dtype not in LOW_PRECISION or gradient is None or not parameter.numel():
            continue
        if gradient.layout == torch.strided and gradient.stride() == parameter.stride():
            fed = _strided(gradient) != 0
            rows.append(torch.nn.functional.pad(fed, (0, SAMPLES - fed.numel())))
            where.append(index)
    none = layout.nowhere[:, None].expand(-1, SAMPLES)
    if not rows:
        return none
    fed = torch.stack([row.to(none.device) for row in rows])
    return none.index_copy(0, layout.indices(tuple(where)), fed)


def local_fed_elements(gradients: Sequence[Tensor | None], layout: Layout, shards: Shards) -> Tensor:
    """Return this rank's `fed_elements`, float64 [P, SAMPLES]."""
    rows = [shards.shares.new_zeros(SAMPLES) for _ in gradients]
    for index, (parameter, gradient) in enumerate(zip(layout.parameters, gradients, strict=True)):
        if gradient is None or parameter.dtype not in LOW_PRECISION or gradient.layout != torch.strided:
            continue
        part = local(gradient)
        numbers, places = _local_elements(shards, index, part)
        rows[index] = _at(numbers, part.reshape(-1)[places] != 0, shards)
    return torch.stack(rows) * shards.shares[:, None]


def changed_shares(before: Tensor, after: Tensor, fed: Tensor) -> Tensor:
    """Return the share of fed elements that a step changed, float32 [P].

    NaN where too few elements are fed.

    Args:
        before: `sample` before the step.
        after: `sample` after it.
        fed: `fed_elements` at the step.
    """
    count = fed.sum(1, dtype=torch.float32)
    changed = ((before != after) & fed).sum(1, dtype=torch.float32)
    return torch.where(count >= FEWEST_FED, changed / count, torch.nan)


def median_update(updates: Tensor, layout: Layout) -> Tensor:
    """Return the median layer update ratio, float32 [] or NaN."""
    return updates[layout.layers].nanmedian(0).values if layout.layers.numel() else layout.constant(torch.nan)


# Rows without any gradient


def dead_row_share(gradient: Tensor) -> Tensor:
    """Return the share of all-zero rows, float32 []."""
    return (_row_maxima(gradient) == 0).float().mean()


def dead_shares(gradients: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """Return each layer's share of all-zero rows, float32 [P].

    From up to `SAMPLES` evenly strided rows of the gradient, each read whole. 0 for tensors that are no layers.
    """
    where: list[int] = []
    shares: list[Tensor] = []
    for layers in layout.alike:
        some = [i for i in layers if (g := gradients[i]) is not None and g.layout == torch.strided]
        if some:
            maxima = torch.cat(_batched_row_maxima(_rows([gradients[i] for i in some])))
            shares.append((maxima == 0).mean(1, dtype=torch.float32).to(layout.zeros.device))
            where += some
    if not shares:
        return layout.zeros
    return layout.zeros.index_copy(0, layout.indices(tuple(where)), torch.cat(shares))


def local_live_rows(gradients: Sequence[Tensor | None], layout: Layout, shards: Shards) -> Tensor:
    """Return this rank's live rows, float64 [P, SAMPLES].

    Of the sampled rows, to be summed over ranks. A row is live if an element is not zero.
    """
    rows = [shards.shares.new_zeros(SAMPLES) for _ in gradients]
    for index, part in _layers_with_gradient(gradients, layout):
        count = shards.shapes[index][0]
        numbers, places = shards.local_entries(index, (count,), row_stride(count), SAMPLES)
        rows[index] = _at(numbers, _row_maxima(real(part)[places]) != 0, shards)
    return torch.stack(rows)


def dead_shares_from_rows(
    live: Tensor, gradients: Sequence[Tensor | None], layout: Layout, shards: Shards
) -> Tensor:
    """Return `dead_shares`, float32 [P], from summed rows.

    Args:
        live: Sum of `local_live_rows` over ranks, float64 [P, SAMPLES].
        gradients: The P gradients.
        layout: Gives the layers.
        shards: Gives their whole shapes.
    """
    counts = [0.0] * len(gradients)
    for index, _ in _layers_with_gradient(gradients, layout):
        rows = shards.shapes[index][0]
        counts[index] = float(len(range(0, rows, row_stride(rows))[:SAMPLES]))
    read = torch.tensor(counts, device=live.device)
    return torch.where(read > 0, 1 - (live > 0).sum(1) / read.clamp(min=1), 0.0)


def row_stride(rows: int) -> int:
    """Return the stride between sampled rows."""
    return max(1, rows // SAMPLES)


def _rows(gradients: list[Any]) -> list[Tensor]:
    """Return the sampled rows of gradients of one shape."""
    count = len(gradients[0])
    rows = map(real, gradients) if gradients[0].is_complex() else gradients
    if count <= SAMPLES:
        return [*rows]
    stride = row_stride(count)
    return [row[: SAMPLES * stride : stride] for row in rows]


def _row_maxima(gradient: Tensor) -> Tensor:
    """Return the largest magnitude in each row, [rows].

    A CPU takes four times as long to compare each element with zero, and the squares of a norm would underflow.
    """
    rows = gradient.flatten(1)
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def _batched_row_maxima(tensors: list[Tensor]) -> list[Tensor]:
    """Return `_row_maxima` of same-shape tensors, [n, rows] each."""
    if 2 * tensors[0].numel() > _TOGETHER:
        return [_row_maxima(t)[None] for t in tensors]
    # Several at a time, since calls cost more than arithmetic; not all, since memory is bounded.
    width = _TOGETHER // max(1, tensors[0].numel())
    chunks = [torch.stack(tensors[begin : begin + width]) for begin in range(0, len(tensors), width)]
    return [chunk.flatten(2).abs().amax(2) for chunk in chunks]


def _layers_with_gradient(gradients: Sequence[Tensor | None], layout: Layout) -> Iterator[tuple[int, Tensor]]:
    """Yield index and local gradient of layers with one."""
    for index in sorted(layout.layer_indices):
        gradient = gradients[index]
        if gradient is not None and gradient.layout == torch.strided:
            yield index, local(gradient)


# Elements lost to half precision


def lost_shares(gradients: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """Return shares lost to half precision, float32 [P].

    An element is lost if it is zero or subnormal in float16 or bfloat16. By count, from up to `SAMPLES` elements; 0 for
    gradients of higher precision, which lose nothing that matters.
    """
    shares, where = [], []
    if {g.dtype for g in gradients if g is not None}.isdisjoint(LOW_PRECISION):
        return layout.zeros
    for index, gradient in enumerate(gradients):
        if gradient is not None and gradient.dtype in LOW_PRECISION and gradient.numel():
            small = _strided(dense(gradient)).abs() < torch.finfo(gradient.dtype).tiny
            shares.append(small.float().mean().to(layout.zeros.device))
            where.append(index)
    if not shares:
        return layout.zeros
    return layout.zeros.index_copy(0, layout.indices(tuple(where)), torch.stack(shares))


def local_lost_shares(gradients: Sequence[Tensor | None], layout: Layout, shards: Shards) -> Tensor:
    """Return this rank's `lost_shares`, float64 [P]."""
    shares = [shards.shares.new_zeros(())] * len(gradients)
    for index, gradient in enumerate(gradients):
        if gradient is None or gradient.dtype not in LOW_PRECISION or not gradient.numel():
            continue
        part = local(gradient)
        _, places = _local_elements(shards, index, part)
        small = part.reshape(-1)[places].abs() < torch.finfo(part.dtype).tiny
        whole = len(range(0, gradient.numel(), stride_of(gradient.shape))[:SAMPLES])
        shares[index] = small.sum().to(shares[index]) / whole
    return torch.stack(shares) * shards.shares


# Which elements are sampled


def stride_of(shape: Sequence[int]) -> int:
    """Return the stride between sampled elements.

    It shares no factor with the length of a row, or all elements would come from a few columns.
    """
    stride = max(1, math.prod(shape) // SAMPLES)
    width = shape[-1] if shape else 1
    while stride > 1 and math.gcd(stride, width) > 1:
        stride -= 1
    return stride


def _strided(tensor: Tensor) -> Tensor:
    return _flat(tensor)[:: stride_of(tensor.shape)][:SAMPLES]


def _flat(tensor: Tensor) -> Tensor:
    """Return elements in memory order, viewed if possible."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).reshape(-1)


def _sample_views(layout: Layout) -> tuple[list[Tensor], Tensor | None]:
    """Return views of sampled elements, and their places.

    The places are in rows of `SAMPLES`, or None if the views fill all rows. Kept in the layout, and made anew when the
    memory of a parameter moves.
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
            places = torch.tensor(numbers, dtype=torch.long, device=layout.numel.device)
        known = layout.views[SAMPLES] = memory, views, places
    return known[1], known[2]


def _local_elements(shards: Shards, index: int, part: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers and places of this rank's samples.

    Args:
        shards: How the tensors are sharded.
        index: Which of the P tensors.
        part: This rank's part of it, as real numbers.
    """
    shape = tuple(shards.shapes[index])
    shape += (2,) * (part.ndim - len(shape))
    return shards.local_entries(index, shape, stride_of(shape), SAMPLES)


def _at(numbers: Tensor, values: Tensor, shards: Shards) -> Tensor:
    """Return values at their numbers, float64 [SAMPLES]."""
    row = shards.shares.new_zeros(SAMPLES)
    return row.index_copy(0, numbers, values.to(row.device, row.dtype))
