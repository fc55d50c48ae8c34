"""Iterate over, replace and inspect a batch's tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Most rows that a `BadEntry` names when printed.
NAMED_ROWS = 8
#: Ends of the paths, in lower case, of entries that are targets.
_TARGET_ENDS = tuple(f"[{name!r}]" for name in ("y", "label", "labels", "target", "targets"))


def tensors_of(batch: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor in nested containers, with path.

    >>> [path for path, _ in tensors_of((torch.ones(1), {"y": [torch.ones(1)]}))]
    ['batch[0]', "batch[1]['y'][0]"]
    """
    if isinstance(batch, Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, part in batch.items():
            yield from tensors_of(part, f"{path}[{key!r}]")
    elif isinstance(batch, (list, tuple)):
        for index, part in enumerate(batch):
            yield from tensors_of(part, f"{path}[{index}]")
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from tensors_of(getattr(batch, field.name, None), f"{path}.{field.name}")


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """Copy a batch with each tensor replaced.

    Values that `tensors_of` does not yield are shared with the original.

    >>> map_tensors([{"x": torch.tensor(2)}, "text"], lambda tensor: tensor.item())
    [{'x': 2}, 'text']
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        parts = {key: map_tensors(part, function) for key, part in batch.items()}
        if not isinstance(batch, MutableMapping):
            return type(batch)(parts)  # type: ignore[call-arg]
        made = copy.copy(batch)  # keeps a default factory and attributes of the mapping
        made.update(parts)
        return made
    if isinstance(batch, (list, tuple)):
        entries = [map_tensors(part, function) for part in batch]
        return type(batch)(*entries) if hasattr(batch, "_fields") else type(batch)(entries)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        record = copy.copy(batch)
        for field in dataclasses.fields(batch):
            if hasattr(batch, field.name):
                object.__setattr__(record, field.name, map_tensors(getattr(batch, field.name), function))
        return record
    return batch


def inputs_and_targets(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return a batch's floating-point inputs and targets.

    Each is None where the form of the batch does not show it. In a sequence the first tensor is the input, and the next
    one of floating point the target. In a mapping an entry called "y", "label" or "target" is the target, and the only
    other one of floating point the input.

    >>> tokens, prices = torch.ones(2, dtype=torch.long), torch.ones(2)
    >>> [x is not None for x in inputs_and_targets((tokens, prices))]
    [False, True]
    """
    named = [(path, t) for path, t in tensors_of(batch) if t.layout == torch.strided and t.ndim and t.numel()]
    if isinstance(batch, Mapping):
        targets = [t for path, t in named if path.lower().endswith(_TARGET_ENDS)]
        others = [t for _, t in named if not any(t is target for target in targets)]
    else:
        targets, others = [t for _, t in named[1:] if t.is_floating_point()], [t for _, t in named[:1]]
    inputs = [t for t in others if t.is_floating_point()]
    is_known = len(inputs) == 1 and (targets or not isinstance(batch, Mapping))
    target = targets[0] if targets and targets[0].is_floating_point() else None
    return inputs[0] if is_known else None, target


class BadEntry(NamedTuple):
    """Tensor of a batch with NaN or Inf.

    Attributes:
        path: Its place in the batch, as code: ``batch[0]``, ``batch['image']``.
        values: "NaN", "Inf", or "NaN and Inf".
        rows: All indices along the first dimension that hold them; empty for a scalar.
    """

    path: str
    values: str
    rows: tuple[int, ...]

    def __str__(self) -> str:
        where = ""
        if self.rows:
            more = f" and {len(self.rows) - NAMED_ROWS} more" if len(self.rows) > NAMED_ROWS else ""
            named = ", ".join(str(row) for row in self.rows[:NAMED_ROWS])
            where = f" in row{'' if len(self.rows) == 1 else 's'} {named}{more}"
        return f"`{self.path}` holds {self.values}{where}"


def find_nonfinite(batch: Any) -> tuple[BadEntry, ...]:
    """Return the tensors that hold NaN or Inf.

    Reads each tensor from the device.

    Args:
        batch: Anything that `tensors_of` understands; anything else counts as finite.
    """
    found = []
    for path, tensor in tensors_of(batch):
        if not is_finite(tensor):
            bad = ~tensor.detach().isfinite()
            rows = bad.reshape(len(tensor), -1).any(1).nonzero().flatten().tolist() if tensor.ndim else []
            found.append(BadEntry(path, nonfinite_kind(tensor), tuple(rows)))
    return tuple(found)


def is_finite(tensor: Tensor) -> bool:
    """Return True unless NaN or Inf is found."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    try:
        return bool(tensor.detach().isfinite().all())
    except (RuntimeError, NotImplementedError):  # sparse, quantized, without data
        return True


def nonfinite_kind(*tensors: Tensor) -> str:
    """Return "NaN", "Inf" or "NaN and Inf"."""
    with torch.no_grad():
        nan = any(bool(t.isnan().any()) for t in tensors)
        infinite = any(bool(t.isinf().any()) for t in tensors)
    return "NaN and Inf" if nan and infinite else "NaN" if nan else "Inf"
