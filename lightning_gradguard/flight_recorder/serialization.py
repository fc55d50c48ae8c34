"""Batches and settings as plain types and tensors, and back: no class is looked up by a name from a file."""

from __future__ import annotations

import dataclasses
import keyword
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

#: Key under which an encoded container says what it is; everything else stands for itself.
IS = "is"
_DICTS = (dict, OrderedDict, defaultdict)
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set}


class Record(dict[Any, Any]):
    """What a mapping that is no dict comes back as: its entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the recorded batch has no entry {name!r}") from None


def encode(value: Any, path: str, left_out: list[str], inside: frozenset[int] = frozenset()) -> Any:
    """A value as plain types and tensors on the CPU that hold no more than they show.

    Understood are tensors, NumPy arrays, numbers, strings, None, lists, tuples, named tuples, sets, mappings,
    dataclasses and packed sequences, however nested.

    Args:
        value: What is encoded; not changed.
        path: What it is called, such as "batch".
        left_out: Takes the name and type of each part that is none of these, and comes back as None.
        inside: Ids of the containers that it lies in; one that holds itself is left out.
    """
    if isinstance(value, Enum):
        return encode(value.value, path, left_out, inside)
    if value is None or type(value) in (bool, int, float, str, torch.dtype, torch.device):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, np.generic):
        return encode(value.item(), path, left_out)
    if isinstance(value, Path):
        return str(value)
    try:
        if isinstance(value, Tensor):
            return _tensor(value)
        if id(value) in inside:
            raise TypeError("it holds itself")
        return _container(value, path, left_out, inside | {id(value)})
    except (TypeError, NotImplementedError, RuntimeError):  # sharded, or without data
        left_out.append(f"{path} ({type(value).__name__})")
        return {IS: "missing"}


def decode(plain: Any, tensor: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    """What `encode` was given: dataclasses and named tuples as look-alikes, other mappings as `Record`.

    Args:
        plain: What `encode` gave.
        tensor: What becomes of each tensor; a copy by default.

    Raises:
        ValueError: If it is nothing that `encode` gives.
    """
    if isinstance(plain, Tensor):
        return tensor(plain)
    if not isinstance(plain, dict):
        return plain
    kind = plain.get(IS)
    parts = [decode(part, tensor) for part in plain.get("of", ())]
    if kind == "missing":
        return None
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](parts)
    if kind == "array":
        return parts[0].cpu().numpy()
    if kind == "bytes":
        return bytes(parts[0].tolist())
    if kind == "packed":
        return PackedSequence(parts[0], parts[1].cpu(), *parts[2:])
    if kind in ("dict", "mapping"):
        keys = [decode(key) for key in plain["keys"]]
        return (dict if kind == "dict" else Record)(zip(keys, parts, strict=True))
    if kind in ("namedtuple", "dataclass"):
        return _look_alike(kind, plain["name"], plain["keys"])(*parts)
    raise ValueError(f"holds a part of unknown kind {kind!r}")


def describe(value: Any) -> Any:
    """Dataclasses, enums and containers of plain values as dicts, lists and strings, to be read by a person."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(describe(key)): describe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [describe(part) for part in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def tensors_in(plain: Any) -> Iterator[Tensor]:
    """All tensors of an encoded value."""
    if isinstance(plain, Tensor):
        yield plain
    elif isinstance(plain, (dict, list, tuple)):
        for part in plain.values() if isinstance(plain, dict) else plain:
            yield from tensors_in(part)


def size_of(plain: Any) -> int:
    """Bytes of an encoded value's tensors on disk; those that share their memory count once."""
    storages = {}
    for tensor in tensors_in(plain):
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
        else:
            storages[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(storages.values())


def _tensor(value: Tensor) -> Tensor:
    if hasattr(value, "to_local"):
        raise TypeError("a shard of a tensor is not the tensor")
    tensor = value.detach().cpu()
    tensor = tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)
    if tensor.layout == torch.strided and not tensor.is_nested:
        own = tensor.numel() * tensor.element_size()
        # A batch may be a view of the whole data set, which would be saved with it.
        tensor = tensor.clone() if tensor.untyped_storage().nbytes() > own else tensor
    return tensor


def _container(value: Any, path: str, left_out: list[str], inside: frozenset[int]) -> Any:
    def all_of(parts: Iterable[tuple[str, Any]]) -> list[Any]:
        return [encode(part, f"{path}{place}", left_out, inside) for place, part in parts]

    if isinstance(value, bytes):
        return {IS: "bytes", "of": [torch.tensor(list(value), dtype=torch.uint8)]}
    if isinstance(value, np.ndarray):
        return {IS: "array", "of": [torch.from_numpy(value.copy())]}
    if isinstance(value, PackedSequence):
        return {IS: "packed", "of": all_of(("", part) for part in value)}
    if isinstance(value, Mapping):
        kind = "dict" if type(value) in _DICTS else "mapping"
        keys = all_of(("", key) for key in value)
        return {IS: kind, "keys": keys, "of": all_of((f"[{key!r}]", part) for key, part in value.items())}
    is_pair = isinstance(value, tuple) and hasattr(value, "_fields")
    if is_pair or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        names = list(value._fields) if is_pair else [field.name for field in dataclasses.fields(value)]
        parts = all_of((f".{name}", getattr(value, name, None)) for name in names)
        kind = "namedtuple" if is_pair else "dataclass"
        return {IS: kind, "name": type(value).__name__, "keys": names, "of": parts}
    for name, sort in _SEQUENCES.items():
        if isinstance(value, sort):
            return {IS: name, "of": all_of((f"[{i}]", part) for i, part in enumerate(value))}
    raise TypeError("it is not plain")


def _look_alike(kind: str, name: str, fields: list[str]) -> Callable[..., Any]:
    """A class made of names alone, none of which may be more than a name."""
    if not all(isinstance(n, str) and n.isidentifier() and not keyword.iskeyword(n) for n in (name, *fields)):
        raise ValueError(f"holds a {kind} with names that are none")
    return namedtuple(name, fields) if kind == "namedtuple" else dataclasses.make_dataclass(name, fields)
