"""The end of real trainings, as `gradguard report` reads it."""

import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradientHalt, Policy
from lightning_gradguard.html_report.event_reader import read_runs
from lightning_gradguard.html_report.summary import sheets_of
from lightning_gradguard.testing import FaultInjector, NaN

WIDTH = 8


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class At(pl.Callback):
    """Call a function once so many steps are taken."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.act(trainer)


def fit(*callbacks, epochs=4, every=5, ckpt_path=None, policy=None, spoil=()):
    """Train 32 steps, or fewer, with NaN in some batches."""
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH)
    y = x.sum(1, keepdim=True)
    for row in spoil:
        x[row] = torch.nan
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger("runs", name="", version=""),
        callbacks=[GradGuard(policy=policy), *callbacks],
        log_every_n_steps=every,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Net(), DataLoader(TensorDataset(x, y), 8), ckpt_path=ckpt_path)


def verdict():
    (run,) = read_runs([Path("runs")])
    (sheet,) = sheets_of(run)
    return sheet.verdict


def fail(error):
    def act(trainer):
        raise error

    return act


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("every", [1, 5, 1000])
def test_a_finished_training(every):
    fit(every=every)
    assert str(verdict()) == "Finished: healthy; 32 steps, none skipped."


def test_a_training_whose_bad_steps_were_skipped_is_protected():
    fit(spoil=[9])
    assert str(verdict()) == "Finished: protected; 4 of 32 steps had NaN or Inf and were skipped."
    assert verdict().level == "protected"


class CustomError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "ended", "level"),
    [
        (ValueError("no"), "Ended by an error (ValueError) at step 12", "warning"),
        (CustomError(), "Ended by an error (CustomError) at step 12", "warning"),
        (KeyboardInterrupt(), "Interrupted at step 12", "healthy"),
    ],
)
def test_a_training_that_did_not_come_to_its_end(error, ended, level):
    # Lightning exits, or returns, after an interrupt.
    with pytest.raises((type(error), SystemExit)):
        fit(At(12, fail(error)))
        raise SystemExit
    assert verdict().title == f"{ended}: healthy"
    assert verdict().level == level


@pytest.mark.parametrize(("stop", "ended"), [("raise", "Halted"), ("graceful", "Stopped")])
def test_a_halted_training(stop, ended):
    policy = Policy(respond={"nonfinite": "halt"}, stop=stop)
    with pytest.raises((GradientHalt, SystemExit)) as halt:
        fit(policy=policy, spoil=[25])
        raise SystemExit
    assert isinstance(halt.value, GradientHalt) == (stop == "raise")
    assert verdict().title == f"{ended} before step 3: gradients or loss are NaN or Inf"
    assert verdict().level == "critical"


def test_a_killed_training_has_no_end():
    pid = os.fork()
    if not pid:  # pragma: no cover
        try:
            fit(At(12, lambda trainer: os._exit(9)), every=1)
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    assert verdict().ended.startswith("No end recorded at step ")


@pytest.mark.parametrize("again", [False, True])
def test_of_a_resumed_training_the_later_end_counts(again):
    def stop(trainer):
        trainer.save_checkpoint("run.ckpt")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fit(At(12, stop))
    assert verdict().ended == "Ended by an error (ValueError) at step 12"
    if again:
        with pytest.raises(CustomError):
            fit(At(20, fail(CustomError())), ckpt_path="run.ckpt")
        assert verdict().ended == "Ended by an error (CustomError) at step 20"
    fit(ckpt_path="run.ckpt")
    assert str(verdict()) == "Finished: healthy; 32 steps, none skipped."


def test_a_training_begun_anew_in_its_folder_replaces_the_end():
    with pytest.raises(ValueError, match="no"):
        fit(At(12, fail(ValueError("no"))))
    fit()
    assert verdict().ended == "Finished"


def test_findings_of_the_last_logged_step_are_kept_beside_the_end():
    fit(spoil=[60], every=1)  # the last batch of each epoch
    (run,) = read_runs([Path("runs")])
    (sheet,) = sheets_of(run)
    assert max(finding.step for finding in sheet.findings) == 31
    assert sheet.verdict.ended == "Finished"
    assert sheet.verdict.state == "gradients or loss are NaN or Inf"


def test_a_rolled_back_training_is_protected():
    policy = Policy(respond={"nonfinite": "rollback"}, max_consecutive_skips=1, snapshot_every=5)
    fit(FaultInjector(NaN(at=(20, 21))), policy=policy)
    assert verdict().level == "protected"
