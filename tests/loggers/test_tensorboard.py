import errno
import json
import math
import re
import sys
import threading
import types

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_ndarray
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.loggers import base
from lightning_gradguard.loggers.base import PATIENCE, LogRecord
from lightning_gradguard.loggers.histograms import histogram_record
from lightning_gradguard.loggers.tensorboard import TensorBoardSink
from lightning_gradguard.stats.histogram import EDGES

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (7).to_bytes(4, "big") + (5).to_bytes(4, "big")


def events(folder) -> list[Event]:
    """Return the events that hold a summary, as they are in the files."""
    found = []
    # A name ends with the number of the file in this process, which may go from 9 to 10.
    for path in sorted(folder.iterdir(), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)]):
        found += [Event.FromString(record) for record in RawEventFileLoader(str(path)).Load()]
    return [event for event in found if event.HasField("summary")]


def write(folder, *steps: tuple[int, LogRecord]) -> None:
    with SummaryWriter(folder) as writer:
        sink = TensorBoardSink(writer)
        for step, record in steps:
            sink.write(step, record)
        sink.close()


def write_fifty(sink: TensorBoardSink) -> None:
    for step in range(50):
        sink.write(step, LogRecord(scalars={"a/b": 1.0}, images={"a/map": lambda: PNG}))
    sink.close()


def read(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0, "scalars": 0}).Reload()


@pytest.mark.parametrize("value", [0.0, -3.25, 1e-30, math.nan])
def test_scalars(tmp_path, value):
    write(tmp_path, (3, LogRecord(scalars={"group/name": value})))
    (seen,) = read(tmp_path).Scalars("group/name")
    assert seen.step == 3
    assert seen.value == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300])
def test_infinity_is_shown_as_nan(tmp_path, value):
    write(tmp_path, (0, LogRecord(scalars={"group/name": value})))
    assert math.isnan(read(tmp_path).Scalars("group/name")[0].value)


def test_histograms_keep_every_count_and_the_ends_of_the_axis(tmp_path):
    counts = np.random.default_rng(0).integers(0, 3, (9, 30)).astype(np.float32)
    counts[3:5, :3] = counts[4:6, -3:] = counts[6] = (
        0  # empty bins at the ends, and a histogram without any count
    )
    counts[7] = 1
    write(
        tmp_path,
        *((step, LogRecord(histograms={"group/a": row.tolist()})) for step, row in enumerate(counts)),
    )
    seen = read(tmp_path).Tensors("group/a")
    assert [event.step for event in seen] == list(range(9))
    for event, row in zip(seen, counts, strict=True):
        buckets = make_ndarray(event.tensor_proto)
        assert buckets.dtype == np.float32
        assert (buckets[0, 0], buckets[-1, 1]) == (EDGES[0], EDGES[-1])
        assert np.array_equal(buckets[1:, 0], buckets[:-1, 1])
        full = buckets[buckets[:, 2] > 0]
        assert full.tolist() == [[EDGES[k], EDGES[k + 1], row[k]] for k in range(30) if row[k]]
        # Empty neighbours are one bin.
        assert not ((buckets[1:, 2] == 0) & (buckets[:-1, 2] == 0)).any()


def test_a_histogram_may_have_an_axis_of_its_own(tmp_path):
    record = LogRecord(
        histograms={"g/a": [0.0] * 29 + [4.0], "g/b": [1.0] + [0.0] * 29},
        edges={"g/b": [k / 10 for k in range(31)]},
    )
    write(tmp_path, (0, record))
    a, b = (make_ndarray(read(tmp_path).Tensors(tag)[0].tensor_proto) for tag in ("g/a", "g/b"))
    assert a.tolist() == [[-12, 2.5, 0], [2.5, 3, 4]]
    assert b == pytest.approx(np.array([[0, 0.1, 1], [0.1, 3, 0]]))


def test_texts(tmp_path):
    write(tmp_path, (5, LogRecord(texts={"group/why": "**é** | 層"})))
    (seen,) = read(tmp_path).Tensors("group/why")
    assert make_ndarray(seen.tensor_proto).item().decode() == "**é** | 層"


def test_images(tmp_path):
    write(tmp_path, (5, LogRecord(images={"group/map": lambda: PNG})))
    (image,) = [value.image for event in events(tmp_path) for value in event.summary.value]
    assert (image.width, image.height, image.encoded_image_string) == (7, 5, PNG)


def test_rows_have_steps_of_their_own_and_their_columns_once(tmp_path):
    rows = [(3, [1.0, -2.5, math.nan]), (4, [0.0, -3.003, -math.inf])]
    record = LogRecord({"a/b": 1.0}, rows={"a/rows": rows}, columns={"a/rows": ["mark", "x", "y"]})
    write(tmp_path, (9, record), (9, LogRecord(rows={"a/rows": [(10, [0.0, 1.0, 1.0])]})))
    seen = [(e.step, v) for e in events(tmp_path) for v in e.summary.value if v.tag == "a/rows"]
    assert [step for step, _ in seen] == [3, 4, 10]
    np.testing.assert_allclose(make_ndarray(seen[0][1].tensor), rows[0][1], atol=0.005)
    np.testing.assert_allclose(make_ndarray(seen[1][1].tensor), rows[1][1], atol=0.005)
    assert json.loads(seen[0][1].metadata.plugin_data.content) == ["mark", "x", "y"]
    assert not seen[1][1].HasField("metadata")


def test_one_event_for_a_step(tmp_path):
    record = LogRecord(
        scalars={"a/b": 1.0, "a/c": 2.0},
        histograms={"a/d": [1.0] * 30, "a/e": [2.0] * 30},
        texts={"a/f": "x"},
    )
    write(tmp_path, (0, record), (1, record), (2, LogRecord()))
    assert [event.step for event in events(tmp_path)] == [0, 1]
    assert [len(event.summary.value) for event in events(tmp_path)] == [5, 5]


def test_a_tag_is_described_once(tmp_path):
    tags = ["a/scalar", "a/histogram", "a/text", "a/image"]
    notes = {tag: f"how to read {tag}" for tag in tags}
    record = LogRecord({tags[0]: 1.0}, {tags[1]: [1.0] * 30}, {tags[2]: "x"}, {tags[3]: lambda: PNG}, notes)
    with SummaryWriter(tmp_path) as writer:
        sink = TensorBoardSink(writer)
        for step in range(2):
            sink.write(step, record)
            sink.close()  # else the second picture would replace the first, which waits
    seen = {tag: [v for e in events(tmp_path) for v in e.summary.value if v.tag == tag] for tag in tags}
    for tag, plugin in zip(tags, ["scalars", "histograms", "text", "images"], strict=True):
        first, second = seen[tag]
        assert first.metadata.summary_description == notes[tag]
        assert first.metadata.plugin_data.plugin_name == plugin
        assert not second.HasField("metadata")


#: Bins that are not empty, and the largest size of a hundred such histograms: a bin takes 12 bytes, and a tag with its
#: framing 68. Gradients over twelve decades, and zeros, fill 26 bins.
@pytest.mark.parametrize(("bins", "kib"), [(14, 27), (26, 40), (30, 42)])
def test_a_step_of_a_hundred_histograms_is_small(tmp_path, bins, kib):
    names = [f"encoder.layers.{i}.weight" for i in range(100)]  # a longer name adds its length
    column = [1.0, *[0.0] * (30 - bins), *(1e6 + i for i in range(bins - 1))]
    record = histogram_record(dict.fromkeys(names, column))
    write(tmp_path, (0, record), (100_000, record))
    assert len(events(tmp_path)[-1].SerializeToString()) <= kib * 1024


def test_a_writer_closed_in_between_is_opened_again(tmp_path):
    writer = SummaryWriter(tmp_path)
    sink = TensorBoardSink(writer)
    for step in range(3):
        sink.write(step, LogRecord(scalars={"a/b": float(step)}, histograms={"a/c": [float(step)] * 30}))
        sink.close()
        writer.close()
    assert [event.value for event in read(tmp_path).Scalars("a/b")] == [0, 1, 2]
    assert len(read(tmp_path).Tensors("a/c")) == 3


def test_drawing_does_not_hold_up_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "FIRST", 0.0)
    may_go_on, threads = threading.Event(), []

    def draw():
        assert may_go_on.wait(60)
        threads.append(threading.current_thread())
        return PNG

    with SummaryWriter(tmp_path) as writer:
        sink = TensorBoardSink(writer)
        sink.write(1, LogRecord(images={"a/map": draw}))
        sink.write(2, LogRecord(scalars={"a/b": 1.0}, images={"a/map": draw}))
        assert not threads
        may_go_on.set()
        sink.close()
    assert threads[0] is not threading.main_thread()
    seen = [(event.step, value.tag) for event in events(tmp_path) for value in event.summary.value]
    assert seen == [(2, "a/b"), (1, "a/map"), (2, "a/map")]


def test_no_thread_is_left(tmp_path):
    before = threading.active_count()
    write(tmp_path, (0, LogRecord(images={"a/map": lambda: PNG})))
    assert threading.active_count() == before


@pytest.mark.parametrize("broken", [lambda: 1 / 0, lambda: b"", lambda: None])
def test_a_failed_drawing_is_warned_of_and_the_rest_is_written(tmp_path, broken):
    with pytest.warns(UserWarning, match="Drawing for TensorBoard failed") as caught:
        write(tmp_path, *((step, LogRecord({"a/b": 1.0}, images={"a/map": broken})) for step in range(20)))
    assert len(caught) == 1
    assert len(read(tmp_path).Scalars("a/b")) == 20


def test_disk_full_is_warned_of_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        threading, "excepthook", lambda args: None
    )  # the writer's own thread ends with the error
    writer = SummaryWriter(tmp_path, max_queue=1)
    sink = TensorBoardSink(writer)

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        write_fifty(sink)
    assert len(caught) == 1


def test_a_dead_writer_is_switched_off():
    class Dead:
        calls = 0

        def _get_file_writer(self):
            self.calls += 1
            raise OSError("Writer is closed")

        flush = _get_file_writer

    dead = Dead()
    sink = TensorBoardSink(dead)
    with pytest.warns(UserWarning, match="Writer is closed") as caught:
        write_fifty(sink)
    assert len(caught) == 1
    assert dead.calls == PATIENCE


def test_a_folder_that_cannot_be_made_is_warned_of(tmp_path):
    writer = SummaryWriter(tmp_path / "run")
    writer.close()
    (tmp_path / "run").rename(tmp_path / "gone")
    (tmp_path / "run").write_text("a file is in the way")
    sink = TensorBoardSink(writer)
    with pytest.warns(UserWarning, match="TensorBoard output failed"):
        sink.write(0, LogRecord(scalars={"a/b": 1.0}))


def test_tensorboardx_gets_the_same_bytes_in_its_own_class(monkeypatch, tmp_path):
    class OtherSummary:
        def __init__(self, data):
            self.data = data

        @classmethod
        def FromString(cls, data):
            return cls(data)

    class FileWriter:
        written = ()

        def add_summary(self, summary, step):
            assert isinstance(summary, OtherSummary)
            self.written = (*self.written, (step, Summary.FromString(summary.data)))

    FileWriter.__module__ = "tensorboardX.writer"
    module = types.ModuleType("tensorboardX.proto.summary_pb2")
    module.Summary = OtherSummary
    for name in ("tensorboardX", "tensorboardX.proto"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    file = FileWriter()
    record = LogRecord(scalars={"a/b": 1.0}, histograms={"a/c": [1.0] * 30})
    TensorBoardSink(types.SimpleNamespace(_get_file_writer=lambda: file)).write(4, record)
    write(tmp_path, (4, record))
    assert file.written == ((4, events(tmp_path)[0].summary),)
