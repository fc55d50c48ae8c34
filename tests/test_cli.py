"""The command's face: what it prints, what it returns, what it writes."""

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.cli import main
from lightning_gradguard.sinks.overview import Overview
from lightning_gradguard.sinks.tensorboard import TensorBoardSink
from lightning_gradguard.verdicts.faults import Report


@pytest.fixture
def run():
    """A folder with a run of three steps."""
    view = Overview(["a.weight"], [4])
    with SummaryWriter("runs/mine") as writer:
        sink = TensorBoardSink(writer)
        for step in range(3):
            report = Report(step, 1.0, 0.5, 0.5, None, 1.0, skip=False, norms={"a.weight": 0.5})
            view.observe(report)
            sink.write(step, view.panel(report))
    return Path("runs/mine")


def test_report_writes_a_page_and_says_what_it_found(run, capsys):
    assert main(["report", str(run), "--out", "page.html"]) == 0
    printed = capsys.readouterr().out
    assert "mine: Healthy" in printed
    assert "Wrote page.html (" in printed
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_page_is_called_report_if_nothing_is_said(run, capsys):
    assert main(["report", "runs"]) == 0
    assert Path("report.html").exists()


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["empty"], "empty holds no TensorBoard event files"),
        (["nowhere"], "nowhere is not a folder"),
        (["runs", "empty"], "empty holds"),
    ],
)
def test_without_a_run_nothing_is_written(run, capsys, folders, said):
    Path("empty").mkdir()
    assert main(["report", *folders]) == 2
    assert f"gradguard report: {said}" in capsys.readouterr().err
    assert not Path("report.html").exists()


def test_what_cannot_be_written_is_no_traceback(run, capsys):
    assert main(["report", str(run), "--out", "no/such/folder/page.html"]) == 2
    assert "gradguard report: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["report"], ["nonsense"]])
def test_a_wrong_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: gradguard" in capsys.readouterr().err
