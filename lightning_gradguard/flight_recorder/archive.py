"""Load a file that `torch.save` wrote, within the memory that its size allows, and without running code from it."""

from __future__ import annotations

import itertools
import os
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor, nn

#: Times its own size that a file may unpack to, and what any file may: values are shared in a file, such as a mask that
#: is expanded over the batch.
EXPANSION, FREE_BYTES = 16, 64_000_000
#: Containers inside containers, at most. `serialization.encode` gets no further.
DEPTH = 500
#: Bytes that a value takes at least, as an entry of a container.
_ENTRY = 8
_END = object()
#: The three records at the end of an archive with 64-bit sizes, of which small ones have only the last: what and where
#: the list of members is, where that record is, and the same in 32 bits.
_ENDS = struct.Struct("<4sQ2H2L4Q4sLQL4s4H2LH")
_PLAIN = (type(None), bool, int, float, torch.dtype, torch.device)


class ArchiveError(ValueError):
    """Raised when a file cannot be loaded, or must not be."""


def load(file: IO[bytes]) -> Any:
    """Load plain containers and CPU tensors.

    Nothing is unpacked before its declared size is known to be within bounds.

    Args:
        file: An open file, at its beginning.

    Raises:
        ArchiveError: If the file is damaged, or holds something else or too much.
        OSError: If it cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        _check_members(file, size)
        file.seek(0)
        checked = torch.sparse.check_sparse_tensor_invariants()  # type: ignore[no-untyped-call]
        with warnings.catch_warnings(), checked:
            warnings.simplefilter("ignore")  # of other protocols and layouts, which is no news to the reader
            value = torch.load(file, map_location="cpu", weights_only=True)
        _check_contents(value, max(EXPANSION * size, FREE_BYTES))
    except (ArchiveError, OSError):
        raise
    except Exception as error:  # of many classes, with long advice
        raise ArchiveError("it is damaged") from error
    return value


def _check_members(file: IO[bytes], size: int) -> None:
    """Check names and sizes of an archive before anything is unpacked."""
    if file.read(4) != b"PK\x03\x04":
        raise ArchiveError("it is no archive")  # torch would take it for a file of its older format
    with zipfile.ZipFile(file) as archive:
        if archive.start_dir != _begin_of_directory(file, size):
            raise ArchiveError("it has two lists of its members")
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ArchiveError("its members are compressed, and torch compresses none")
        if sum(member.file_size for member in members) > size:
            raise ArchiveError("its members are larger than the file")
        for member in members:
            if member.filename.lower().endswith("data.pkl"):  # torch reads it in any case
                del member.CRC  # torch can be told to write none
                _check_names(archive.read(member))


def _begin_of_directory(file: IO[bytes], size: int) -> int:
    """Return the place of the list of members as torch looks it up, by what the end of the file says.

    `zipfile` takes the list that ends there. One that it does not see could say anything.
    """
    file.seek(-min(size, _ENDS.size), os.SEEK_END)
    ends = _ENDS.unpack(file.read().rjust(_ENDS.size, b"\0"))
    (kind, *_, wide), (locator, _, place, _), (end, *_, narrow, comment) = ends[:10], ends[10:14], ends[14:]
    if end != b"PK\x05\x06" or comment:
        raise ArchiveError("its end is not that of an archive that torch writes")
    if locator != b"PK\x06\x07":
        return int(narrow)
    return int(wide) if kind == b"PK\x06\x06" and place == size - _ENDS.size else -1


def _check_names(pickled: bytes) -> None:
    """Refuse names other than torch's own.

    torch allows some more, such as ``bytearray``, which fills as much memory as the file asks for.
    """
    for operation, argument, _ in pickletools.genops(pickled):
        is_name = "GLOBAL" in operation.name or operation.name == "INST"
        if is_name and not str(argument).startswith(("torch ", "torch.", "collections OrderedDict")):
            raise ArchiveError("it names things that are not torch's")


def _check_contents(value: Any, most: int) -> None:
    """Check types, depth, and the size of what is shared.

    A part that occurs several times counts each time, since it becomes as many when it is used.
    """
    left = most
    inside: list[Iterator[Any]] = [iter((value,))]
    while inside:
        part: Any = next(inside[-1], _END)
        if part is _END:
            inside.pop()
        elif isinstance(part, Tensor):
            left -= _bytes_of(part)
        elif type(part) is str:
            left -= len(part)
        elif type(part) is dict:
            left -= 2 * _ENTRY * len(part)
            inside.append(itertools.chain(part.keys(), part.values()))
        elif type(part) in (list, tuple):
            left -= _ENTRY * len(part)
            inside.append(iter(part))
        elif type(part) not in _PLAIN:
            raise ArchiveError(f"it holds a {type(part).__name__}")
        if left < 0:
            raise ArchiveError("it unpacks to much more than its size")
        if len(inside) > DEPTH:
            raise ArchiveError("its parts are nested too deeply")


def _bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor when it is copied.

    Raises:
        RuntimeError: If it is a nested one that reaches beyond its numbers.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        raise ArchiveError(f"it holds a {type(tensor).__name__} on {tensor.device.type}")
    if tensor.is_nested:
        return sum(map(_bytes_of, tensor.unbind()))
    if tensor.layout == torch.strided:
        return tensor.numel() * tensor.element_size()
    if tensor.layout == torch.sparse_coo:
        return _bytes_of(tensor._indices()) + _bytes_of(tensor._values())
    return sum(map(_bytes_of, _compressed(tensor)))


def _compressed(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of a tensor in a compressed sparse layout."""
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
