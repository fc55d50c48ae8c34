"""Iterate over, replace and inspect a batch's tensors."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Most rows that a `BadEntry` names when printed.
NAMED_ROWS = 8
#: Names of entries that are targets, in lower case.
_TARGETS = ("y", "label", "labels", "target", "targets")
#: Ends of the paths of such entries.
_TARGET_ENDS = tuple(end for name in _TARGETS for end in (f"[{name!r}]", f".{name}"))
#: Objects inside objects that are looked into, at most: a batch is flat, and anything deeper is no batch.
_DEEPEST = 5
#: Entries of a container in an object above which it is not looked into.
_LARGEST = 10_000
#: Packages whose objects hold no tensors of a batch, or hold those of the training.
_NOT_BATCHES = frozenset({
    "builtins", "torch", "numpy", "pandas", "polars",
    "lightning", "pytorch_lightning", "lightning_fabric", "lightning_gradguard",
})  # fmt: skip


def tensors_of(batch: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor in nested containers, with path.

    Containers are mappings, sequences, dataclasses, and objects that hold tensors in their attributes, such as a batch
    of graphs. Modules and optimizers are not looked into.

    >>> [path for path, _ in tensors_of((torch.ones(1), {"y": [torch.ones(1)]}))]
    ['batch[0]', "batch[1]['y'][0]"]
    """
    return _walk(batch, path, frozenset())


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """Copy a batch with each tensor replaced.

    Values that `tensors_of` does not yield are shared with the original.

    >>> map_tensors([{"x": torch.tensor(2)}, "text"], lambda tensor: tensor.item())
    [{'x': 2}, 'text']
    """
    return _map(batch, function, {})


def _walk(batch: Any, path: str, above: frozenset[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a value.

    Args:
        batch: The value.
        path: Its place.
        above: Ids of the objects that hold it.
    """
    if isinstance(batch, Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, part in batch.items():
            yield from _walk(part, f"{path}[{key!r}]", above)
    elif isinstance(batch, (list, tuple)):
        names = getattr(batch, "_fields", None) or ()
        for index, part in enumerate(batch):
            yield from _walk(part, f"{path}.{names[index]}" if names else f"{path}[{index}]", above)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _walk(getattr(batch, field.name, None), f"{path}.{field.name}", above)
    elif _is_record(batch) and id(batch) not in above and len(above) < _DEEPEST:
        for name, part in _parts(batch).items():
            place = f"{path}.{name}" if _is_attribute(batch, name, part) else f"{path}[{name!r}]"
            yield from _walk(part, place, above | {id(batch)})


def _map(batch: Any, function: Callable[[Tensor], Any], above: dict[int, Any]) -> Any:
    """Copy a value; ``above`` holds the copies of the objects that hold it, by the id of each."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        parts = {key: _map(part, function, above) for key, part in batch.items()}
        if not isinstance(batch, MutableMapping):
            return type(batch)(parts)  # type: ignore[call-arg]
        made = copy.copy(batch)  # keeps a default factory and attributes of the mapping
        made.update(parts)
        return made
    if isinstance(batch, (list, tuple)):
        entries = [_map(part, function, above) for part in batch]
        return type(batch)(*entries) if hasattr(batch, "_fields") else type(batch)(entries)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        record = copy.copy(batch)
        for field in dataclasses.fields(batch):
            if hasattr(batch, field.name):
                object.__setattr__(record, field.name, _map(getattr(batch, field.name), function, above))
        return record
    if id(batch) in above:
        return above[id(batch)]
    return _map_record(batch, function, above) if _is_record(batch) and len(above) < _DEEPEST else batch


def _map_record(batch: Any, function: Callable[[Tensor], Any], above: dict[int, Any]) -> Any:
    """Copy an object that holds tensors; any other is shared."""
    if next(_walk(batch, "", frozenset(above)), None) is None:
        return batch
    record = copy.copy(batch)
    above = {**above, id(batch): record}
    for name, part in _parts(batch).items():
        new = _map(part, function, above)
        if new is part:
            continue
        if not hasattr(batch, str(name)):
            record[name] = new
        elif name in getattr(record, "__dict__", {}) or name in _slots(record):
            object.__setattr__(record, name, new)
        else:  # an attribute that the object keeps in a store of its own
            setattr(record, name, new)
    return record


def _is_record(value: Any) -> bool:
    """Return True for an object that may hold tensors of a batch."""
    kind = type(value)
    if isinstance(value, (type, types.FunctionType, types.MethodType, types.ModuleType)):
        return False
    if isinstance(value, (nn.Module, torch.optim.Optimizer)):
        return False
    package = kind.__module__.partition(".")[0]
    return package not in _NOT_BATCHES or kind.__module__.startswith("torch.distributions")


def _parts(record: Any) -> dict[Any, Any]:
    """Return what an object holds, by name.

    An object that tells its entries itself, such as a graph, is asked; else its attributes are read.
    """
    try:
        told = record.to_dict() if callable(getattr(record, "to_dict", None)) else None
        if told is None and hasattr(type(record), "keys") and hasattr(type(record), "__getitem__"):
            keys = record.keys() if callable(record.keys) else record.keys
            told = {key: record[key] for key in keys}
        if isinstance(told, Mapping) and next(_walk(told, "", frozenset({id(record)})), None) is not None:
            return dict(told)
    except Exception:  # it means something else by these names
        pass
    own = {k: v for k, v in getattr(record, "__dict__", {}).items() if not _is_large(v)}
    return own | {name: getattr(record, name) for name in _slots(record) if hasattr(record, name)}


def _is_large(value: Any) -> bool:
    """Return True for a container that is no part of a batch, such as the samples of a whole data set."""
    return isinstance(value, (Mapping, list, tuple)) and len(value) > _LARGEST


def _is_attribute(record: Any, name: Any, value: Any) -> bool:
    try:
        return isinstance(name, str) and name.isidentifier() and getattr(record, name, None) is value
    except Exception:  # a property that raises
        return False


def _slots(record: Any) -> set[str]:
    declared = [getattr(kind, "__slots__", ()) for kind in type(record).__mro__]
    names = {name for slots in declared for name in ((slots,) if isinstance(slots, str) else slots)}
    return names - {"__dict__", "__weakref__"}


def inputs_and_targets(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return a batch's floating-point inputs and targets.

    Each is None where the form of the batch does not show it. In a sequence the first tensor is the input, and the next
    one of floating point the target; if the first entry holds several tensors, the only one of floating point among
    them is the input, and the first one after that entry the target. Where entries have names, one called "y", "label"
    or "target" is the target, and the only other one of floating point the input.

    >>> tokens, prices = torch.ones(2, dtype=torch.long), torch.ones(2)
    >>> [x is not None for x in inputs_and_targets((tokens, prices))]
    [False, True]
    """
    named = [(path, t) for path, t in tensors_of(batch) if t.layout == torch.strided and t.ndim and t.numel()]
    has_parts = type(batch) in (list, tuple) and len(batch) > 1 and not isinstance(batch[0], Tensor)
    if has_parts and not _are_samples(batch):
        return _of_nested(batch)
    targets = [t for path, t in named if path.lower().endswith(_TARGET_ENDS)]
    is_sequence = isinstance(batch, (Tensor, list, tuple)) or dataclasses.is_dataclass(batch)
    by_name = not is_sequence or bool(targets and type(batch) not in (list, tuple))
    if by_name:
        others = [t for _, t in named if not any(t is target for target in targets)]
    else:
        targets, others = [t for _, t in named[1:] if t.is_floating_point()], [t for _, t in named[:1]]
    inputs = [t for t in others if t.is_floating_point()]
    is_known = len(inputs) == 1 and (targets or not by_name)
    target = targets[0] if targets and targets[0].is_floating_point() else None
    return inputs[0] if is_known else None, target


def _are_samples(batch: Sequence[Any]) -> bool:
    """Return True for a sequence of samples with the same names each."""
    return isinstance(batch[0], Mapping) and all(
        isinstance(own, Mapping) and own.keys() == batch[0].keys() for own in batch
    )


def _of_nested(batch: Sequence[Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return inputs and targets of a sequence whose first entry holds the inputs."""
    parts = [
        [t for _, t in tensors_of(part) if t.layout == torch.strided and t.ndim and t.numel()]
        for part in (batch[0], batch[1:])
    ]
    inputs, targets = ([t for t in part if t.is_floating_point()] for part in parts)
    return inputs[0] if len(inputs) == 1 else None, targets[0] if targets else None


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
