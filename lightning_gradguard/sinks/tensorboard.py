"""Writes panels for TensorBoard: one event for each step, in a form that both of its loaders show alike."""

from __future__ import annotations

import importlib
import json
import math
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

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

from lightning_gradguard.signals.histogram import EDGES
from lightning_gradguard.sinks.panel import Fuse, Panel

_MATRIX = TensorShapeProto(dim=[{"size": len(EDGES) - 1}, {"size": 3}])
_SCALAR_LIMIT = 3.4028234e38  # of the float32 in which TensorBoard keeps numbers


class TensorBoardSink:
    """Shows panels in TensorBoard.

    Histograms are written as tensors of (left edge, right edge, count): the older form is trimmed and
    stretched by TensorBoard's two loaders in different ways. All values of a step are one event. Pictures are
    drawn on a thread and written with a later panel, or on closing, at the step which they show.

    A writer that fails is warned of once, and training goes on.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or tensorboardX's. It is not closed by the sink.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._file_fuse, self._drawing_fuse = Fuse("TensorBoard output"), Fuse("Drawing for TensorBoard")
        self._described: set[str] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._drawings: list[_Drawing] = []

    def write(self, step: int, panel: Panel) -> None:
        """Writes a panel as one event and starts its drawings.

        Args:
            step: Position on the x axis.
            panel: What to show.
        """
        if panel.scalars or panel.histograms or panel.texts:
            self._file_fuse.run(lambda: self._write_values(step, panel))
        if panel.rows:
            self._file_fuse.run(lambda: self._write_rows(panel))
        if panel.images and not self._file_fuse.blown:
            self._drawing_fuse.run(lambda: self._start_drawings(step, panel))
        self._write_drawings(wait=False)

    def close(self) -> None:
        """Finishes and writes pending drawings and flushes the file; the writer stays open."""
        self._write_drawings(wait=True)
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._file_fuse.run(self._writer.flush)

    def _write_values(self, step: int, panel: Panel) -> None:
        notes = panel.notes
        values = [self._value(t, notes, "scalars", simple_value=_number(x)) for t, x in panel.scalars.items()]
        values += [
            self._value(t, notes, "histograms", tensor=_buckets(c)) for t, c in panel.histograms.items()
        ]
        values += [self._value(t, notes, "text", tensor=_text(x)) for t, x in panel.texts.items()]
        self._add(values, step)

    def _write_rows(self, panel: Panel) -> None:
        for tag, rows in panel.rows.items():
            columns = json.dumps(list(panel.columns.get(tag, ())), separators=(",", ":")).encode()
            for step, row in rows:
                self._add([self._value(tag, panel.notes, "gradguard", columns, tensor=_row(row))], step)

    def _start_drawings(self, step: int, panel: Panel) -> None:
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="gradguard-draw")
        for tag, draw in panel.images.items():
            self._drawings.append(_Drawing(step, tag, panel.notes, self._pool.submit(_image, draw)))

    def _write_drawings(self, wait: bool) -> None:
        # One thread draws, so they are done in order.
        while self._drawings and (wait or self._drawings[0].image.done()):
            self._write_drawing(self._drawings.pop(0))

    def _write_drawing(self, drawing: _Drawing) -> None:
        image = self._drawing_fuse.run(drawing.image.result)
        if image is not None:
            value = self._value(drawing.tag, drawing.notes, "images", image=image)
            self._file_fuse.run(lambda: self._add([value], drawing.step))

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

    def _add(self, values: list[Summary.Value], step: int) -> None:
        file = self._writer._get_file_writer()
        summary: Any = Summary(value=values)
        if type(file).__module__.startswith("tensorboardX"):  # has classes of its own for the same bytes
            other = importlib.import_module("tensorboardX.proto.summary_pb2")
            summary = other.Summary.FromString(summary.SerializeToString())
        file.add_summary(summary, step)
        self._described.update(v.tag for v in values)


class _Drawing(NamedTuple):
    step: int
    tag: str
    notes: Mapping[str, str]
    image: Future[Summary.Image]


_DATA_CLASS = {
    "scalars": DATA_CLASS_SCALAR,
    "histograms": DATA_CLASS_TENSOR,
    "text": DATA_CLASS_TENSOR,
    "images": DATA_CLASS_BLOB_SEQUENCE,
    # No dashboard has this name, so TensorBoard leaves it alone.
    "gradguard": DATA_CLASS_TENSOR,
}


def _number(value: float) -> float:
    # An infinite value is left out of the chart without a word, while NaN is marked.
    return value if abs(value) <= _SCALAR_LIMIT else math.nan


def _buckets(counts: Sequence[float]) -> TensorProto:
    rows = array("f", (x for row in zip(EDGES[:-1], EDGES[1:], counts, strict=True) for x in row))
    return TensorProto(dtype=DT_FLOAT, tensor_shape=_MATRIX, tensor_content=rows.tobytes())


def _row(values: Sequence[float]) -> TensorProto:
    # Half precision tells 0.01 decades apart, at half of the bytes.
    content = np.array(values, dtype=np.float16).tobytes()
    return TensorProto(
        dtype=DT_HALF, tensor_shape=TensorShapeProto(dim=[{"size": len(values)}]), tensor_content=content
    )


def _image(draw: Callable[[], bytes]) -> Summary.Image:
    png = draw()
    width, height = struct.unpack(">II", png[16:24])  # of the header chunk, which comes first
    return Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)


def _text(markdown: str) -> TensorProto:
    return TensorProto(dtype=DT_STRING, string_val=[markdown.encode()])
