"""What a batch holds: its tensors by where they stand, and those of their rows that are not finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Rows of a tensor that are named.
NAMED_ROWS = 8


#: Names in a mapping that say that something is a target.
_TARGETS = frozenset({"y", "label", "labels", "target", "targets"})


def inputs_and_targets(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """The floating-point inputs and targets of a batch, as far as its form tells which they are; None for each else.

    Of a sequence the first tensor is the input, and the next one of floating point the target. Of a mapping the names
    tell: what is called a target is one, and the only other of floating point the input.

    >>> tokens, prices = torch.ones(2, dtype=torch.long), torch.ones(2)
    >>> [x is not None for x in inputs_and_targets((tokens, prices))]
    [False, True]
    """
    named = [(path, t) for path, t in tensors_of(batch) if t.layout == torch.strided and t.ndim and t.numel()]
    if isinstance(batch, Mapping):
        targets = [t for path, t in named if path.rpartition("['")[2].removesuffix("']").lower() in _TARGETS]
        others = [t for _, t in named if not any(t is target for target in targets)]
    else:
        targets, others = [t for _, t in named[1:] if t.is_floating_point()], [t for _, t in named[:1]]
    found = [t for t in others if t.is_floating_point()]
    known = found[0] if len(found) == 1 and (targets or not isinstance(batch, Mapping)) else None
    target = targets[0] if targets and targets[0].is_floating_point() else None
    return known, target


class BadEntry(NamedTuple):
    """A tensor of the batch that holds NaN or Inf.

    Attributes:
        path: Where it stands, as one would write it: ``batch[0]``, ``batch['image']``.
        values: "NaN", "Inf", or "NaN and Inf".
        rows: Indices along the first dimension, all of them; empty for a scalar.
    """

    path: str
    values: str
    rows: tuple[int, ...]

    def __str__(self) -> str:
        """Such as ``batch[0]`` holds NaN in rows 3, 17."""
        where = ""
        if self.rows:
            more = f" and {len(self.rows) - NAMED_ROWS} more" if len(self.rows) > NAMED_ROWS else ""
            named = ", ".join(str(row) for row in self.rows[:NAMED_ROWS])
            where = f" in row{'' if len(self.rows) == 1 else 's'} {named}{more}"
        return f"`{self.path}` holds {self.values}{where}"


def tensors_of(value: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested mappings, lists, tuples and dataclasses, each with its path.

    >>> [path for path, _ in tensors_of((torch.ones(1), {"y": [torch.ones(1)]}))]
    ['batch[0]', "batch[1]['y'][0]"]
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_of(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from tensors_of(part, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name, None), f"{path}.{field.name}")


def search(batch: Any) -> tuple[BadEntry, ...]:
    """The tensors of a batch that are not finite, each read from the device.

    Args:
        batch: What `tensors_of` understands; anything else counts as finite.
    """
    found = []
    for path, tensor in tensors_of(batch):
        if not is_finite(tensor):
            bad = ~tensor.detach().isfinite()
            rows = bad.reshape(len(tensor), -1).any(1).nonzero().flatten().tolist() if tensor.ndim else []
            found.append(BadEntry(path, kind_of_values(tensor), tuple(rows)))
    return tuple(found)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; True for integers, and for layouts that cannot be looked into."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    try:
        return bool(tensor.detach().isfinite().all())
    except (RuntimeError, NotImplementedError):  # sparse, quantised, without data
        return True


def kind_of_values(*tensors: Tensor) -> str:
    """Which values that are not finite some tensors hold: "NaN", "Inf" or "NaN and Inf"."""
    with torch.no_grad():
        nan = any(bool(t.isnan().any()) for t in tensors)
        infinite = any(bool(t.isinf().any()) for t in tensors)
    return "NaN and Inf" if nan and infinite else "NaN" if nan else "Inf"
