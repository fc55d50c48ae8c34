"""Histograms of gradients, counted on the device.

They are of log10|g| on one fixed axis, or of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

#: Quantity on the horizontal axis.
Axis = Literal["log10", "value"]
AXES: tuple[Axis, ...] = get_args(Axis)

#: Bin edges in decades (factors of ten), the same for every tensor, step and run, so that pictures compare. Bin k
#: counts ``EDGES[k] <= log10|g| < EDGES[k + 1]``; the first bin also counts everything smaller, the last everything
#: larger.
EDGES: tuple[float, ...] = tuple(-12 + k / 2 for k in range(31))

#: Half the width of an axis of values, in root mean squares. At most 1/16 of the elements can lie beyond it
#: (Chebyshev's inequality), and one large element cannot squeeze all others into one bin.
SPREAD = 4.0

_BINS = len(EDGES) - 1
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
#: Elements that are counted together: 128 tensors of 4,096. More would need several times the memory of what is read.
_TOGETHER = 2**19
_GOLDEN = (math.sqrt(5) - 1) / 2
#: Places are kept, 8 bytes each, for up to so many elements of a tensor.
_KNOWN = 4096


class Counts(NamedTuple):
    """Result of `count` for T tensors, K thresholds.

    Everything but ``limits`` adds up over shards.

    Attributes:
        bins: float32 [T, 30], number of finite elements in each bin.
        nonfinite: float32 [T], number of NaN and infinite elements.
        squares: float32 [T], sum of squares; not finite where an element is not, or where it overflows.
        below: float32 [T, K], number of elements with a magnitude below each threshold, zeros excluded. Exact if all
            elements are read: every narrower dtype compares exactly in float32, and float64 as itself.
        limits: float32 [T], right end of the axis: 3 decades, or half the width of the axis of values.
    """

    bins: Tensor
    nonfinite: Tensor
    squares: Tensor
    below: Tensor
    limits: Tensor


class Samples(NamedTuple):
    """Elements that were read of T tensors.

    Attributes:
        values: [T, n], float32 or float64, with zeros at the end of shorter rows.
        padding: int64 [T], number of those zeros.
        scale: For each tensor, the number of elements that one of those read stands for.
    """

    values: Tensor
    padding: Tensor
    scale: tuple[float, ...]

    def with_differences(self, later: Samples) -> Samples:
        """Return these rows, and then those of what the same elements of later tensors have more."""
        return Samples(
            torch.cat([self.values, later.values - self.values]), self.padding.repeat(2), self.scale * 2
        )


def edges(limit: float) -> tuple[float, ...]:
    """Return 31 even edges from ``-limit`` to ``limit``."""
    return tuple(limit * (2 * k / _BINS - 1) for k in range(_BINS + 1))


def count(
    gradients: Sequence[Tensor | None],
    *,
    max_samples: int | None = 4096,
    axis: Axis = "log10",
    thresholds: Sequence[float] = (),
) -> Counts:
    """Count gradient elements by magnitude or value.

    Gradients span many decades, so a histogram of their values is one peak at zero whether they vanish or explode. On
    the logarithmic axis vanishing gradients move left, exploding ones right, and exact zeros fill the first bin. The
    axis of values is symmetric: `edges` of the largest finite magnitude or of `SPREAD` root mean squares, whichever is
    smaller. Values beyond it count in the outer bins, and zero in the bin right of zero. That is
    ``numpy.histogram(g.clip(-limit, limit), bins=edges(limit))``.

    A tensor with more than ``max_samples`` elements is sampled at an even stride, and its counts are scaled up, so that
    a column always shows a number of elements. For a random sample of n elements no cumulative share is off by more
    than sqrt(ln(2/0.05) / 2n) in 95 of 100 histograms, 2.1 % for 4096 (Dvoretzky-Kiefer-Wolfowitz inequality with the
    constant of Massart 1990, doi:10.1214/aop/1176990746).

    Real and imaginary part of a complex gradient count as two elements, and the zeros that a sparse gradient does not
    store count as zeros. An element within rounding of an edge may fall on either side of it. Counts above 2**24 are
    rounded to float32.

    Args:
        gradients: T gradients of any shape, dtype and layout (of a sharded one, the local shard), or None, which counts
            nothing.
        max_samples: Largest number of elements read of each tensor, at least 1; None reads all, which is exact.
        axis: "log10" or "value".
        thresholds: K magnitudes; infinity counts all finite elements except zeros.

    Returns:
        The counts, on the device of the first gradient.

    Raises:
        ValueError: If ``max_samples`` is below 1, or ``axis`` is neither of the two.

    >>> count([torch.tensor([0.0, 0.02, 0.02, torch.nan])]).bins.nonzero().tolist()
    [[0, 0], [0, 20]]
    """
    counts = count_samples(sample(gradients, max_samples=max_samples), axis=axis, thresholds=thresholds)
    if any(g is not None and g.layout != torch.strided for g in gradients):
        # Zeros that a sparse gradient does not store.
        implied = [
            0.0 if g is None else float(g.numel() * (1 + g.is_complex()) - _stored(g).numel())
            for g in gradients
        ]
        zeros = torch.tensor(implied, device=counts.bins.device)
        counts.bins[:, 0 if axis == "log10" else _BINS // 2] += zeros
    return counts


def sample(tensors: Sequence[Tensor | None], *, max_samples: int | None = 4096) -> Iterator[Samples]:
    """Yield elements of tensors, in groups, always those at the same places.

    Args:
        tensors: As the gradients of `count`.
        max_samples: As in `count`.

    Raises:
        ValueError: If ``max_samples`` is below 1.
    """
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, or None to read all, got {max_samples}")
    device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
    stored = [torch.empty(0, device=device) if t is None else _stored(t) for t in tensors]
    most = max([1, *(s.numel() for s in stored)]) if max_samples is None else max_samples
    size = 1 if max_samples is None else max(1, _TOGETHER // max_samples)
    for i in range(0, max(1, len(stored)), size):
        group = stored[i : i + size]
        lengths = [s.numel() for s in group]
        values, padding = _joined(group, lengths, most, device)
        yield Samples(values, padding, tuple([max(1.0, n / most) for n in lengths]))


def count_samples(
    groups: Iterable[Samples], *, axis: Axis = "log10", thresholds: Sequence[float] = ()
) -> Counts:
    """Count elements that were read; their values are overwritten.

    Args:
        groups: Of `sample`, at least one.
        axis: As in `count`.
        thresholds: As in `count`.

    Raises:
        ValueError: If ``axis`` is neither of the two.
    """
    if axis not in AXES:
        raise ValueError(f"axis must be one of {', '.join(map(repr, AXES))}, got {axis!r}")
    parts = [_scaled(_tally(g.values, g.padding, axis, thresholds), g.scale) for g in groups]
    return Counts(*map(torch.cat, zip(*parts, strict=True)))


def _tally(values: Tensor, padding: Tensor, axis: Axis, thresholds: Sequence[float]) -> Counts:
    """Count rows of values [T, n], overwriting them.

    Args:
        values: Elements, with zeros at the end of shorter rows.
        padding: int64 [T], number of those zeros.
        axis: As in `count`.
        thresholds: As in `count`.
    """
    squares = torch.linalg.vector_norm(values, dim=1).square().float()
    if axis == "value":
        table, limits = _tally_values(values, padding)
        table[:, 1 + _BINS // 2] -= padding
    magnitudes = values.abs_()
    zeros = (magnitudes == 0).sum(1) if thresholds else padding
    # The padding is zero as well, so it is excluded with the zeros.
    below = [(magnitudes < t).sum(1) - zeros for t in thresholds]
    if axis == "log10":
        table, limits = _tally_decades(magnitudes), torch.full_like(squares, EDGES[-1])
        table[:, 1] -= padding
    return Counts(
        table[:, 1:].float(),
        table[:, 0].float(),
        squares,
        torch.stack(below, 1).float() if below else squares.new_zeros(len(squares), 0),
        limits,
    )


def _tally_decades(magnitudes: Tensor) -> Tensor:
    """Count magnitudes by decade, int64 [T, 31].

    The magnitudes [T, n] are overwritten. The first column counts elements that are not finite.
    """
    # In place: touching fresh memory costs more than the arithmetic. A zero goes from -inf to the first bin.
    places = magnitudes.log10_().mul_(2).add_(1 - 2 * EDGES[0]).clamp_(min=1)
    return _frequencies(places.nan_to_num_(nan=0, posinf=0).clamp_(max=_BINS))


def _tally_values(values: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Count values [T, n] on their own axes.

    Return the counts, int64 [T, 31], and the limits of the axes, float32 [T]. The first column counts elements that are
    not finite.
    """
    is_finite = values.isfinite()
    finite = torch.where(is_finite, values, 0)
    number = (is_finite.sum(1) - padding).clamp(min=1)
    peak = torch.linalg.vector_norm(finite, ord=math.inf, dim=1).clamp(min=_SMALLEST)
    # Relative to the peak: squares of the elements themselves may overflow or vanish.
    rms = torch.linalg.vector_norm(finite / peak.unsqueeze(1), dim=1) / number.sqrt()
    limits = (peak * (SPREAD * rms).clamp(max=1)).clamp(_SMALLEST, _LARGEST)
    # Rounded down before anything is added, so the smallest negative number stays left of zero.
    places = (finite / limits.unsqueeze(1)).mul_(_BINS / 2).floor_().add_(_BINS // 2 + 1).clamp_(1, _BINS)
    return _frequencies(places.mul_(is_finite)), limits.float()


def _frequencies(places: Tensor) -> Tensor:
    """Count the bins of each row, int64 [T, 31]."""
    # Integers: float32 stops counting at 2**24.
    table = torch.zeros(len(places), _BINS + 1, dtype=torch.int64, device=places.device)
    return table.scatter_add_(1, places.long(), table.new_ones(1, 1).expand(places.shape))


def _scaled(counts: Counts, scale: Sequence[float]) -> Counts:
    """Scale sampled counts up to whole tensors."""
    column = torch.tensor(scale, device=counts.bins.device)
    row = column.unsqueeze(1)
    bins, nonfinite, squares, below, limits = counts
    return Counts(bins * row, nonfinite * column, squares * column, below * row, limits)


def _stored(gradient: Tensor) -> Tensor:
    """Return the stored elements, real, in memory order."""
    dense = gradient.detach()
    if dense.layout == torch.sparse_coo:
        dense = dense.coalesce().values()
    elif dense.layout != torch.strided:
        dense = dense.to_dense()
    if dense.is_complex():
        dense = torch.view_as_real(dense.resolve_conj())
    if dense.is_contiguous():
        return dense
    # Without this a channels-last gradient would have to be copied to be flattened.
    return dense.permute(sorted(range(dense.ndim), key=dense.stride, reverse=True))


def _joined(
    stored: Sequence[Tensor], numels: Sequence[int], max_samples: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Join samples of T tensors, of which each has so many elements, in one matrix [T, n].

    Return it and the padding of its rows, int64 [T].
    """
    lengths = [min(n, max_samples) for n in numels]
    # float64 stays, since its range would overflow float32. Everything narrower is exact in float32.
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in stored) else torch.float32
    width = max([1, *lengths])
    values = torch.empty(len(stored), width, dtype=dtype, device=device)
    places_of = _known_places if max_samples <= _KNOWN else _places
    for row, length, numel, tensor in zip(values.unbind(), lengths, numels, stored, strict=True):
        flat = tensor.reshape(-1)
        if length == numel:
            row[:length].copy_(flat)
            row[length:].zero_()
            continue
        places = places_of(length, numel, flat.device)
        if (flat.dtype, flat.device) == (dtype, device):
            torch.index_select(flat, 0, places, out=row)
        else:
            row.copy_(flat.index_select(0, places))
    padding = torch.tensor([width - n for n in lengths], dtype=torch.int64, device=device)
    return values, padding


def _places(number: int, numel: int, device: torch.device) -> Tensor:
    """Return distinct places of elements, int64 [number].

    The stride is the golden section of the number of elements, modulo that number. It spreads any number of places
    evenly, and since it shares no factor with the number, it never falls in step with the rows of a weight.
    """
    stride = round(_GOLDEN * numel)
    while math.gcd(stride, numel) > 1:
        stride += 1
    return torch.arange(number, device=device).mul_(stride).remainder_(numel)


# To work them out takes half as long as to read the elements.
_known_places = lru_cache(maxsize=256)(_places)
