"""Damaged and foreign event files: the report shows what can be read and says what could not, without a traceback."""

import contextlib
import io
import random
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.cli import main
from lightning_gradguard.html_report import event_reader
from lightning_gradguard.html_report.event_reader import ReportError, parse_old_text, read_runs
from lightning_gradguard.html_report.render import write_report
from lightning_gradguard.html_report.summary import sheets_of
from lightning_gradguard.loggers.findings import FoundRecord
from tests.html_report.conftest import Writing
from tests.html_report.damaged_events import damage, foreign_event, framed, records_of

many = settings(max_examples=4 * settings.default.max_examples)
NAME = "events.out.tfevents.1.host"


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """Bytes of whole event files, of three runs of 20 steps."""
    files = []
    for number, (layers, kind) in enumerate([(3, "healthy"), (4, "nan"), (3, "vanishing")]):
        folder = tmp_path_factory.mktemp("runs") / str(number)
        Writing(folder, layers=layers, kind=kind, steps=20, diagnosis="### Why", every=3).write()
        files += [path.read_bytes() for path in folder.iterdir()]
    return files


def report(folder, page):
    """Run the command; return its status, what it printed, and its error."""
    printed, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(error):
        status = main(["report", str(folder), "--out", str(page)])
    return status, printed.getvalue(), error.getvalue()


@many
@given(st.integers(0, 2**32))
def test_what_can_be_read_is_shown(whole_files, seed):
    source = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, page = Path(name) / "run", Path(name) / "page.html"
        folder.mkdir()
        damage(folder, source.choice(whole_files), source.choice(whole_files), source)
        status, printed, error = report(folder, page)
        assert all(c.isprintable() or c == "\n" for c in printed + error)
        if status == 0:
            assert not error
            assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        else:
            assert status == 2
            assert error.startswith("gradguard report: ")
            assert error.count("\n") == 1
            assert not page.exists()


@many
@given(st.integers(0, 2**32))
def test_foreign_records_take_nothing_from_the_others(whole_files, seed):
    source = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = records_of(whole_files[0])
        # Under tags that the run does not use, after a step at which it has ended.
        for _ in range(5):
            event = foreign_event(source)
            event.step = 50
            for value in event.summary.value:
                value.tag = "gradguard_hist_log10/999_x"
            records.insert(source.randrange(len(records) + 1), framed(event.SerializeToString()))
        (folder / NAME).write_bytes(b"".join(records))
        (run,) = read_runs([folder])
        assert list(run.tracks["gradguard"].rows) == list(range(20))
        assert run.tracks["gradguard"].scalars["clipped_total"][19] == 3
        assert not run.damaged


@pytest.fixture
def written(tmp_path):
    """Write values as the events of one run; return its folder."""

    def write(*values, **more):
        with SummaryWriter(tmp_path) as writer:
            writer.add_scalar("gradguard/total_norm_log10", 1.0, 0)
            for step, value in enumerate(values):
                writer._get_file_writer().add_summary(Summary(value=[value]), step)
        return tmp_path

    return write


def value_of(tag, tensor, columns=b""):
    value = Summary.Value(tag=tag, tensor=tensor)
    value.metadata.plugin_data.content = columns
    return value


def test_a_whole_record_that_is_no_event_is_left_out_and_said(whole_files, tmp_path):
    records = records_of(whole_files[0])
    records[3:3] = [framed(b"\xff\xff nothing"), framed(b"\xff")]
    (tmp_path / NAME).write_bytes(b"".join(records))
    (run,) = read_runs([tmp_path])
    assert run.undecoded == {NAME: 2}
    assert list(run.tracks["gradguard"].rows) == list(range(20))
    (sheet,) = sheets_of(run)
    assert f"2 records are left out of `{NAME}`: what they hold is no event." in sheet.notices


def test_a_file_that_cannot_be_read_is_said_and_the_others_are_shown(whole_files, tmp_path, monkeypatch):
    locked, open_path = "events.out.tfevents.2.host", Path.open

    def refuse(path, *arguments, **options):
        if path.name == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return open_path(path, *arguments, **options)

    (tmp_path / locked).write_text("x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        ReportError, match=rf"no gradguard data \({locked} cannot be read: Permission denied\); log it"
    ):
        read_runs([tmp_path])
    monkeypatch.undo()
    (tmp_path / NAME).write_bytes(whole_files[0])
    monkeypatch.setattr(Path, "open", refuse)
    (run,) = read_runs([tmp_path])
    (sheet,) = sheets_of(run)
    assert f"`{locked}` cannot be read: Permission denied." in sheet.notices
    assert len(run.tracks["gradguard"].rows) == 20


def test_without_data_the_damage_is_named(whole_files, tmp_path):
    (tmp_path / NAME).write_bytes(whole_files[0][:30])
    with pytest.raises(ReportError, match=rf"no gradguard data \({NAME} is cut off or corrupt\); log it"):
        read_runs([tmp_path])


@pytest.mark.parametrize("length", [2**31, 2**40, 2**63, 2**64 - 1])
def test_a_claim_of_a_long_record_ends_the_file_and_reserves_nothing(
    whole_files, tmp_path, length, monkeypatch
):
    header = framed(struct.pack("<Q", length))[8:12]  # not its checksum, which is not looked at
    claim = struct.pack("<Q", length) + header + b"x" * 20
    (tmp_path / NAME).write_bytes(whole_files[0] + claim)
    (run,) = read_runs([tmp_path])
    assert run.damaged == [NAME]
    assert list(run.tracks["gradguard"].rows) == list(range(20))


@pytest.mark.parametrize(
    "tag", ["gradguard/layer_rms_log10", "gradguard_hist_log10/000_a", "gradguard/clip_scale"]
)
@pytest.mark.parametrize("sizes", [[10**12], [10**6, 3], [2**62, 8]])
def test_a_tensor_of_more_numbers_than_bytes_is_not_unpacked(written, tag, sizes, monkeypatch):
    monkeypatch.setattr(event_reader, "make_ndarray", lambda tensor: pytest.fail("it was unpacked"))
    shape = TensorShapeProto(dim=[{"size": size} for size in sizes])
    folder = written(value_of(tag, TensorProto(dtype="DT_FLOAT", tensor_shape=shape, float_val=[1.0])))
    (run,) = read_runs([folder])
    assert dict(run.unreadable) == {tag: 1}


@pytest.mark.parametrize(
    ("row", "columns"),
    [([1.0], b'["mark"]'), ([0.0, 400.0], b'["mark", "a"]'), ([0.0, np.inf], b'["mark", "a"]')],
    ids=["no layer", "too large", "infinite"],
)
def test_what_is_no_row_of_the_heat_map_is_left_out(written, tmp_path, row, columns):
    tag = "gradguard/layer_rms_log10"
    folder = written(value_of(tag, make_tensor_proto(np.array(row, np.float32)), columns))
    (sheet,) = write_report([folder], tmp_path / "page.html")
    assert any(tag in notice and "left out" in notice for notice in sheet.notices)


def test_rows_of_other_layers_within_a_file_begin_anew(written, tmp_path):
    tag = "gradguard/layer_rms_log10"
    rows = [value_of(tag, make_tensor_proto(np.zeros(1 + n, np.float32)), c) for n, c in (
        (1, b'["mark", "a"]'), (2, b'["mark", "a", "b"]'), (2, b""))]  # fmt: skip
    (run,) = read_runs([written(*rows)])
    assert run.tracks["gradguard"].layers == ("a", "b")
    assert list(run.tracks["gradguard"].rows) == [1, 2]
    assert write_report([tmp_path], tmp_path / "page.html")


@pytest.mark.parametrize("count", [1e30, -1e30, np.inf])
def test_counts_that_no_tensor_has_are_no_histogram(written, tmp_path, count):
    table = np.array([[-8.0, -7.5, count]], np.float32)
    folder = written(value_of("gradguard_hist_log10/000_a", make_tensor_proto(table)))
    (run,) = read_runs([folder])
    assert dict(run.unreadable) == {"gradguard_hist_log10/000_a": 1}


def test_a_run_that_was_begun_again_without_a_tensor_is_reported(begun, tmp_path):
    begun(layers=3, steps=20).write()
    begun(layers=2, steps=40).write()
    folder = tmp_path / "run"
    (run,) = read_runs([folder])
    assert all(run.tracks["gradguard"].histograms.values())
    assert len(run.tracks["gradguard"].histograms) == 2
    assert write_report([folder], tmp_path / "page.html")


LINE = "* step {step}: **spike** (info), times {value}, limit {limit}, in `a` and {more} more"


@pytest.mark.parametrize(
    "changes",
    [
        {"value": "x"}, {"limit": "x"}, {"step": ","}, {"step": "9" * 5000}, {"more": "9" * 12}, {"value": "1 " * 3000},
    ],
    ids=str,
)  # fmt: skip
def test_an_old_line_whose_numbers_are_none_is_no_finding(changes):
    line = LINE.format(**{"step": 1, "value": 2, "limit": 3, "more": 4})
    assert len(parse_old_text(line).findings) == 1
    broken = LINE.format(**{"step": 1, "value": 2, "limit": 3, "more": 4, **changes})
    assert parse_old_text(f"{line}\n{broken}\n{line}").findings == parse_old_text(f"{line}\n{line}").findings


def test_half_a_surrogate_and_control_characters_are_replaced(written, tmp_path, capsys):
    text = (
        '{"findings": [{"step": 1, "fault": "odd\\u001b[2J\\ud800", "severity": "critical", "parameters": [], '
        '"value": 1, "limit": 1, "measure": "\\ud800"}], "diagnoses": ["\\ud800"]}'
    )
    assert FoundRecord.from_json(text)
    folder = written(value_of("gradguard/findings", make_tensor_proto([text.encode()])))
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "critical. Up to step 0: custom fault odd?[2J?" in capsys.readouterr().out
    assert "odd" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_events_without_a_summary_are_no_damage(whole_files, tmp_path):
    empty = [Event(step=1), Event(), Event(step=3, summary=Summary())]
    (tmp_path / NAME).write_bytes(
        b"".join(framed(event.SerializeToString()) for event in empty) + whole_files[0]
    )
    (run,) = read_runs([tmp_path])
    assert (run.damaged, dict(run.unreadable), dict(run.undecoded)) == ([], {}, {})
