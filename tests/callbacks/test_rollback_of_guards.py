"""Rollbacks right after a resume, and with buffers that are replaced or cannot be written to."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard, Policy, SpikeClip
from lightning_gradguard.testing import FaultInjector, NaN

BATCHES = 60


class Net(pl.LightningModule):
    def __init__(self, expanded):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        if expanded:  # no checkpoint can be loaded into it
            self.register_buffer("expanded", torch.zeros(1).expand(8))
        self.register_buffer("replaced", torch.zeros(8))

    def training_step(self, batch, number):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number))
        self.replaced = 0.9 * self.replaced + 0.1 * x.mean(0)
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch, number):
        self.replaced = self.replaced * 1.0  # which is an inference tensor from now on

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Follow(pl.Callback):
    def __init__(self, guard, path=None, at=None):
        self.guard, self.path, self.at, self.thresholds, self.replaced = guard, path, at, {}, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.thresholds[number], self.replaced[number] = self.guard.report.threshold, module.replaced.clone()
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


def fit(folder, *bad, saved=None, ckpt_path=None, expanded=False, **options):
    policy = Policy(respond={"nonfinite": "rollback"}, max_consecutive_skips=0, snapshot_every=10)
    guard = GradGuard(clipper=SpikeClip(), policy=policy)
    follow, module = Follow(guard, folder / "half.ckpt", saved), Net(expanded)
    faults = [FaultInjector(NaN(at=bad))] if bad else []
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[*faults, guard, follow], default_root_dir=folder, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = DataLoader(range(BATCHES), batch_size=None)
        trainer.fit(
            module, data, DataLoader(range(2), batch_size=None) if options else None, ckpt_path=ckpt_path
        )
    return guard, follow, module


def test_right_after_a_resume_the_guard_returns_to_the_restored_state(tmp_path):
    """And not to a new guard, whose clipper would start its warm-up again."""
    fit(tmp_path, saved=40)
    guard, follow, module = fit(tmp_path, 41, ckpt_path=tmp_path / "half.ckpt")
    assert guard.summary["rollbacks"] == 1
    # Lightning 2.4 takes the batch twice at whose end it was saved.
    assert guard.summary["judged"] == module.trainer.global_step >= BATCHES
    assert all(math.isfinite(follow.thresholds[number]) for number in range(42, BATCHES))


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 7}])
def test_buffers_that_are_expanded_or_replaced(tmp_path, options):
    guard, follow, module = fit(tmp_path, 35, expanded=True, **options)
    assert guard.summary["rollbacks"] == 1
    assert module.expanded.stride() == (0,)
    # It is back at what was kept before batch 20, and takes in batch 36.
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(36))
    torch.testing.assert_close(follow.replaced[36], 0.9 * follow.replaced[19] + 0.1 * x.mean(0))
