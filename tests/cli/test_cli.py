"""The command: what it prints, returns and writes."""

import re
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.cli import main
from lightning_gradguard.cli.cost import rounds
from lightning_gradguard.loggers.overview import Overview
from lightning_gradguard.loggers.tensorboard import TensorBoardSink
from lightning_gradguard.results import Report


@pytest.fixture
def run():
    """A folder with a run of three steps."""
    view = Overview(["a.weight"], [4])
    with SummaryWriter("runs/mine") as writer:
        sink = TensorBoardSink(writer)
        for step in range(3):
            report = Report(step, 1.0, 0.5, 0.5, None, 1.0, skip=False, norms={"a.weight": 0.5})
            view.observe(report)
            sink.write(step, view.build_record(report))
    return Path("runs/mine")


def test_report_writes_a_page_and_says_what_it_found(run, capsys):
    assert main(["report", str(run), "--out", "page.html"]) == 0
    printed = capsys.readouterr().out
    assert "mine: healthy. No end recorded at step 2 (still running, or killed): healthy" in printed
    assert "Wrote page.html (" in printed
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_page_is_called_report_by_default(run, capsys):
    assert main(["report", "runs"]) == 0
    assert Path("report.html").exists()


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["empty"], "empty holds no TensorBoard event files"),
        (["nowhere"], "nowhere is not a folder"),
        (["runs", "empty"], "empty holds"),
    ],
)
def test_without_a_run_nothing_is_written(run, capsys, folders, words):
    Path("empty").mkdir()
    assert main(["report", *folders]) == 2
    assert f"gradguard report: {words}" in capsys.readouterr().err
    assert not Path("report.html").exists()


def test_a_page_that_cannot_be_written_is_an_error_without_a_traceback(run, capsys):
    assert main(["report", str(run), "--out", "no/such/folder/page.html"]) == 2
    assert (
        capsys.readouterr().err == "gradguard report: no/such/folder/page.html: No such file or directory\n"
    )


@pytest.mark.parametrize("arguments", [[], ["report"], ["nonsense"]])
def test_a_wrong_command_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: gradguard" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "report", "replay", "checkup", "cost"])
def test_the_help_of_a_command_has_a_sentence_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert re.search(r"\.\s+(positional|options)", printed)
    assert f"\nexample: gradguard {command}" in printed


@pytest.mark.parametrize("name", ["make", "model", "Holder.make"])
def test_cost_shows_a_row_for_each_arm(models, capsys, name):
    assert main(["cost", f"{models}:{name}", "--steps", "8", "--clipper", "AutoClip"]) == 0
    printed, progress = capsys.readouterr()
    assert "25 parameters in 4 tensors, cpu" in printed
    total = rounds(8)
    assert progress.splitlines()[-1] == f"Timing steps: {total} of {total}"
    for arm in ("bare norm", "clip_grad_norm_", "Guard ", "Guard, AutoClip"):
        assert any(line.strip().startswith(arm) for line in printed.splitlines())
    assert "1.00 (1.00–1.00)" in printed


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("models_to_cost", "the model must be MODULE:NAME, such as train:Model, got 'models_to_cost'"),
        ("models_to_cost:mak", "models_to_cost has no 'mak'; did you mean make?"),
        ("models_to_cost:needs", "cannot call models_to_cost:needs without arguments: TypeError: needs() missing"),
        ("models_to_cost:five", "must be a model, or return one when called, got int"),
        ("models_to_cost:nothing", "must return an nn.Module, got int"),
        ("models_to_cost:frozen", "must have trainable parameters, got none"),
        ("models_to_cost:lazy", "must have parameters with values, got lazy or meta ones"),
    ],
)  # fmt: skip
def test_an_unusable_model_is_an_error_without_a_traceback(models, capsys, spec, words):
    assert main(["cost", spec]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gradguard cost: ")
    assert words in error
    assert error.count("\n") == 1


def test_an_unknown_clipper_is_answered_with_the_nearest(models, capsys):
    assert main(["cost", f"{models}:make", "--clipper", "Spikeclip"]) == 2
    assert (
        "--clipper must be one of SteadyClip, SpikeClip, AGC, AutoClip, ZClip, AdaGC, got 'Spikeclip'; "
        "did you mean SpikeClip?" in capsys.readouterr().err
    )


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_steps_must_be_positive(capsys, steps):
    with pytest.raises(SystemExit):
        main(["cost", "models:make", "--steps", steps])
    assert f"must be 1 or more, got {steps}" in capsys.readouterr().err
