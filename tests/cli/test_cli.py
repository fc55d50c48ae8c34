"""The command's face: what it prints, what it returns, what it writes."""

import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.cli import main
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


MODELS = """
from torch import nn

def make(): return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
def needs(width): return nn.Linear(width, 1)
def nothing(): return 5
def frozen(): return nn.Linear(2, 1).requires_grad_(False)
def lazy(): return nn.LazyLinear(2)
model = make()
five = 5
class Holder:
    Model = nn.Bilinear
    make = staticmethod(make)
"""


@pytest.fixture
def models():
    """A module with models good and bad, in the current folder."""
    Path("models_to_cost.py").write_text(MODELS)
    yield "models_to_cost"
    sys.modules.pop("models_to_cost", None)


@pytest.mark.parametrize("name", ["make", "model", "Holder.make"])
def test_cost_shows_a_row_for_each_arm(models, capsys, name):
    assert main(["cost", f"{models}:{name}", "--steps", "8", "--clipper", "AutoClip"]) == 0
    printed = capsys.readouterr().out
    assert "25 parameters in 4 tensors, cpu" in printed
    for arm in ("bare norm", "clip_grad_norm_", "Guard ", "Guard, AutoClip"):
        assert any(line.strip().startswith(arm) for line in printed.splitlines())
    assert "1.00 (1.00–1.00)" in printed


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("models_to_cost", "must be a module and a name in it, such as train:make_model, got 'models_to_cost'"),
        (":make", "must be a module and a name in it"),
        ("model_to_cost:make", "could not be imported: ModuleNotFoundError: No module named 'model_to_cost'; "
         "did you mean models_to_cost?"),
        ("models_to_cost:mak", "there is no 'mak' in models_to_cost; did you mean make?"),
        ("models_to_cost:Holder.mak", "there is no 'mak' in models_to_cost; did you mean make?"),
        ("models_to_cost:needs", "could not be called without arguments: TypeError: needs() missing"),
        ("models_to_cost:five", "must be a model or give one when called, got int"),
        ("models_to_cost:nothing", "must give an nn.Module, got int"),
        ("models_to_cost:frozen", "must give a model with trainable parameters, got none"),
        ("models_to_cost:lazy", "whose parameters have values, got lazy or meta ones"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_no_traceback(models, capsys, spec, said):
    assert main(["cost", spec]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gradguard cost: ")
    assert said in error


def test_a_clipper_that_is_none_is_named_the_nearest(models, capsys):
    assert main(["cost", f"{models}:make", "--clipper", "Spikeclip"]) == 2
    assert (
        "--clipper must be one of SpikeClip, AGC, AutoClip, ZClip, AdaGC, got 'Spikeclip'; did you mean SpikeClip?"
        in (capsys.readouterr().err)
    )


def test_a_model_that_fails_to_import_says_why(capsys):
    Path("broken_model.py").write_text("raise RuntimeError('no data here')")
    assert main(["cost", "broken_model:make"]) == 2
    assert "broken_model could not be imported: RuntimeError: no data here" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_steps_must_be_positive(capsys, steps):
    with pytest.raises(SystemExit):
        main(["cost", "models:make", "--steps", steps])
    assert f"must be 1 or more, got {steps}" in capsys.readouterr().err
