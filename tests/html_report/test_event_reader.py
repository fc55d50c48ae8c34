import math
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.html_report.event_reader import ReportError, parse_old_text, read_runs
from lightning_gradguard.html_report.render import render
from lightning_gradguard.html_report.summary import sheets_of
from lightning_gradguard.loggers.base import LogRecord
from lightning_gradguard.loggers.findings import FoundRecord, LoggedFinding
from lightning_gradguard.loggers.histograms import exponents_record, histogram_record
from lightning_gradguard.loggers.tensorboard import TensorBoardSink
from lightning_gradguard.results import Severity
from lightning_gradguard.stats.histogram import EDGES


def read(folder):
    (run,) = read_runs([folder])
    return run


def file_of(folder):
    (path,) = folder.iterdir()
    return path


def ends_of_records(path):
    """Return the positions in a file where a record ends."""
    ends, place, content = [], 0, path.read_bytes()
    while place < len(content):
        place += 16 + struct.unpack_from("<Q", content, place)[0]
        ends.append(place)
    return ends


def test_what_was_written_is_read(written, decades_of):
    track = read(written(layers=3, steps=50)).tracks["gradguard"]
    assert track.layers == ("net.blocks.0", "net.blocks.1", "net.blocks.2")
    assert list(track.rows) == list(range(50))
    for step, row in track.rows.items():
        expected = [decades_of("healthy", i / 2, step / 50) for i in range(3)]
        assert row[1:].tolist() == pytest.approx(expected, abs=0.005)
        assert row[0] == (step % 7 == 3)
    assert track.scalars["clipped_total"][49] == 7
    assert track.histograms.keys() == {f"net.blocks.{i}.weight" for i in range(3)}
    assert sum(track.histograms["net.blocks.0.weight"][40]) > 1000


def test_losses_are_the_trainings_own(written):
    run = read(written(steps=50))
    assert run.losses.keys() == {"train_loss"}
    assert run.losses["train_loss"][40] == pytest.approx(2 - 40 / 50)


def test_rows_do_not_grow_with_the_run(written):
    assert len(read(written(layers=2, steps=4000, every=500, kind="nan")).tracks["gradguard"].rows) < 4 * (
        128 + 64 * 5
    )


def test_nonfinite_and_missing_gradients_are_told_apart(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        rows = [(3, [2.0, math.nan, -math.inf, -2.5])]
        record = LogRecord(
            rows={"gradguard/layer_rms_log10": rows},
            columns={"gradguard/layer_rms_log10": ["mark", "a", "b", "c"]},
        )
        TensorBoardSink(writer).write(10, record)
    track = read(tmp_path).tracks["gradguard"]
    assert track.layers == ("a", "b", "c")
    np.testing.assert_equal(track.rows[3].tolist(), [2.0, math.nan, -math.inf, -2.5])


@pytest.mark.parametrize("cut", ["within", "between"])
def test_a_file_that_was_cut_off_is_read_up_to_there(written, cut):
    folder = written(steps=100)
    whole = read(folder)
    assert not whole.damaged
    path = file_of(folder)
    end = ends_of_records(path)[60]
    path.write_bytes(path.read_bytes()[: end + (5 if cut == "within" else 0)])
    part = read(folder)
    assert part.damaged == ([path.name] if cut == "within" else [])
    rows = part.tracks["gradguard"].rows
    assert 20 < len(rows) < len(whole.tracks["gradguard"].rows)
    assert list(rows) == list(whole.tracks["gradguard"].rows)[: len(rows)]


def test_a_flipped_bit_is_detected(written):
    folder = written(steps=100)
    path = file_of(folder)
    content = bytearray(path.read_bytes())
    content[ends_of_records(path)[60] + 20] ^= 1
    path.write_bytes(content)
    assert len(list(RawEventFileLoader(str(path)).Load())) == 61
    assert read(folder).damaged == [path.name]


def test_a_resumed_run_is_joined_and_its_later_steps_count(begun, decades_of):
    begun(steps=100).write(0, 80)
    state = begun("other", steps=100)
    state.write(0, 50)
    again = begun(steps=100, kind="vanishing")
    again.overview.load_state_dict(state.overview.state_dict())
    again.write(50, 100)
    run = read(again.folder)
    track = run.tracks["gradguard"]
    assert run.files == 2
    assert list(track.rows) == list(range(100))
    for step, kind in ((49, "healthy"), (70, "vanishing")):
        assert track.rows[step][1] == pytest.approx(decades_of(kind, 0, step / 100), abs=0.005)
    assert list(track.scalars["clip_scale"])[-6:] == [50, 60, 70, 80, 90, 99]
    assert track.scalars["clipped_total"][99] == 14


def write_parts(folder, *parts):
    """Write an event file for each part: pairs of step and record."""
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        with SummaryWriter(folder, filename_suffix=f".{number}") as writer:
            sink = TensorBoardSink(writer)
            for step, record in part:
                sink.write(step, record)
            sink.close()
    return read(folder).tracks["gradguard"]


def test_of_what_a_resumed_run_no_longer_logs_the_steps_before_it_are_kept(tmp_path):
    first = [(step, LogRecord({"gradguard/clip_scale": 1.0})) for step in range(6)]
    second = [(step, LogRecord({"gradguard/total_norm_log10": 1.0})) for step in range(3, 8)]
    scalars = write_parts(tmp_path / "run", first, second).scalars
    assert list(scalars["clip_scale"]) == [0, 1, 2]
    assert list(scalars["total_norm_log10"]) == [3, 4, 5, 6, 7]


def test_rows_and_tables_of_a_resumed_run_begin_with_its_first_step(tmp_path):
    tag, names = "gradguard/layer_rms_log10", {"gradguard/layer_rms_log10": ["mark", "a"]}
    rows = [LogRecord(rows={tag: [(step, [0.0, -1.0]) for step in steps]}, columns=names)
            for steps in ((0, 2, 4, 6), (3, 5, 7))]  # fmt: skip
    tables = [
        [(step, exponents_record({"w": [1.0] * 13}, ["w"], step=step)) for step in steps]
        for steps in ((0, 2, 4, 6), (3, 5, 7))
    ]
    track = write_parts(
        tmp_path / "run", *([(6, row), *table] for row, table in zip(rows, tables, strict=True))
    )
    assert list(track.rows) == [0, 2, 3, 5, 7]
    assert list(track.exponents) == [0, 2, 3, 5, 7]


def test_files_are_joined_in_the_order_in_which_they_began(tmp_path):
    """Not by their names, nor by when they ended: a process that hangs may end after its successor."""
    for name, value, times in (("2", 1.0, (10.0, 100.0)), ("1", 2.0, (50.0, 60.0))):
        with SummaryWriter(tmp_path / name) as writer:
            for step, time in enumerate(times):
                writer.add_scalar("gradguard/clip_scale", value, step, walltime=time)
        file_of(tmp_path / name).rename(tmp_path / f"events.out.tfevents.{name}")
        (tmp_path / name).rmdir()
    assert read(tmp_path).tracks["gradguard"].scalars["clip_scale"] == {0: 2.0, 1: 2.0}


def test_a_run_restarted_in_its_folder_replaces_the_old_one(written):
    written(steps=100, kind="vanishing")
    track = read(written(steps=40)).tracks["gradguard"]
    assert max(track.rows) == 39
    assert not any(record.findings for record in track.found.values())


def test_runs_below_a_folder_are_found(tmp_path, written):
    for name in ("b", "a/deep"):
        written(f"logs/{name}", steps=20)
    assert [run.name for run in read_runs([tmp_path / "logs"])] == ["a/deep", "b"]
    assert [run.name for run in read_runs([tmp_path / "logs" / "b", tmp_path / "logs" / "a"])] == [
        "b",
        "deep",
    ]


def test_what_others_log_is_no_run(tmp_path, written):
    with SummaryWriter(tmp_path / "theirs") as writer:
        writer.add_scalar("train_loss", 1.0, 0)
    with pytest.raises(ReportError, match="hold no gradguard data"):
        read_runs([tmp_path])
    written("ours", steps=20)
    assert [run.name for run in read_runs([tmp_path])] == ["ours"]


@pytest.mark.parametrize("content", [None, b"", b"not a record at all, by its checksum"])
def test_a_folder_without_events_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "events.out.tfevents.1.x").write_bytes(content)
    expected = "holds no TensorBoard event files" if content is None else "hold no gradguard data"
    with pytest.raises(ReportError, match=expected):
        read_runs([tmp_path])


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ReportError, match="nowhere is not a folder"):
        read_runs([tmp_path / "nowhere"])


def test_histograms_are_read_with_empty_bins_joined_and_as_older_files_have_them(tmp_path):
    counts = np.random.default_rng(0).integers(0, 2, 30).astype(np.float32)
    counts[[0, 29]] = 3, 7
    whole = np.stack([EDGES[:-1], EDGES[1:], counts], axis=1).astype(np.float32)
    with SummaryWriter(tmp_path) as writer:
        sink = TensorBoardSink(writer)
        sink.write(0, LogRecord(histograms={"gradguard_hist_log10/000_a": counts.tolist()}))
        sink.write(1, LogRecord(histograms={"gradguard_hist_log10/000_a": [0.0] * 30}))
        older = TensorProto(dtype="DT_FLOAT", tensor_content=whole.tobytes())
        older.tensor_shape.MergeFrom(TensorShapeProto(dim=[{"size": 30}, {"size": 3}]))
        value = Summary.Value(tag="gradguard_hist_log10/000_a", tensor=older)
        writer._get_file_writer().add_summary(Summary(value=[value]), 2)
        sink.close()
    seen = read(tmp_path).tracks["gradguard"].histograms["000_a"]
    assert [seen[step].tolist() for step in range(3)] == [counts.tolist(), [0.0] * 30, counts.tolist()]


def test_what_narrow_formats_lose_is_the_newest_text(tmp_path):
    for begin in (0, 20):
        with SummaryWriter(tmp_path, filename_suffix=str(begin)) as writer:
            sink = TensorBoardSink(writer)
            for step in range(begin, begin + 30, 10):
                record = exponents_record({"w": [1.0] * 13}, ["w"], step=step, group="gradguard_1")
                sink.write(step, record)
            sink.close()
    track = read(tmp_path).tracks["gradguard_1"]
    assert list(track.exponents) == [0, 10, 20, 30, 40]
    assert all(f"step {step}" in text for step, text in track.exponents.items())
    assert not track.scalars


def test_histograms_of_values_are_known_but_not_mixed_with_the_others(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        sink = TensorBoardSink(writer)
        sink.write(0, histogram_record({"w": [1.0] * 30}, limits={"w": 2.0}))
        sink.close()
    track = read(tmp_path).tracks["gradguard"]
    assert track.values == {"w"}
    assert not track.histograms


#: Recorded from the last version that wrote no JSON.
RECORDED = (
    "### two\n\n---\n\n### one\n\n* a\n\n---\n\n### Found, newest first\n\n"
    "* step 12,345: **spike** (info), norm in median, usual 3, limit x 1.23e+07, limit 5, in `net.0.weight`\n"
    "* step 12,345: **vanishing_in_time** (critical), tilt over time, decades 4.26, limit 3, "
    "in `net.0.weight`, `net.1.weight`, `a, in `b`` and 2 more\n"
    "* step 4: **nonfinite** (warning), NonFinite inf, limit 0"
)


def test_a_recorded_text_is_parsed():
    found = parse_old_text(RECORDED)
    names = ("net.0.weight", "net.1.weight", "a, in `b`", "", "")
    assert found == FoundRecord(
        (
            LoggedFinding(4, "nonfinite", Severity.WARNING, (), math.inf, 0.0, "NonFinite"),
            LoggedFinding(
                12_345, "vanishing_in_time", Severity.CRITICAL, names, 4.26, 3.0, "tilt over time, decades"
            ),
            LoggedFinding(
                12_345,
                "spike",
                Severity.INFO,
                ("net.0.weight",),
                1.23e7,
                5.0,
                "norm in median, usual 3, limit x",
            ),
        ),
        ("### one\n\n* a", "### two"),
    )
    assert found.findings[1].evidence == (
        "Tilt over time, decades: 4.26 (limit 3), worst in `net.0.weight`, `net.1.weight`, `a, in `b`` and 2 more"
    )


def test_an_old_event_file_is_reported(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        sink = TensorBoardSink(writer)
        record = LogRecord({"gradguard/clip_scale": 1.0}, texts={"gradguard/diagnosis": RECORDED})
        for step in range(2):
            sink.write(step, record)
        sink.close()
    (run,) = read_runs([tmp_path])
    (sheet,) = sheets_of(run)
    assert sheet.verdict.level == "critical"
    assert [group.count for group in sheet.groups] == [1, 1, 1]
    assert sheet.diagnoses == ["### two", "### one\n\n* a"]


@pytest.mark.parametrize("text", ["", "words", "* step x: **spike** (info), a 1, limit 2", "---\n\n* step"])
def test_other_text_is_no_finding(text):
    assert parse_old_text(text) == FoundRecord()


#: Tag, and what someone else has written there.
FOREIGN = [
    ("gradguard/diagnosis", np.float32(1.0)),
    ("gradguard/findings", np.float32(1.0)),
    ("gradguard/layer_rms_log10", np.float32(1.0)),
    ("gradguard/layer_rms_log10", np.zeros((2, 3), np.float32)),
    ("gradguard_hist_log10/000_a", np.float32(1.0)),
    ("gradguard_hist_log10/000_a", np.full((4, 3), np.nan, np.float32)),
    ("gradguard_hist_log10/000_a", np.array([[1e9, 1e10, 3.0]], np.float32)),
    ("gradguard_exponents/a", np.float32(1.0)),
    ("gradguard/total_norm_log10", np.zeros(7, np.float32)),
]


@pytest.mark.parametrize(("tag", "value"), FOREIGN)
def test_a_foreign_record_is_left_out_and_said(tmp_path, tag, value):
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("gradguard/total_norm_log10", 1.0, 0)
        writer.add_scalar("gradguard/total_norm_log10", 2.0, 2)
        tensor = make_tensor_proto(value)
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, tensor=tensor)]), 1)
    run = read(tmp_path)
    (sheet,) = sheets_of(run)
    assert render([sheet])
    assert run.tracks["gradguard"].scalars["total_norm_log10"] == {0: 1.0, 2: 2.0}
    is_ignored = tag == "gradguard/total_norm_log10"  # as any other tensor under a tag that holds numbers
    assert dict(run.unreadable) == ({} if is_ignored else {tag: 1})
    assert any("is left out" in notice and tag in notice for notice in sheet.notices) != is_ignored


@given(st.data())
def test_no_record_under_our_tags_raises(data):
    names = ("findings", "diagnosis", "layer_rms_log10", "clip_scale", "clipped_total", "depth_tilt_decades")
    tags = [
        *(f"gradguard/{name}" for name in names),
        *("gradguard_1/clip_scale", "gradguard_hist_log10/000_a", "gradguard_exponents/a"),
    ]
    records = ['{"findings": 1}', '{"findings": [{}], "diagnoses": []}', "null", "\u20ac"]
    texts = st.sampled_from(["", "[]", "{}", *records])
    numbers = st.lists(st.floats(width=32), max_size=6).map(lambda x: np.array(x, np.float32))
    shapes = st.sampled_from([(-1,), (-1, 1), (1, -1)])
    values = texts | st.builds(lambda x, shape: x.reshape(shape), numbers.filter(len), shapes)
    columns = data.draw(st.sampled_from([b"", b"[]", b'["a", "b"]', b"{}", b"x", b"[1, 2]"]))
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            writer.add_scalar("gradguard/total_norm_log10", 1.0, 0)
            for step in range(3):
                value = Summary.Value(tag=data.draw(st.sampled_from(tags)))
                drawn = data.draw(values)
                tensor = (
                    make_tensor_proto(drawn)
                    if not isinstance(drawn, str)
                    else make_tensor_proto([drawn.encode()])
                )
                value.tensor.CopyFrom(tensor)
                value.metadata.plugin_data.content = columns
                writer._get_file_writer().add_summary(Summary(value=[value]), step)
        (run,) = read_runs([Path(folder)])
        assert render(sheets_of(run))
