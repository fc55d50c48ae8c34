"""Reader of event files, also of killed runs."""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.util.tensor_util import make_ndarray

from lightning_gradguard.loggers.findings import FoundRecord
from lightning_gradguard.loggers.status import LoggedFinding
from lightning_gradguard.loggers.tags import DIAGNOSIS, FINDINGS, LAYER_RMS, Tag
from lightning_gradguard.printing import one_line
from lightning_gradguard.results import Severity
from lightning_gradguard.stats.histogram import EDGES

#: Largest decade of a float64, and a count that no tensor has.
_LARGEST, _MOST = 308, 1e18

T = TypeVar("T")
Curve = dict[int, T]
"""Step to what was written there."""


class ReportError(Exception):
    """Error that there is nothing to report on."""


@dataclass
class Track:
    """Everything that was logged for one optimizer.

    Attributes:
        layers: Rows of the heat map, from input to output.
        rows: float16 [1 + layers] at a step: what was done (0 nothing, 1 clipped, 2 skipped), then log10 gradient RMS;
            NaN is not finite, -inf no gradient.
        scalars: Name without its group, to values.
        histograms: Name of the parameter to 30 counts.
        found: Findings and diagnoses.
        exponents: Markdown of what narrow number formats would lose, at each step.
        values: Titles of the tensors with histograms of values, which only TensorBoard shows.
    """

    layers: tuple[str, ...] = ()
    rows: Curve[NDArray[np.float16]] = field(default_factory=dict)
    scalars: dict[str, Curve[float]] = field(default_factory=dict)
    histograms: dict[str, Curve[NDArray[np.float32]]] = field(default_factory=dict)
    found: Curve[FoundRecord] = field(default_factory=dict)
    exponents: Curve[str] = field(default_factory=dict)
    values: set[str] = field(default_factory=set)

    def append(self, later: Track) -> None:
        """Append a later file; its repeated steps count."""
        if later.rows:
            kept = self.rows if self.layers == later.layers else {}
            self.layers, self.rows = later.layers, _splice(kept, later.rows, min(later.rows))
        self.found = _splice(self.found, later.found, _begin(later.scalars))
        self.scalars = _splice_all(self.scalars, later.scalars)
        self.histograms = _splice_all(self.histograms, later.histograms)
        self.exponents = _splice(self.exponents, later.exponents, min(later.exponents, default=math.inf))
        self.values |= later.values


@dataclass
class Run:
    """Contents of the event files of one folder.

    Attributes:
        name: Shortest path that distinguishes it from the other runs.
        tracks: ``gradguard``, ``gradguard_1``, ...: one for each optimizer.
        losses: The training's own scalars with "loss" in their name.
        damaged: Names of files that end in the middle of a record or are corrupt.
        unopened: Name of each file that cannot be read at all, to the reason.
        undecoded: Name of a file to the number of its whole records that are no events.
        unreadable: Tag to the number of records under it that are not of this package's form.
        files: Number of event files.
    """

    name: str
    tracks: dict[str, Track] = field(default_factory=dict)
    losses: dict[str, Curve[float]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    unopened: dict[str, str] = field(default_factory=dict)
    undecoded: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    files: int = 0


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs in some folders.

    Args:
        folders: Each is one run if it has event files of its own; else every folder below it that has some is one.

    Raises:
        ReportError: If a folder does not exist, or neither it nor one below it holds anything of this package.
            Records under this package's tags that cannot be read are counted and left out.
    """
    return [run for folder in folders for run in _read_below(folder)]


def _read_below(folder: Path) -> list[Run]:
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; give the folder that a logger wrote its event files to")
    homes = sorted({file.parent for file in folder.rglob("*tfevents*") if file.is_file()})
    if not homes:
        raise ReportError(
            f"{folder} holds no TensorBoard event files (*tfevents*), and no folder below it does; "
            "log some with Trainer(logger=TensorBoardLogger(...))"
        )
    if folder in homes:
        homes = [folder]
    names = [home.resolve().name if home == folder else str(home.relative_to(folder)) for home in homes]
    read = list(map(_read_run, homes, names))
    runs = [run for run in read if run.tracks]
    if not runs:
        problems = "".join(f" ({problem})" for run in read for problem in _problems(run))
        raise ReportError(
            f"the event files in {folder} hold no gradguard data{problems[:500]}; "
            "log it with Trainer(callbacks=[GradHistogram(), GradGuard()]); they write from the first step on"
        )
    return runs


def _problems(run: Run) -> Iterator[str]:
    yield from (f"{name} cannot be read: {reason}" for name, reason in run.unopened.items())
    yield from (f"{name} is cut off or corrupt" for name in run.damaged)
    yield from (f"{name} has {count} records that are no events" for name, count in run.undecoded.items())


def _read_run(home: Path, name: str) -> Run:
    files = [_File(path) for path in home.iterdir() if "tfevents" in path.name and path.is_file()]
    run = Run(name, files=len(files))
    for file in sorted(files, key=lambda file: (file.began, file.path.name)):
        for group, track in file.tracks.items():
            run.tracks.setdefault(group, Track()).append(track)
        run.losses = _splice_all(run.losses, file.losses)
        run.unreadable += file.unreadable
        if file.problem:
            run.unopened[file.path.name] = file.problem
        elif file.is_damaged:
            run.damaged.append(file.path.name)
        if file.undecoded:
            run.undecoded[file.path.name] = file.undecoded
    run.tracks = dict(sorted(run.tracks.items(), key=lambda item: (len(item[0]), item[0])))
    return run


class _File:
    """Event file up to its first damaged record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began = math.inf
        self.tracks: dict[str, Track] = {}
        self.losses: dict[str, Curve[float]] = {}
        self.unreadable: Counter[str] = Counter()
        self._texts: dict[str, Curve[FoundRecord]] = {}
        self.undecoded, self.is_damaged, self.problem = 0, False, ""
        try:
            self._read()
        except Exception as error:  # also those of TensorBoard, which has a class of its own for each
            self.problem = one_line(getattr(error, "strerror", None) or str(error), 200)
        for group, texts in self._texts.items():
            track = self.tracks.setdefault(group, Track())
            track.found = track.found or texts

    def _read(self) -> None:
        whole, is_whole = _count_records(self.path)
        self.is_damaged = not is_whole
        # Not one record more than that: the loader would reserve memory for the length that the next one claims.
        records = 0
        for record in itertools.islice(RawEventFileLoader(str(self.path)).Load(), whole):
            records += 1
            try:
                event = Event.FromString(record)
            except Exception:  # of a class of protobuf's
                self.undecoded += 1
                continue
            self.began = min(self.began, event.wall_time)
            for value in event.summary.value:
                try:
                    self._add(event.step, value)
                except Exception:  # a record of someone else under our tag
                    self.unreadable[value.tag] += 1
        self.is_damaged |= records < whole

    def _add(self, step: int, value: Any) -> None:
        tag = Tag.parse(value.tag)
        if tag is None:
            if "loss" in value.tag.lower() and (number := _number(value)) is not None:
                self.losses.setdefault(value.tag, {})[step] = number
            return
        has_tensor = value.HasField("tensor")
        track = self.tracks.get(tag.group, Track())
        if tag.kind == "hist_value":
            track.values.add(tag.name)
        elif tag.kind == "hist_log10" and has_tensor:
            counts = _counts(_array(value.tensor))
            track.histograms.setdefault(tag.name, {})[step] = counts
        elif tag.kind == "exponents":
            if has_tensor:
                track.exponents[step] = _text(value)
        elif tag.name == LAYER_RMS and has_tensor:
            columns = value.metadata.plugin_data.content
            layers = _layers(columns) if columns else track.layers
            row = _row(_array(value.tensor), layers)
            if layers != track.layers:
                track.layers, track.rows = layers, {}
            track.rows[step] = row
        elif tag.name == FINDINGS and has_tensor:
            found = FoundRecord.from_json(_text(value))
            # The run's end may be written at the step of the newest findings.
            track.found[step] = track.found[step].joined(found) if step in track.found else found
        elif tag.name == DIAGNOSIS and has_tensor:
            self._texts.setdefault(tag.group, {})[step] = parse_old_text(_text(value))
        elif not tag.kind and (number := _number(value)) is not None:
            track.scalars.setdefault(tag.name, {})[step] = number
        else:
            return
        self.tracks[tag.group] = track


def _layers(columns: bytes) -> tuple[str, ...]:
    """Return the names of the rows of the heat map.

    Raises:
        ValueError: If it is not a JSON list of names.
    """
    names = json.loads(columns)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("no list of names")
    return tuple(names[1:])


def _array(tensor: TensorProto) -> NDArray[Any]:
    """Return the numbers of a tensor.

    Raises:
        ValueError: If its shape is of more numbers than it holds: one that stands for many would be repeated.
    """
    if math.prod(dim.size for dim in tensor.tensor_shape.dim) > tensor.ByteSize():
        raise ValueError("a tensor of more numbers than bytes")
    array: NDArray[Any] = make_ndarray(tensor)
    return array


def _row(array: NDArray[Any], layers: Sequence[str]) -> NDArray[np.float16]:
    """Return one column of the heat map.

    Raises:
        ValueError: If it does not fit the layers, or if its decades are those of no float.
    """
    is_row = layers and array.shape == (1 + len(layers),) and array.dtype.kind == "f"
    if not is_row or not math.isfinite(array[0]) or (array[1:] > _LARGEST).any():
        raise ValueError("no row of the heat map")
    return array


def _counts(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return 30 counts; empty neighbours share a row."""
    if table.ndim != 2 or table.shape[1] != 3 or not (np.abs(table) < _MOST).all():
        raise ValueError("no histogram")
    full = table[table[:, 2] > 0]
    counts = np.zeros(len(EDGES) - 1, dtype=np.float32)
    counts[np.searchsorted(EDGES, full[:, 0])] = full[:, 2]  # raises beyond the axis
    return counts


def _text(value: Any) -> str:
    text: str = value.tensor.string_val[0].decode("utf-8", "replace")
    return text


def _number(value: Any) -> float | None:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor"):
        array = _array(value.tensor)
        if array.size == 1 and array.dtype.kind == "f":
            return float(array.item())
    return None


def _splice(earlier: Curve[T], later: Curve[T], begin: float) -> Curve[T]:
    """Join curves, the earlier one up to step ``begin``."""
    kept = {step: x for step, x in earlier.items() if step < begin}
    return {step: x for step, x in sorted((kept | later).items(), key=lambda item: item[0])}


def _splice_all(earlier: dict[str, Curve[T]], later: dict[str, Curve[T]]) -> dict[str, Curve[T]]:
    begin = _begin(later)
    names = dict.fromkeys([*earlier, *later])
    curves = {name: _splice(earlier.get(name, {}), later.get(name, {}), begin) for name in names}
    # Nothing is left of a curve that only the earlier file has, if all its steps were repeated.
    return {name: curve for name, curve in curves.items() if curve}


def _begin(curves: dict[str, Curve[T]]) -> float:
    # Without any curves all earlier steps are kept.
    return min((step for curve in curves.values() for step in curve), default=math.inf)


def _count_records(path: Path) -> tuple[int, bool]:
    """Return the number of records in a file, and False if it ends within a further one.

    Corrupt ones count. A record is its length (8 bytes), a checksum (4), the data, and a checksum (4). The loader stops
    silently at a record that is cut off or whose checksum is wrong.
    """
    size, count = path.stat().st_size, 0
    with path.open("rb") as file:
        while (place := file.tell()) < size:
            header = file.read(8)
            if len(header) < 8 or place + 16 + (length := struct.unpack("<Q", header)[0]) > size:
                return count, False
            file.seek(4 + length + 4, 1)
            count += 1
    return count, True


#: Characters of a line from which on it is no finding. The time to parse one grows with their number cubed.
_LINE_LENGTH = 4000
_SEPARATOR, _HEADING = "\n\n---\n\n", "### Found, newest first"
_LINE = re.compile(
    r"\* step (?P<step>\d[\d,]{0,24}): \*\*(?P<fault>\w+)\*\* \((?P<severity>info|warning|critical)\), "
    r"(?P<measure>.*) (?P<value>\S+), limit (?P<limit>\S+?)(?:, in (?P<names>`.*`)(?: and (?P<more>\d{1,4}) more)?)?"
)


def parse_old_text(text: str) -> FoundRecord:
    """Return what the text of an older version holds.

    Older versions wrote findings only as text.

    Args:
        text: Markdown: diagnoses, then one line for each finding, newest first in both.

    Returns:
        Findings and diagnoses, oldest first. A tensor that the text only counts has an empty name.
    """
    *diagnoses, found = text.split(_SEPARATOR)
    findings = filter(None, map(_finding, reversed(found.splitlines())))
    return FoundRecord(tuple(findings), tuple(d for d in reversed(diagnoses) if not d.startswith(_HEADING)))


def _finding(line: str) -> LoggedFinding | None:
    match = _LINE.fullmatch(line) if len(line) < _LINE_LENGTH else None
    if match is None:
        return None
    try:
        value, limit = float(match["value"]), float(match["limit"])
    except ValueError:
        return None
    return LoggedFinding(
        step=int(match["step"].replace(",", "")),
        fault=match["fault"],
        severity=Severity[match["severity"].upper()],
        parameters=_parameters(match),
        value=value,
        limit=limit,
        measure=match["measure"],
    )


def _parameters(match: re.Match[str]) -> tuple[str, ...]:
    if match["names"] is None:
        return ()
    return (*match["names"][1:-1].split("`, `"), *[""] * int(match["more"] or 0))
