"""Tensors sharded over ranks: DTensor of FSDP2, tensor parallel.

Says what a rank holds, and sums over all ranks.

The only code that talks to other ranks. What is summed goes through one all-reduce as float64, where the square of a
large float32 norm does not overflow and that of a small one does not vanish. An element that several ranks hold counts
once. All ranks get the same bits, and so come to the same decision.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: For each dimension of a tensor, where a rank's part begins and ends.
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shards:
    """Shards of P tensors, seen from one rank.

    Attributes:
        shapes: Their whole shapes.
        spans: Which part of each this rank holds.
        shares: float64 [P], one over the number of ranks that hold the same elements.
        device: Device on which ranks exchange tensors; with CPU offload not where the tensors are.
    """

    shapes: tuple[torch.Size, ...]
    spans: tuple[Spans, ...]
    shares: Tensor
    device: torch.device
    _entries: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Shards | None:
        """Return the shards of tensors; None without any.

        Raises:
            ValueError: If one is sharded in an unknown way, or its gradient is kept elsewhere.
        """
        for tensor in tensors:
            _check_bears_gradient(tensor)
        sharded = next((t for t in tensors if is_sharded(t)), None)
        if sharded is None:
            return None
        here, kind = tensors[0].device, sharded.device_mesh.device_type  # type: ignore[attr-defined]
        shares = [_share(tensor) for tensor in tensors]
        return cls(
            shapes=tuple(tensor.shape for tensor in tensors),
            spans=tuple(spans_of(tensor) for tensor in tensors),
            shares=torch.tensor(shares, dtype=torch.float64, device=here),
            device=here if here.type == kind else torch.device(kind),
        )

    def sum_over_ranks(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sum each part over all ranks, as float64.

        One all-reduce, which every rank has to call.
        """
        joined = torch.cat([part.detach().reshape(-1).to(torch.float64) for part in parts])
        total = joined.to(self.device)
        torch.distributed.all_reduce(total)
        pieces = torch.split(total.to(joined.device), [part.numel() for part in parts])
        return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]

    def squares(self, norms: Tensor) -> Tensor:
        """Return this rank's part of squares, float64 [P].

        Summed over ranks, they are the squared norms of whole tensors.
        """
        return norms.to(torch.float64).square() * self.shares

    def local_entries(
        self, index: int, shape: tuple[int, ...], stride: int, most: int
    ) -> tuple[Tensor, Tensor]:
        """Return this rank's strided entries, cached.

        Args:
            index: Which of the P tensors.
            shape: Its whole shape, or (rows,), or with a last dimension of 2 for a complex one.
            stride: From one entry to the next, in row-major order.
            most: Largest number of entries, from the first.

        Returns:
            int64 [K] each: the numbers of those K among the entries, and their places in this rank's part.
        """
        key = index, shape
        if key not in self._entries:
            spans = (*self.spans[index], (0, 2))[: len(shape)]
            entries = torch.arange(0, math.prod(shape), stride, device="cpu")[:most]
            inside, places = torch.ones_like(entries, dtype=torch.bool), torch.zeros_like(entries)
            width, inner = 1, 1
            for size, (begin, end) in zip(reversed(shape), reversed(spans), strict=True):
                where = entries // width % max(size, 1)
                inside &= (where >= begin) & (where < end)
                places += (where - begin) * inner
                width, inner = width * size, inner * (end - begin)
            numbers, device = inside.nonzero().reshape(-1), self.shares.device
            self._entries[key] = numbers.to(device), places[numbers].to(device)
        return self._entries[key]

    def check_agreement(self, names: Sequence[str]) -> None:
        """Check that all ranks have the same tensors.

        One all-reduce, which every rank has to call.

        Raises:
            ValueError: On every rank, if some have others, as the stages of a pipeline do.
        """
        mine = zlib.crc32(repr((tuple(names), self.shapes)).encode())
        extremes = torch.tensor([mine, -mine], dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        highest, lowest = extremes.tolist()
        if highest != -lowest:
            raise ValueError(
                "named_parameters must be the same on every rank, got different ones, as the stages of a pipeline "
                "have; use FSDP2 or tensor parallel, pipeline parallel is not supported"
            )


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part, in the same memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def local_units(units: Tensor, tensor: Tensor) -> Tensor:
    """Return the numbers of this rank's rows.

    Args:
        units: A number for each unit of the whole tensor, [rows, 1, ...], or one for all, [].
        tensor: The tensor.
    """
    if not is_sharded(tensor) or units.numel() <= 1:
        return units
    begin, end = spans_of(tensor)[0]
    return units[begin:end]


def align_gradients(parameters: Sequence[Tensor]) -> None:
    """Shard each gradient as its parameter is.

    Otherwise the optimizer does it. Under tensor parallel the gradient of a replicated parameter may still have to be
    summed over ranks.
    """
    for parameter in parameters:
        gradient: Any = parameter.grad
        if is_sharded(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
            parameter.grad = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]


def spans_of(tensor: Tensor) -> Spans:
    """Return this rank's spans of a tensor.

    Raises:
        ValueError: If it is sharded in an unknown way.
    """
    spans = [(0, size) for size in tensor.shape]
    if not is_sharded(tensor):
        return tuple(spans)
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    for axis, dim in _sharded_dims(tensor):
        begin, end = spans[dim]
        chunk = -(-(end - begin) // mesh.size(axis))  # as torch.chunk cuts
        first = min(begin + chunk * mesh.get_local_rank(axis), end)
        spans[dim] = first, min(first + chunk, end)
    if [end - begin for begin, end in spans] != list(local(tensor).shape):
        raise ValueError(
            f"named_parameters must be sharded as FSDP2 and tensor parallel do, got {tensor.placements}"  # type: ignore[attr-defined]
        )
    return tuple(spans)


def world_size() -> int:
    """Return the rank count; 1 without a process group."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def mean_over_ranks(numbers: Tensor) -> Tensor:
    """Average numbers over all ranks, as float32.

    One all-reduce, which every rank has to call. Without a process group the numbers are returned unchanged.
    """
    if not _is_distributed():
        return numbers
    mean = numbers.detach().to(torch.float32).clone()
    torch.distributed.all_reduce(mean)
    return mean / torch.distributed.get_world_size()


def largest_over_ranks(table: Sequence[Sequence[int]], device: torch.device) -> list[list[int]]:
    """Return the largest numbers over all ranks.

    One all-reduce, which every rank has to call.

    Args:
        table: Numbers, of one shape on all ranks.
        device: Device on which ranks exchange tensors.
    """
    largest = torch.tensor(table, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    rows: list[list[int]] = largest.tolist()
    return rows


def _check_bears_gradient(tensor: Tensor) -> None:
    """Raise ValueError if a gradient is kept elsewhere."""
    if getattr(tensor, "_fsdp_flattened", False):
        owner = "FullyShardedDataParallel, which flattens them"
    elif hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping"):
        owner = "DeepSpeed, which keeps their gradients in its own buffers"
    else:
        return
    raise ValueError(
        f"named_parameters must hold their own gradients, got those of {owner}; use fully_shard (FSDP2), in Lightning "
        "ModelParallelStrategy"
    )


def _sharded_dims(tensor: Any) -> list[tuple[int, int]]:
    """Return mesh and tensor dimension, cut by cut."""
    cuts = [(axis, p) for axis, p in enumerate(tensor.placements) if getattr(p, "dim", None) is not None]
    # FSDP2 cuts what tensor parallel has left to it, although its mesh dimension comes first; torch calls it strided.
    plain = [cut for cut in cuts if not hasattr(cut[1], "split_factor")]
    strided = [cut for cut in reversed(cuts) if hasattr(cut[1], "split_factor")]
    return [(axis, placement.dim) for axis, placement in (*plain, *strided)]


def _share(tensor: Any) -> float:
    """Return 1 / (ranks that hold the same elements)."""
    cuts = _sharded_dims(tensor) if is_sharded(tensor) else []
    parts = math.prod(tensor.device_mesh.size(axis) for axis, _ in cuts)
    return float(parts / torch.distributed.get_world_size())


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
