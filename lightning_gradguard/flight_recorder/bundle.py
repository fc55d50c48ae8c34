"""The bundle as a file: written whole or not at all, bounded in size, and read without running anything from it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any, cast

import torch

from lightning_gradguard.flight_recorder.serialization import size_of

FORMAT = "gradguard bundle"
#: Raised when older bundles can no longer be read.
VERSION = 1

#: What every bundle holds.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "reason": str,
    "step": int,
    "run": str,
    "rank": int,
    "world_size": int,
    "target": (dict, type(None)),
    "message": str,
    "findings": list,
    "diagnosis": (dict, type(None)),
    "report": (dict, type(None)),
    "optimizers": list,
    "parts": list,
    "weights": (dict, type(None)),
    "buffers": dict,
    "module": dict,
    "trainer": dict,
    "config": dict,
    "versions": dict,
    "hyper_parameters": dict,
    "notes": list,
    "left_out": list,
}
_NAME = re.compile(r"step-(\d+)(?:-rank(\d+))?\.pt")


class ReplayError(ValueError):
    """A file is no bundle, or not one that can be replayed with this module; the message says why, in one line."""


def name_of(step: int, rank: int, world_size: int) -> str:
    """A bundle's file name."""
    return f"step-{step:08d}" + (f"-rank{rank}" if world_size > 1 else "") + ".pt"


def bound(bundle: dict[str, Any], max_bytes: int) -> None:
    """Leaves out weights, and then the batch, of a bundle that is too large.

    Args:
        bundle: Changed in place; what is left out is told under ``left_out``.
        max_bytes: The largest it may be.
    """
    for name, empty in (("weights", None), ("parts", [])):
        size = size_of(bundle)
        if size > max_bytes and bundle[name]:
            part = size_of(bundle[name])
            bundle["left_out"].append(
                f"{'weights' if name == 'weights' else 'batch'} ({megabytes(part)}; the bundle would have "
                f"{megabytes(size)}, and max_bytes is {max_bytes:,})"
            )
            bundle[name] = empty


def write(bundle: dict[str, Any], folder: Path, keep: int) -> Path:
    """Writes a bundle beside what is there, puts it in its place at once, and deletes the oldest.

    Args:
        bundle: Plain types and tensors.
        folder: Made if it is not there.
        keep: Newest bundles of this rank that stay.

    Raises:
        OSError: If the disk is full, the folder cannot be written to, and the like; nothing is left behind then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size, free = size_of(bundle), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{megabytes(size)} are needed, and {megabytes(free)} are free")
    target = folder / name_of(bundle["step"], bundle["rank"], bundle["world_size"])
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
    _prune(folder, bundle["rank"] if bundle["world_size"] > 1 else None, keep, target)
    return target


def read(path: str | Path) -> dict[str, Any]:
    """Reads a bundle onto the CPU; nothing in the file is run.

    Raises:
        ReplayError: If there is none, or it is damaged, of another version, or something else.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if _NAME.fullmatch(p.name))
        if not inside:
            raise ReplayError(
                f"{path} is a folder without a bundle; name the file that was left, such as {name_of(150, 0, 1)}"
            )
        raise ReplayError(f"{path} is a folder; name a bundle in it, such as {inside[-1]}")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise ReplayError(f"{path} does not exist") from None
    except OSError as error:
        raise ReplayError(f"{path} cannot be read: {error.strerror or error}") from None
    with file:
        try:
            bundle = torch.load(file, map_location="cpu", weights_only=True)
        except (
            Exception
        ):  # what torch raises of a file that is cut off, or holds code, has many kinds and long advice
            raise ReplayError(f"{path} is damaged, or no bundle of gradguard") from None
    if not isinstance(bundle, dict) or bundle.get("format") != FORMAT:
        raise ReplayError(f"{path} is no bundle of gradguard")
    if bundle.get("version") != VERSION:
        raise ReplayError(
            f"{path} is of version {bundle.get('version')!r}, and this gradguard reads version {VERSION}; "
            "use the one that wrote it"
        )
    odd = [name for name, kind in _FIELDS.items() if not isinstance(bundle.get(name), kind)]
    if odd:
        raise ReplayError(f"{path} is damaged: {', '.join(odd[:3])} is not as it was written")
    return bundle


def read_family(path: str | Path) -> list[dict[str, Any]]:
    """A bundle, and those that the other processes of its run left beside it of the same step; by rank.

    What is not there, or cannot be read, is noted in the notes of the bundle that was named.

    Raises:
        ReplayError: If the one that was named cannot be used.
    """
    path, bundle = Path(path), read(path)
    family, missing = {bundle["rank"]: bundle}, []
    for rank in range(bundle["world_size"]):
        if rank == bundle["rank"]:
            continue
        try:
            other = read(path.parent / name_of(bundle["step"], rank, bundle["world_size"]))
        except ReplayError:
            other = {}
        if other.get("run") == bundle["run"]:
            family[rank] = other
        else:
            missing.append(str(rank))
    if missing:
        bundle["notes"].append(f"The bundle of rank {', '.join(missing)} is not beside it, and not replayed.")
    return [family[rank] for rank in sorted(family)]


def megabytes(size: float) -> str:
    """Bytes to be read by a person.

    >>> megabytes(1234567), megabytes(900)
    ('1.2 MB', '0.9 kB')
    """
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


class _Honest:
    """A file that remembers why it could not be written: torch says only that it could not."""

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
    honest = _Honest(file)
    try:
        torch.save(bundle, cast(IO[bytes], honest))
    except Exception as error:
        raise honest.error or OSError(
            f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        ) from None


def _prune(folder: Path, rank: int | None, keep: int, newest: Path) -> None:
    """Deletes the oldest bundles of a rank, by their time; one that resists stays."""
    with contextlib.suppress(OSError):
        own = [
            p for p in folder.iterdir()
            if (match := _NAME.fullmatch(p.name)) and match[2] == (None if rank is None else str(rank))
        ]  # fmt: skip
        own.sort(key=lambda p: (p == newest, p.stat().st_mtime_ns))
        for path in own[: max(0, len(own) - keep)]:
            path.unlink()
