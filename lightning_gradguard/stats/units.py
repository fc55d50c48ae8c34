"""L2 norms of the output units of many tensors.

A unit is one index of a tensor's first dimension, such as a row of a matrix or a filter of a convolution, or a whole
vector or scalar. The numbers of all units lie one after the other in one vector, so that what is done with them takes
a few calls however many tensors there are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.norms import dense, real
from lightning_gradguard.stats.sharding import Shards, local

#: Elements up to which a tensor is copied beside others of its shape, and how many are copied together: on a CPU few
#: enough to stay in its cache, elsewhere so many that a call reads for longer than it takes to start.
_SMALL, _TOGETHER = 2**14, 2**16
_SMALL_ELSEWHERE, _TOGETHER_ELSEWHERE = 2**18, 2**24


class Batch(NamedTuple):
    """Like tensors whose norms take one call.

    Attributes:
        indices: Which of the P tensors; several only if they are small and of one shape.
        rows: Units of each, and from where to where this rank holds them.
    """

    indices: tuple[int, ...]
    rows: tuple[int, int, int]

    def read(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the norms of the units that this rank holds, [n]."""
        chosen: Any = [tensors[i] for i in self.indices]
        if len(chosen) == 1:
            return unit_norms(chosen[0]).flatten()
        count = len(chosen) * (len(chosen[0]) if chosen[0].ndim > 1 else 1)
        stacked = real(torch.stack(chosen)).reshape(count, -1)
        norms: Tensor = torch.linalg.vector_norm(stacked, dim=1, dtype=_wide(stacked.dtype))
        return norms


class Units(NamedTuple):
    """Units of K of the P tensors, U in all.

    Attributes:
        batches: How they are read, in the order of the units.
        counts: Units of each batch that this rank holds.
        vectors: Batches at the start that are of vectors whose norms are known.
        known: int64 [V], the tensors of those batches.
        places: int64 [K], the tensors in the order of the units.
        elsewhere: Bool [P], the other tensors; None if there are none.
        groups: For tensors with like multipliers, which they are and how many units they have together.
        shapes: Shapes of their multipliers, [k, units, 1, ...] or [k].
    """

    batches: tuple[Batch, ...]
    counts: tuple[int, ...]
    vectors: int
    known: Tensor
    places: Tensor
    elsewhere: Tensor | None
    groups: tuple[tuple[tuple[int, ...], int], ...]
    shapes: tuple[tuple[int, ...], ...]

    def read(self, tensors: Sequence[Tensor | None], begin: int, device: torch.device) -> Tensor:
        """Return the norms of the units that this rank holds, [n].

        Args:
            tensors: The P tensors, or this rank's parts of them.
            begin: First batch to read.
            device: Where the norms go.

        Raises:
            RuntimeError: If the tensors have other shapes than those that the units are of.
        """
        batches = self.batches[begin:] if begin else self.batches
        pieces = [batch.read(tensors).to(device) for batch in batches]
        return torch.cat(pieces).view(sum(self.counts[begin:]))

    def whole(self, norms: Tensor, begin: int, shards: Shards) -> Tensor:
        """Return the part of whole squares that this rank's norms are, float64 [N]."""
        pieces = torch.split(norms.to(torch.float64).square(), list(self.counts[begin:]))
        shares = torch.split(
            shards.shares.index_select(0, self.places), [len(batch.indices) for batch in self.batches]
        )
        parts = []
        for batch, piece, share in zip(self.batches[begin:], pieces, shares[begin:], strict=True):
            rows, start, end = batch.rows
            part = piece.view(len(batch.indices), end - start) * share.unsqueeze(1)
            parts.append(torch.nn.functional.pad(part, (start, rows - end)).flatten())
        return torch.cat(parts)

    def by_tensor(self, values: Tensor) -> Tensor:
        """Return the root of the sum of squares over each tensor's units.

        Args:
            values: [N, U], not negative.

        Returns:
            [N, K], in the order of ``places``.
        """
        pieces = []
        for (indices, count), piece in zip(self.groups, self._split(values), strict=True):
            if count > len(indices):
                piece = torch.linalg.vector_norm(piece.view(len(values), len(indices), -1), dim=2)
            elif not count:
                piece = piece.new_zeros(len(values), len(indices))
            pieces.append(piece)
        return torch.cat(pieces, 1)

    def spread(self, values: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return values [U] as P tensors that broadcast to the gradients.

        Args:
            values: A number for each unit.
            others: What stands for the tensors that have no units, P in all.
        """
        spread = list(others)
        for (indices, _), shape, piece in zip(
            self.groups, self.shapes, self._split(values.unsqueeze(0)), strict=True
        ):
            for index, own in zip(indices, piece.view(shape).unbind(), strict=True):
                spread[index] = own
        return tuple(spread)

    def _split(self, values: Tensor) -> Sequence[Tensor]:
        return torch.split(values, [count for _, count in self.groups], 1)


@torch.no_grad()
def measure_units(
    stats: GradStats, included: tuple[bool, ...] | None = None
) -> tuple[Units, Tensor, Tensor] | None:
    """Measure all units of the gradients and weights of a step.

    Collective if the tensors are sharded: every rank has to call it.

    Args:
        stats: The step.
        included: Which of the P tensors count; None for all.

    Returns:
        The units, and the norms of their gradients and weights, float [U] each; None without a tensor that counts and
        has a gradient.
    """
    layout = stats.layout
    device, shards = stats.norms.device, layout.shards
    gradients: Sequence[Tensor | None] = stats.gradients
    weights: Sequence[Tensor | None] = layout.parameters
    if shards is not None:
        gradients = [None if g is None else local(g) for g in gradients]
        weights = [None if g is None else local(p) for g, p in zip(gradients, layout.parameters, strict=True)]
    key = included, tuple([None if g is None else g.is_sparse for g in gradients])
    units: Units | None = layout.batches.get(key)
    parts = None
    if units is not None:
        # Unless a parameter's data was replaced by some of another shape.
        with contextlib.suppress(RuntimeError):
            parts = _read(units, gradients, weights, device)
    if units is None or parts is None:
        units = _units_of(gradients, included, layout)
        if not units.batches:
            return None
        if len(layout.batches) >= 16:
            layout.batches.clear()
        layout.batches[key] = units
        parts = _read(units, gradients, weights, device)
    own, weight = parts
    if shards is not None:
        whole = [units.whole(weight, 0, shards)]
        if own is not None:
            whole.append(units.whole(own, units.vectors, shards))
        sums = [total.sqrt() for total in shards.sum_over_ranks(whole)]
        weight, own = sums[0].to(weight.dtype), None if own is None else sums[1].to(own.dtype)
    vectors = [stats.norms.index_select(0, units.known)] if units.vectors else []
    return units, torch.cat([*vectors, *([] if own is None else [own])]), weight


def unit_norms(tensor: Tensor) -> Tensor:
    """Return the L2 norm of each output unit.

    The result broadcasts to ``tensor``. It is float64 for a float64 tensor, otherwise float32. For a sparse tensor all
    units are returned, most of them 0.

    Source: Brock et al. 2021, arXiv:2102.06171, section 4.1.
    """
    if tensor.layout == torch.sparse_coo and tensor.ndim >= 2:
        sparse = tensor.coalesce()
        values = sparse._values().abs().reshape(sparse._nnz(), math.prod(sparse._values().shape[1:]))
        squares = unit_norms(values).square().reshape(-1)
        units = squares.new_zeros(tensor.shape[0]).index_add_(0, sparse._indices()[0], squares).sqrt()
        return units.reshape([-1] + [1] * (tensor.ndim - 1))
    stored = dense(tensor)
    pairs = real(stored)
    dims = list(range(1, pairs.ndim)) if stored.ndim > 1 else None
    norms: Tensor = torch.linalg.vector_norm(
        pairs, dim=dims, keepdim=dims is not None, dtype=_wide(pairs.dtype)
    )
    return norms.squeeze(-1) if dims is not None and pairs is not stored else norms


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _read(
    units: Units, gradients: Sequence[Tensor | None], weights: Sequence[Tensor | None], device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Return this rank's norms of gradients that are not known, and of weights."""
    own = None
    if units.vectors < len(units.batches):
        own = units.read(gradients, units.vectors, device)
    return own, units.read(weights, 0, device)


def _units_of(gradients: Sequence[Tensor | None], included: tuple[bool, ...] | None, layout: Layout) -> Units:
    """Sort the units of the included tensors that have a gradient."""
    present = [(i, g) for i, g in enumerate(gradients) if g is not None and (included is None or included[i])]
    rows = {i: _rows_of(i, gradient, layout) for i, gradient in present}
    # Known norms first, then by the shape of the multipliers, then by all that a stack needs to be alike.
    kinds: dict[tuple[bool, int, int], dict[tuple[Any, ...], list[int]]] = {}
    for i, gradient in present:
        # The norm of a whole vector is known to float32.
        is_unknown = gradient.ndim >= 2 or _wide(real(dense(gradient)).dtype) != torch.float32
        alike = gradient.shape, gradient.dtype, gradient.device, layout.parameters[i].dtype
        stacks = kinds.setdefault((is_unknown, max(gradient.ndim, 1), rows[i][0]), {})
        stacks.setdefault((_width_of(gradient), rows[i], *alike), []).append(i)
    batches: list[Batch] = []
    known: list[int] = []
    vectors, groups, shapes = 0, [], []
    for (is_unknown, ndim, units), stacks in sorted(kinds.items(), key=itemgetter(0)):
        first = len(batches)
        for (width, span, *_), indices in stacks.items():
            batches += [
                Batch(tuple(indices[begin : begin + width]), span) for begin in range(0, len(indices), width)
            ]
        members = [i for batch in batches[first:] for i in batch.indices]
        if not is_unknown:
            vectors, known = len(batches), known + members
        groups.append((tuple(members), units * len(members)))
        shapes.append((len(members), units, *[1] * (ndim - 1)) if ndim > 1 else (len(members),))
    order = [i for batch in batches for i in batch.indices]
    others = [i not in rows for i in range(len(gradients))]
    device = layout.zeros.device
    return Units(
        batches=tuple(batches),
        counts=tuple(len(batch.indices) * (batch.rows[2] - batch.rows[1]) for batch in batches),
        vectors=vectors,
        known=torch.tensor(known, dtype=torch.long, device=device),
        places=torch.tensor(order, dtype=torch.long, device=device),
        elsewhere=torch.tensor(others, device=device) if any(others) else None,
        groups=tuple(groups),
        shapes=tuple(shapes),
    )


def _rows_of(index: int, part: Tensor, layout: Layout) -> tuple[int, int, int]:
    """Return a tensor's units, and from where to where this rank holds them."""
    if part.ndim < 2:
        return 1, 0, 1
    if layout.shards is None:
        return len(part), 0, len(part)
    return layout.shards.shapes[index][0], *layout.shards.spans[index][0]


def _width_of(tensor: Tensor) -> int:
    """Return how many tensors like this one are copied together."""
    on_cpu, size = tensor.device.type == "cpu", tensor.numel()
    small, together = (_SMALL, _TOGETHER) if on_cpu else (_SMALL_ELSEWHERE, _TOGETHER_ELSEWHERE)
    return together // size if 0 < size <= small and not tensor.is_sparse else 1
