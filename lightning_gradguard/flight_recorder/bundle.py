"""Write and read bundles, the files of flight records.

A bundle is written whole or not at all, limited in size, and read without running code from it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import stat
from pathlib import Path
from typing import IO, Any, cast

import torch

from lightning_gradguard.flight_recorder.archive import ArchiveError, load
from lightning_gradguard.flight_recorder.bundle_form import FORM
from lightning_gradguard.flight_recorder.serialization import size_of
from lightning_gradguard.forms import FormError, check_form, short
from lightning_gradguard.printing import one_line

FORMAT = "gradguard bundle"
#: Version of the format; raise it when older bundles can no longer be read.
VERSION = 1
#: Missing ranks that are named.
NAMED_RANKS = 8

_NAME = re.compile(r"step-(\d+)(?:-rank(\d+))?\.pt")


class ReplayError(ValueError):
    """Raised when a flight record is unusable.

    Args:
        message: What is wrong and what to do. It is put on one line.
    """

    def __init__(self, message: str) -> None:
        # Parts of it come from the file or from torch, and may have many lines or control characters.
        super().__init__(one_line(message))


def file_name(step: int, rank: int, world_size: int) -> str:
    """Return the file name of a bundle.

    >>> file_name(7, 1, 4), file_name(7, 0, 1)
    ('step-00000007-rank1.pt', 'step-00000007.pt')
    """
    return f"step-{step:08d}" + (f"-rank{rank}" if world_size > 1 else "") + ".pt"


def limit_size(bundle: dict[str, Any], max_bytes: int) -> None:
    """Remove weights, then the batch, from a large bundle.

    Args:
        bundle: Changed in place; what is removed is listed under ``left_out``.
        max_bytes: Largest size of the bundle, bytes.
    """
    for key, label, empty in (("weights", "weights", None), ("parts", "batch", [])):
        size = size_of(bundle)
        if size > max_bytes and bundle[key]:
            bundle["left_out"].append(
                f"{label} ({megabytes(size_of(bundle[key]))}: the record would have {megabytes(size)}, "
                f"more than max_bytes={max_bytes:,})"
            )
            bundle[key] = empty


def write_bundle(bundle: dict[str, Any], folder: Path, keep: int) -> Path:
    """Write a bundle and delete the oldest ones.

    Args:
        bundle: Plain types and tensors.
        folder: Folder of the bundles; created if it does not exist.
        keep: Number of newest bundles of this rank to keep.

    Returns:
        The bundle's file.

    Raises:
        OSError: If the bundle cannot be written, such as on a full disk; no part of it is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size, free = size_of(bundle), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"the record needs {megabytes(size)}, and the disk has {megabytes(free)} free")
    target = folder / file_name(bundle["step"], bundle["rank"], bundle["world_size"])
    partial = folder / f".{target.name}.{os.getpid()}.partial"
    try:
        with partial.open("wb") as file:
            _save({"format": FORMAT, "version": VERSION, **bundle}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    _delete_oldest(folder, bundle["rank"] if bundle["world_size"] > 1 else None, keep, target)
    return target


def read_bundle(path: str | Path) -> dict[str, Any]:
    """Read a bundle onto the CPU without running code.

    What it unpacks to is bounded by its size.

    Args:
        path: The bundle's file.

    Returns:
        The bundle, which has the form that `bundle_form.FORM` states.

    Raises:
        ReplayError: If the file does not exist, is damaged, has another version, or is no bundle.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ReplayError(_advice_for_folder(path))
        if not stat.S_ISREG(mode):  # a pipe would be waited for
            raise ReplayError(f"{path} is not a regular file")
        with path.open("rb") as file:
            bundle = load(file)
    except FileNotFoundError:
        raise ReplayError(f"{path} does not exist") from None
    except OSError as error:
        raise ReplayError(f"{path} cannot be read: {error.strerror or error}") from None
    except ArchiveError as error:
        raise ReplayError(f"{path} is damaged, or is not a flight record of GradGuard: {error}") from None
    if not isinstance(bundle, dict) or bundle.get("format") != FORMAT:
        raise ReplayError(f"{path} is not a flight record of GradGuard")
    version = bundle.get("version")
    if type(version) is not int or version != VERSION:
        raise ReplayError(
            f"{path} has format version {short(version)}, and this gradguard reads version {VERSION}; "
            "replay it with the version of lightning-gradguard that wrote it"
        )
    try:
        check_form(bundle, FORM, "the record")
    except FormError as error:
        raise ReplayError(f"{path} is damaged: {error}") from None
    if not 0 <= bundle["rank"] < bundle["world_size"]:
        of = f"rank {bundle['rank']} of {bundle['world_size']}"
        raise ReplayError(f"{path} is damaged: it is of {of}, and ranks are counted from 0")
    return bundle


def _advice_for_folder(path: Path) -> str:
    inside = sorted(p.name for p in path.iterdir() if _NAME.fullmatch(p.name))
    if not inside:
        return (
            f"{path} is a folder that holds no flight record; name the file, such as {file_name(150, 0, 1)}"
        )
    return f"{path} is a folder; name a flight record in it, such as {path / inside[-1]}"


def read_all_ranks(path: str | Path) -> list[dict[str, Any]]:
    """Read the bundles of all processes.

    Ranks whose bundle is missing or cannot be read are listed in the notes of the bundle that was named.

    Args:
        path: The bundle of any rank.

    Returns:
        The bundles, ordered by rank.

    Raises:
        ReplayError: If the named bundle cannot be used.
    """
    path, bundle = Path(path), read_bundle(path)
    step, world_size = bundle["step"], bundle["world_size"]
    found, names = {bundle["rank"]: bundle}, []
    # By the files that are there: the number of ranks is only what the file says.
    with contextlib.suppress(OSError):
        names = sorted(p.name for p in path.parent.iterdir())
    for name in names:
        match = _NAME.fullmatch(name)
        rank = int(match[2]) if match and match[2] else -1
        if rank not in range(world_size) or rank in found or name != file_name(step, rank, world_size):
            continue
        try:
            other = read_bundle(path.parent / name)
        except ReplayError:
            continue
        if (other["run"], other["rank"], other["world_size"]) == (bundle["run"], rank, world_size):
            found[rank] = other
    missing = itertools.islice((rank for rank in range(world_size) if rank not in found), NAMED_RANKS)
    if named := [str(rank) for rank in missing]:
        more = world_size - len(found) - len(named)
        bundle["notes"].append(
            f"Not replayed, since its record is not in this folder: rank {', '.join(named)}"
            + (f" and {more} more." if more else ".")
        )
    return [found[rank] for rank in sorted(found)]


def megabytes(size: float) -> str:
    """Format a number of bytes in MB or kB.

    >>> megabytes(1234567), megabytes(900)
    ('1.2 MB', '0.9 kB')
    """
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


class _ErrorKeepingFile:
    """File that keeps a write error, which torch hides."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(bundle: dict[str, Any], file: IO[bytes]) -> None:
    wrapped = _ErrorKeepingFile(file)
    try:
        torch.save(bundle, cast(IO[bytes], wrapped))
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise wrapped.error or OSError(reason) from None


def _delete_oldest(folder: Path, rank: int | None, keep: int, newest: Path) -> None:
    with contextlib.suppress(OSError):
        own = [
            p for p in folder.iterdir()
            if (match := _NAME.fullmatch(p.name)) and match[2] == (None if rank is None else str(rank))
        ]  # fmt: skip
        own.sort(key=lambda p: (p == newest, p.stat().st_mtime_ns))
        for path in own[: max(0, len(own) - keep)]:
            path.unlink()
