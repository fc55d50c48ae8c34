"""Event files of versions that wrote findings only as text."""

import math

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.html_report.event_reader import read_runs
from lightning_gradguard.html_report.old_text import parse_old_text
from lightning_gradguard.html_report.summary import sheets_of
from lightning_gradguard.loggers.base import LogRecord
from lightning_gradguard.loggers.findings import FoundRecord, LoggedFinding
from lightning_gradguard.loggers.tensorboard import TensorBoardSink
from lightning_gradguard.results import Severity

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
