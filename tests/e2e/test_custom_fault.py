"""Custom faults, from detector to halt.

They also appear in everything that a run leaves behind.
"""

import logging
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import (
    Fault,
    GradGuard,
    GradientHalt,
    GradientWarning,
    NonFinite,
    Policy,
    Recorder,
    Severity,
    replay,
)
from lightning_gradguard.detectors.base import NoState, reading

QUANTIZED = Fault.custom("quantized")
#: Step at which gradients begin to be rounded, and further steps that this has to last to halt.
ONSET, PATIENCE = 15, 12


@dataclass(frozen=True)
class Quantized:
    """Detect rounded gradients by whole-numbered norms.

    Args:
        limit: Largest share of tensors, dimensionless.
    """

    limit: float = 0.5
    fault: ClassVar[Fault] = QUANTIZED
    measures: ClassVar[tuple[str, ...]] = ("share of tensors whose gradient norm is a whole number",)

    def init(self, stats):
        return NoState()

    def update(self, stats, state):
        is_whole = stats.norms == stats.norms.round()
        score = torch.where(is_whole, stats.norms, -math.inf)
        share = is_whole.float().mean()
        return reading(stats, share > self.limit, share, self.limit, score=score), state


class Net(pl.LightningModule):
    """Net whose sign norms are whole numbers.

    All its tensors have 4 or 16 elements.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def on_after_backward(self):
        if self.trainer.global_step >= ONSET:
            for parameter in self.parameters():
                parameter.grad.sign_()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Saver(pl.Callback):
    """Callback that saves a checkpoint during the fault.

    It is not critical yet.
    """

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == ONSET + 5:
            trainer.save_checkpoint("active.ckpt")


def make_guard(response="halt", **options):
    policy = Policy(respond={"quantized": response}, patience=PATIENCE)
    return GradGuard(detectors=[NonFinite(), Quantized()], policy=policy, **options)


def fit(*callbacks, ckpt_path=None, **options):
    options = {"logger": False, "log_every_n_steps": 5, **options}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    trainer.fit(Net(), DataLoader(TensorDataset(x, x.argmax(1)), 8), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    """Return a run that the fault halts.

    Guard, error, warnings, lines of the run summary, and its folder.
    """
    folder = tmp_path_factory.mktemp("halted")
    guard, lines = make_guard(recorder=Recorder(folder=folder / "flights")), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.extend(record.getMessage().splitlines())
    ours = logging.getLogger("lightning_gradguard")
    ours.addHandler(handler)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.warns(GradientWarning) as caught,
            pytest.raises(GradientHalt) as error,
        ):
            patch.chdir(folder)
            fit(guard, Saver(), logger=TensorBoardLogger(folder / "runs", name="", version=""))
    finally:
        ours.removeHandler(handler)
    said = [str(w.message) for w in caught if issubclass(w.category, GradientWarning)]
    return guard, error.value, said, lines, folder


def test_it_warns_and_then_halts_and_names_the_fault(halted):
    guard, error, said, _, _ = halted
    assert [(f.fault, f.severity, f.step) for f in guard.findings] == [
        (QUANTIZED, Severity.WARNING, ONSET),
        (QUANTIZED, Severity.CRITICAL, ONSET),
    ]
    assert len(said) == 1
    assert said[0].startswith(f"GradGuard: quantized since step {ONSET}, worst in net.")
    assert "Share of tensors whose gradient norm is a whole number: 1 (limit 0.5)" in said[0]
    assert error.step == ONSET + PATIENCE
    assert error.diagnosis.fault is QUANTIZED
    assert "quantized" in str(error).splitlines()[0]
    assert (guard.stop_reason, guard.diagnosis) == ("quantized", error.diagnosis)
    assert guard.report.skip


def test_tensorboard_has_the_finding(halted):
    *_, folder = halted
    written = EventAccumulator(str(folder / "runs"), size_guidance={"tensors": 0}).Reload()
    text = make_ndarray(written.Tensors("gradguard/diagnosis")[-1].tensor_proto)[()].decode()
    assert f"* **quantized** (critical) since step {ONSET:,}." in text
    assert f"* **quantized** (warning) since step {ONSET:,}." in text
    assert written.Images("0_gradguard/heatmap")


def test_the_run_summary_has_the_finding(halted):
    guard, _, _, lines, _ = halted
    (line,) = [line for line in lines if line.startswith("quantized")]
    assert f"critical, once, first at step {ONSET} in {guard.findings[0].parameters[0]}" in line
    assert any(line.split() == ["halted", "because", "of", "quantized"] for line in lines)


def test_the_flight_record_has_the_finding(halted):
    guard, error, *_ = halted
    bundle = torch.load(guard.bundle, weights_only=True)
    assert (bundle["reason"], bundle["step"]) == ("halt", error.step)
    assert bundle["target"]["fault"] == bundle["findings"][-1]["fault"] == "quantized"
    assert bundle["diagnosis"]["data"]["fault"] == "quantized"
    assert f"Flight record: {guard.bundle}" in str(error).replace("flights/", f"{guard.bundle.parent}/")
    assert str(replay(guard.bundle, Net()))


@pytest.mark.filterwarnings(
    "ignore::lightning_gradguard.GradientWarning",
    "ignore:You're resuming from a checkpoint that ended before",
)
def test_a_run_that_resumes_with_the_active_fault_halts_at_the_same_step(halted):
    *_, error, _, _, folder = halted
    guard = make_guard()
    with pytest.raises(GradientHalt) as caught:
        fit(guard, ckpt_path=folder / "active.ckpt")
    assert caught.value.step == error.step
    assert [(f.severity, f.step) for f in guard.findings] == [(Severity.CRITICAL, ONSET)]
    # Weights and plain types only.
    torch.load(folder / "active.ckpt", weights_only=True)


@pytest.mark.parametrize(("response", "skipped"), [("warn", 0), ("ignore", 0), ("skip", 6)])
@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_other_responses(response, skipped):
    guard = make_guard(response)
    if response == "skip":
        with pytest.raises(GradientHalt):
            fit(guard)
    else:
        fit(guard)
    assert guard.summary["skipped"] == skipped
    assert bool(guard.findings) == (response != "ignore")
    assert guard.stop_reason == ("quantized" if response == "skip" else None)


COMMAND = "import sys; from lightning_gradguard.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("command", [["report", "runs", "--out", "page.html"], ["replay", "BUNDLE"]])
def test_the_command_line_needs_no_detector(halted, command):
    """Read the run in a process without the fault."""
    guard, *_, folder = halted
    arguments = [str(guard.bundle) if part == "BUNDLE" else part for part in command]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    shown = Path(folder, "page.html").read_text() if command[0] == "report" else done.stdout
    assert "quantized" in shown
