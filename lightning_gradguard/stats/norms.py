"""L2 norms and other statistics of whole tensors.

Each tensor is read once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import repeat
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.sharding import local

#: Elements up to which a tensor is small: on a CPU one call for its norm costs more than copying it beside others.
_SMALL = 2**11
#: Elements that are copied together, few enough to stay in a CPU's cache.
_TOGETHER = 2**16
#: Elements up to which each such copy has memory of its own. Larger ones are made one after another in the same
#: memory: the system would clear new pages for each, which takes as long as to read the tensors.
_OWN_MEMORY = 2**13


def norms_of(tensors: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """Return L2 norms, float32 [P], 0 for None.

    Collective if the tensors are sharded: every rank has to call it.
    """
    norms = local_norms(tensors, layout)
    if layout.shards is None:
        return norms
    return layout.shards.sum_over_ranks([layout.shards.squares(norms)])[0].sqrt().to(torch.float32)


def weight_norms(layout: Layout) -> Tensor:
    """Return the L2 norms of parameters, float32 [P].

    It reads all weights, so it is refreshed only every few steps. Collective if they are sharded: every rank has to
    call it.
    """
    return norms_of(layout.parameters, layout)


def weight_means(layout: Layout) -> Tensor:
    """Return the means of parameters, float32 [P].

    Collective if the tensors are sharded: every rank has to call it.
    """
    parts = [
        real(local(p).detach()).sum(dtype=torch.float32) / (1 + p.is_complex()) for p in layout.parameters
    ]
    sums = torch.stack([part.to(layout.numel.device) for part in parts])
    if layout.shards is not None:
        sums = layout.shards.sum_over_ranks([sums * layout.shards.shares])[0].to(torch.float32)
    return sums / layout.numel


def dense(tensor: Tensor) -> Tensor:
    """Return a sparse tensor's coalesced values; others unchanged."""
    return tensor.coalesce()._values() if tensor.layout == torch.sparse_coo else tensor


def real(tensor: Tensor) -> Tensor:
    """Return complex tensors as real pairs; others unchanged."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@torch.no_grad()
def local_norms(tensors: Sequence[Tensor | None], layout: Layout) -> Tensor:
    """Return this rank's norms, float32 [P], 0 for None."""
    if layout.shards is not None:
        tensors = [None if t is None else local(t).detach() for t in tensors]
    present: Sequence[Any] = tensors
    indices: tuple[int, ...] | None = None
    if not all(map(is_not, tensors, repeat(None))):
        indices = tuple([i for i, t in enumerate(tensors) if t is not None])
        present = [tensors[i] for i in indices]
    if not present:
        return layout.zeros
    if layout.is_one_kind:
        # The common case: to check each tensor would cost more than its norm. Torch refuses a sparse gradient, and one
        # of another dtype than its parameter.
        with contextlib.suppress(RuntimeError):
            return _norms_of_one_kind(present, indices, layout)
    return _norms_of_any_kind(present, range(len(tensors)) if indices is None else indices, layout)


class Batches(NamedTuple):
    """Batches of tensors, each read by one call.

    Attributes:
        together: For each call, positions of small tensors of one shape.
        alone: Positions of all others, which one foreach call takes.
        places: int64 [n], indices of the tensors whose norms these are, in that order.
    """

    together: list[list[int]]
    alone: list[int]
    places: Tensor


def _norms_of_one_kind(tensors: Sequence[Tensor], indices: tuple[int, ...] | None, layout: Layout) -> Tensor:
    """Return norms of like tensors, float32 [P].

    All have one dtype and device. Small ones are stacked by shape, all others take one foreach call.
    """
    batches = layout.batches.get(indices)
    if batches is None:
        if len(layout.batches) >= 16:
            layout.batches.clear()
        batches = layout.batches[indices] = _batches_of(tensors, indices, layout)
    pieces: list[Tensor] = []
    scratch: Tensor | None = None
    for some in batches.together:
        shape = tensors[some[0]].shape
        size, place = len(some) * shape.numel(), None
        if size > _OWN_MEMORY:
            scratch = tensors[0].new_empty(_TOGETHER) if scratch is None else scratch
            place = scratch[:size].view(len(some), *shape)
        rows = torch.stack([tensors[i] for i in some], out=place).view(len(some), -1)
        pieces.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))
    if batches.alone:
        rest = list(tensors) if not pieces else [tensors[i] for i in batches.alone]
        pieces.append(torch.stack(torch._foreach_norm(rest, 2, dtype=torch.float32)))
    return layout.zeros.index_copy(0, batches.places, torch.cat(pieces))


def _batches_of(tensors: Sequence[Tensor], indices: tuple[int, ...] | None, layout: Layout) -> Batches:
    """Group small tensors by shape, on a CPU."""
    shapes: dict[torch.Size, list[int]] = {}
    alone: list[int] = []
    for i, tensor in enumerate(tensors):
        small = tensor.device.type == "cpu" and 0 < tensor.numel() <= _SMALL
        (shapes.setdefault(tensor.shape, []) if small else alone).append(i)
    together = []
    for shape, some in shapes.items():
        if len(some) == 1:
            alone += some
            continue
        width = max(2, _TOGETHER // shape.numel())
        together += [some[begin : begin + width] for begin in range(0, len(some), width)]
    alone.sort()
    order = [i for some in together for i in some] + alone
    places = order if indices is None else [indices[i] for i in order]
    return Batches(together, alone, torch.tensor(places, dtype=torch.long, device=layout.zeros.device))


def _norms_of_any_kind(tensors: Sequence[Tensor], indices: Sequence[int], layout: Layout) -> Tensor:
    """Return norms of mixed tensors, float32 [P]."""
    buckets: dict[tuple[torch.device, bool], list[tuple[int, Tensor]]] = {}
    for place, stored in zip(indices, tensors, strict=True):
        tensor = real(dense(stored))
        buckets.setdefault((tensor.device, tensor.dtype == torch.float64), []).append((place, tensor))
    pieces: list[Tensor] = []
    for (_, double), bucket in buckets.items():
        group = [tensor for _, tensor in bucket]
        # float64 refuses a narrower dtype argument; half precision would overflow in its own.
        norms = (
            torch._foreach_norm(group, 2) if double else torch._foreach_norm(group, 2, dtype=torch.float32)
        )
        pieces.append(torch.stack(norms).to(layout.zeros.device, torch.float32))
    places = layout.indices(tuple([place for bucket in buckets.values() for place, _ in bucket]))
    return layout.zeros.index_copy(0, places, torch.cat(pieces))
