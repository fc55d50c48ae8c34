"""Log sink for TensorBoard."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_HALF, DT_STRING

from lightning_gradguard.loggers.base import FailSafe, LogRecord, Picture, PictureQueue
from lightning_gradguard.stats.histogram import EDGES

_AXIS = np.array(EDGES, dtype=np.float32)
_SHAPES = [TensorShapeProto(dim=[{"size": bins}, {"size": 3}]) for bins in range(len(EDGES))]
_SCALAR_LIMIT = 3.4028234e38  # of the float32 in which TensorBoard keeps numbers


class TensorBoardSink:
    """Sink that shows records in TensorBoard.

    Histograms are written as tensors [bins, 3] of left edge, right edge and count, since TensorBoard's two loaders trim
    and stretch the older form in different ways. All values of a step are one event. Pictures are drawn on a thread,
    rarely (see `PictureQueue`), and written with a later record, or on closing, at the step that they show.

    A writer that fails is warned of once, and training continues.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or tensorboardX's. It is not closed by the sink.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._output, self._pictures = FailSafe("TensorBoard output"), PictureQueue("TensorBoard")
        self._described: set[str] = set()

    def write(self, step: int, record: LogRecord) -> None:
        """Write a record, and pictures that have been drawn."""
        if record.scalars or record.histograms or record.texts or record.data or record.rows:
            self._output.run(lambda: self._write_events(step, record))
        if not self._output.is_off:
            self._pictures.start(step, record)
        self._write_pictures(wait=False)

    def close(self) -> None:
        """Draw and write the pictures that wait; leave the writer open."""
        self._write_pictures(wait=True)
        self._pictures.close()
        is_flushed = self._output.run(self._flush)
        # The writer's thread may fail a moment later.
        if not is_flushed or not self._has_folder():
            self._shield_writer()

    def _has_folder(self) -> bool:
        """Return False if the writer's folder is gone."""
        folder = str(getattr(self._writer, "log_dir", ""))
        return not folder or "://" in folder or os.path.isdir(folder)

    def _flush(self) -> bool:
        self._writer.flush()
        return True

    def _shield_writer(self) -> None:
        """Keep the writer from failing when the training closes it.

        What it could not write are our records, so without them the training would end normally.
        """
        for name in ("flush", "close"):
            method = getattr(self._writer, name, None)
            if method is not None:
                setattr(self._writer, name, partial(_run_safely, method))

    def _write_events(self, step: int, record: LogRecord) -> None:
        notes = record.notes
        values = [
            self._value(t, notes, "scalars", simple_value=_number(x)) for t, x in record.scalars.items()
        ]
        values += [
            self._value(t, notes, "histograms", tensor=b)
            for t, b in zip(record.histograms, _buckets(record.histograms, record.edges), strict=True)
        ]
        values += [self._value(t, notes, "text", tensor=_text(x)) for t, x in record.texts.items()]
        values += [self._value(t, notes, "gradguard", tensor=_text(x)) for t, x in record.data.items()]
        events = [(step, values)] if values else []
        for tag, rows in record.rows.items():
            columns = json.dumps(list(record.columns.get(tag, ())), separators=(",", ":")).encode()
            tensors = [(own_step, _row(row)) for own_step, row in rows]
            # The first one describes the tag.
            events += [(s, [self._value(tag, notes, "gradguard", columns, tensor=t)]) for s, t in tensors[:1]]
            events += [(s, [Summary.Value(tag=tag, tensor=t)]) for s, t in tensors[1:]]
        self._add(events)

    def _write_pictures(self, wait: bool) -> None:
        for picture in self._pictures.take(wait=wait):
            self._output.run(partial(self._write_picture, picture))

    def _write_picture(self, picture: Picture) -> None:
        width, height = struct.unpack(">II", picture.png[16:24])  # in the header chunk, which comes first
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=picture.png)
        notes = {picture.tag: picture.note}
        self._add([(picture.step, [self._value(picture.tag, notes, "images", image=image)])])

    def _value(
        self, tag: str, notes: Mapping[str, str], plugin: str, columns: bytes = b"", **content: Any
    ) -> Summary.Value:
        value = Summary.Value(tag=tag, **content)
        if tag not in self._described:
            value.metadata.CopyFrom(
                SummaryMetadata(
                    summary_description=notes.get(tag, ""),
                    plugin_data=SummaryMetadata.PluginData(plugin_name=plugin, content=columns),
                    data_class=_DATA_CLASS[plugin],
                )
            )
        return value

    def _add(self, events: Sequence[tuple[int, list[Summary.Value]]]) -> None:
        """Hand events to the writer, all at once: its thread, once it has one, competes for Python's lock."""
        if not self._has_folder():
            # Asked before writing, since the writer's thread would fail later, in another's call.
            raise FileNotFoundError(f"the log folder {self._writer.log_dir} is gone")
        file = self._writer._get_file_writer()
        summaries: list[tuple[int, Any]] = [(step, Summary(value=values)) for step, values in events]
        if type(file).__module__.startswith("tensorboardX"):  # it has its own classes for the same bytes
            other = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
            summaries = [(step, other.FromString(own.SerializeToString())) for step, own in summaries]
        for step, summary in summaries:
            file.add_summary(summary, step)
        self._described.update(value.tag for _, values in events for value in values)


_DATA_CLASS = {
    "scalars": DATA_CLASS_SCALAR,
    "histograms": DATA_CLASS_TENSOR,
    "text": DATA_CLASS_TENSOR,
    "images": DATA_CLASS_BLOB_SEQUENCE,
    # No dashboard has this name, so TensorBoard ignores it.
    "gradguard": DATA_CLASS_TENSOR,
}


def _run_safely(method: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):
        method()


def _number(value: float) -> float:
    # TensorBoard drops an infinite value silently, but marks NaN.
    return value if abs(value) <= _SCALAR_LIMIT else math.nan


def _buckets(
    histograms: Mapping[str, Sequence[float]], edges: Mapping[str, Sequence[float]]
) -> Iterator[TensorProto]:
    """Yield left edge, right edge and count of bins.

    Empty neighbours are one bin. That halves the bytes, whose checksum is most of the cost of writing. The axis and the
    picture stay the same.
    """
    if not histograms:
        return
    counts = np.array(list(histograms.values()), dtype=np.float32)
    is_full = counts > 0
    # A bin begins after a full one, or is full itself.
    begins = is_full | np.roll(is_full, 1, axis=1)
    begins[:, 0] = True
    row, place = begins.nonzero()
    axes = np.broadcast_to(_AXIS, (len(counts), len(EDGES)))
    if edges:
        axes = np.array([edges.get(tag, _AXIS) for tag in histograms], dtype=np.float32)
    left = axes[row, place]
    right = np.roll(left, -1)
    ends = np.cumsum(begins.sum(axis=1))
    right[ends - 1] = axes[:, -1]
    table = np.stack([left, right, counts[row, place]], axis=1)
    begin = 0
    for end in ends.tolist():
        content = table[begin:end].tobytes()
        yield TensorProto(dtype=DT_FLOAT, tensor_shape=_SHAPES[end - begin], tensor_content=content)
        begin = end


def _row(values: Sequence[float]) -> TensorProto:
    # Half precision distinguishes 0.01 decades, at half of the bytes.
    content = np.array(values, dtype=np.float16).tobytes()
    return TensorProto(
        dtype=DT_HALF, tensor_shape=TensorShapeProto(dim=[{"size": len(values)}]), tensor_content=content
    )


def _text(markdown: str) -> TensorProto:
    return TensorProto(dtype=DT_STRING, string_val=[markdown.encode()])
