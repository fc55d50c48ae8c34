"""Convert batches to plain types and back.

No class is looked up by a name from a file, so reading one runs no code.
"""

from __future__ import annotations

import dataclasses
import keyword
import sys
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_gradguard.extras import load
from lightning_gradguard.introspection.batch import tensors_of

#: Key that holds an encoded container's kind; any other value stands for itself.
IS = "is"
_DICTS = (dict, OrderedDict, defaultdict)
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set}


class Record(dict[Any, Any]):
    """Decoded mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the recorded batch has no entry {name!r}") from None


def encode(value: Any, path: str, left_out: list[str], inside: frozenset[int] = frozenset()) -> Any:
    """Convert a value to plain types and CPU tensors.

    A tensor is stored without the rest of its storage. Supported are tensors, NumPy arrays, numbers, strings, None,
    lists, tuples, named tuples, sets, mappings, dataclasses and packed sequences, nested to any depth. Anything else
    decodes to None.

    Args:
        value: The value; not changed.
        path: Its name, such as "batch".
        left_out: List that receives the name and type of each part that is not supported.
        inside: Ids of the containers around it; a container that holds itself is left out.
    """
    if isinstance(value, Enum):
        return encode(value.value, path, left_out, inside)
    if value is None or type(value) in (bool, int, float, str, torch.dtype, torch.device):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    numpy = sys.modules.get("numpy")  # without it, no value is one of its
    if numpy is not None and isinstance(value, numpy.generic):
        return encode(value.item(), path, left_out)
    if isinstance(value, Path):
        return str(value)
    try:
        if isinstance(value, Tensor):
            return _encode_tensor(value)
        if id(value) in inside:
            raise TypeError("it holds itself")
        return _encode_container(value, path, left_out, inside | {id(value)})
    except (TypeError, NotImplementedError, RuntimeError):  # not supported, sharded, or without data
        left_out.append(f"{path} ({type(value).__name__})")
        return {IS: "missing"}


def decode(plain: Any, tensor: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    """Convert the result of `encode` back.

    Dataclasses and named tuples come back as classes of the same name and fields, other mappings as `Record`.

    Args:
        plain: The encoded value.
        tensor: Function applied to each tensor; makes a copy by default.

    Raises:
        ValueError: If `encode` cannot have produced the value.
    """
    try:
        return _decode(plain, tensor)
    except Exception as error:
        raise ValueError(f"a recorded value cannot be restored: {type(error).__name__}: {error}") from error


def _decode(plain: Any, tensor: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(plain, Tensor):
        return tensor(plain)
    if not isinstance(plain, dict):
        return plain
    kind = plain.get(IS)
    parts = [_decode(part, tensor) for part in plain.get("of", ())]
    if kind == "missing":
        return None
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](parts)
    if kind == "array":
        load("numpy", "A recorded array")
        return parts[0].cpu().numpy()
    if kind == "bytes":
        return bytes(parts[0].flatten().tolist())  # a single number would be a length
    if kind == "packed":
        return PackedSequence(parts[0], parts[1].cpu(), *parts[2:])
    if kind in ("dict", "mapping"):
        keys = [_decode(key, torch.clone) for key in plain["keys"]]
        return (dict if kind == "dict" else Record)(zip(keys, parts, strict=True))
    if kind in ("namedtuple", "dataclass"):
        return _make_class(kind, plain["name"], plain["keys"])(*parts)
    raise ValueError(f"the record holds a value of unknown kind {kind!r}")


def describe(value: Any) -> Any:
    """Convert a value to readable dicts, lists and strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(describe(key)): describe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [describe(part) for part in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def size_of(plain: Any) -> int:
    """Count a value's bytes, shared storage once."""
    storages = {}
    for _, tensor in tensors_of(plain):
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
        else:
            storages[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(storages.values())


def _encode_tensor(value: Tensor) -> Tensor:
    if hasattr(value, "to_local"):
        raise TypeError("a shard of a tensor is not the tensor")
    tensor = value.detach().cpu()
    tensor = tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)
    if tensor.layout == torch.strided and not tensor.is_nested:
        own = tensor.numel() * tensor.element_size()
        # A batch may be a view of the whole data set, which would be saved with it.
        tensor = tensor.clone() if tensor.untyped_storage().nbytes() > own else tensor
    return tensor


def _encode_container(value: Any, path: str, left_out: list[str], inside: frozenset[int]) -> Any:
    def encode_all(parts: Iterable[tuple[str, Any]]) -> list[Any]:
        return [encode(part, f"{path}{place}", left_out, inside) for place, part in parts]

    if isinstance(value, bytes):
        return {IS: "bytes", "of": [torch.tensor(list(value), dtype=torch.uint8)]}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return {IS: "array", "of": [torch.from_numpy(value.copy())]}
    if isinstance(value, PackedSequence):
        return {IS: "packed", "of": encode_all(("", part) for part in value)}
    if isinstance(value, Mapping):
        kind = "dict" if type(value) in _DICTS else "mapping"
        keys = encode_all(("", key) for key in value)
        return {IS: kind, "keys": keys, "of": encode_all((f"[{key!r}]", part) for key, part in value.items())}
    is_named_tuple = isinstance(value, tuple) and hasattr(value, "_fields")
    if is_named_tuple or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        names = list(value._fields) if is_named_tuple else [field.name for field in dataclasses.fields(value)]
        parts = encode_all((f".{name}", getattr(value, name, None)) for name in names)
        kind = "namedtuple" if is_named_tuple else "dataclass"
        return {IS: kind, "name": type(value).__name__, "keys": names, "of": parts}
    for name, sequence in _SEQUENCES.items():
        if isinstance(value, sequence):
            return {IS: name, "of": encode_all((f"[{i}]", part) for i, part in enumerate(value))}
    raise TypeError("it is not plain")


def _make_class(kind: str, name: str, fields: list[str]) -> Callable[..., Any]:
    """Make a named tuple or dataclass.

    Names that are not identifiers are refused, since they would be run as code.
    """
    if not all(isinstance(n, str) and n.isidentifier() and not keyword.iskeyword(n) for n in (name, *fields)):
        raise ValueError(f"the record holds a {kind} with invalid names")
    return namedtuple(name, fields) if kind == "namedtuple" else dataclasses.make_dataclass(name, fields)
