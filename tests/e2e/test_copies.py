"""Guards can be copied and pickled.

This holds before, during and after a training.
"""

import copy
import math
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, Policy, Recorder, SpikeClip

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda guard: pickle.loads(pickle.dumps(guard))}
OPTIONS = {
    "plain": {},
    "all": {"trials": True, "recorder": Recorder(), "policy": Policy(respond={"exploding": "rollback"})},
}


class Net(pl.LightningModule):
    """A small classifier; batches in ``bad`` are NaN."""

    def __init__(self, bad=()):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.bad = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), bad

    def training_step(self, batch, number):
        x = batch[0] * (math.nan if number in self.bad else 1.0)
        return nn.functional.cross_entropy(self.net(x), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        x = torch.randn(160, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


def trainer(folder, *callbacks, logger=False):
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, log_every_n_steps=5, callbacks=list(callbacks),
    )  # fmt: skip


@pytest.mark.parametrize("options", [pytest.param("plain", marks=pytest.mark.slow), "all"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_before_and_after_a_fit_work(tmp_path, how, options):
    guard = GradGuard(clipper=SpikeClip(), **OPTIONS[options])
    before = COPIES[how](guard)
    for one in (guard, before):
        logger = TensorBoardLogger(tmp_path)
        trainer(tmp_path, one, GradHistogram(every_n_steps=3), logger=logger).fit(Net(bad=(7,)))
    assert before.summary == guard.summary
    after = COPIES[how](guard)
    assert (after.summary, repr(after.findings)) == (guard.summary, repr(guard.findings))
    assert repr(after.state_dict()) == repr(guard.state_dict())
    trainer(tmp_path, after).fit(Net())
    assert (after.summary["judged"], after.summary["skipped"]) == (20, 0)
    assert guard.summary["skipped"] == 1


class Copying(pl.Callback):
    """Callback that copies a guard after batch 12."""

    def __init__(self, guard, how):
        self.guard, self.how = guard, how

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        if number == 12:
            self.copy = COPIES[self.how](self.guard)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_from_between_two_batches_works(tmp_path, how):
    guard = GradGuard(clipper=SpikeClip())
    copying = Copying(guard, how)
    trainer(tmp_path, guard, copying).fit(Net(bad=(7,)))
    assert (copying.copy.summary["judged"], guard.summary["judged"]) == (13, 20)
    trainer(tmp_path, copying.copy).fit(Net())
    assert (copying.copy.summary["judged"], copying.copy.summary["skipped"]) == (20, 0)
