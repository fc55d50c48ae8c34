"""Gradient scalers in unusual steps.

Lightning announces steps that it does not take, and training ends gracefully.
"""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, Policy

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning"),
    pytest.mark.filterwarnings("ignore:.*training_step.*returned.*None.*"),
]
OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
}


class Net(pl.LightningModule):
    """Net whose batches in ``absent`` have no loss.

    By hand, the loss of batch ``bad`` is NaN for the first optimizer.
    """

    def __init__(self, optimizer, absent=(), bad=None):
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])
        self.optimizer, self.absent, self.bad = optimizer, absent, bad
        self.automatic_optimization = bad is None

    def training_step(self, batch, number):
        x, y = batch
        losses = [nn.functional.cross_entropy(head(x), y) for head in self.heads]
        if self.automatic_optimization:
            return None if number in self.absent else sum(losses)
        losses[0] = losses[0] * (math.nan if number == self.bad else 1.0)
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return None

    def configure_optimizers(self):
        if self.automatic_optimization:
            return self.optimizer(self.parameters())
        return [self.optimizer(head.parameters()) for head in self.heads]


def fit(module, folder, *callbacks, accumulate=1):
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=CSVLogger(folder), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=list(callbacks),
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))],
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    x = torch.randn(160, 8, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 8))
    return module


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("absent", [(7,), (0,), (19,), (3, 4, 5), [n for n in range(20) if n % 3]], ids=str)
def test_batches_without_a_loss_train_as_without_callbacks(tmp_path, optimizer, accumulate, absent):
    if optimizer == "fused" and accumulate == 1:
        pytest.skip("Lightning itself takes no fused optimizer through a batch without a loss")
    bare = fit(Net(OPTIMIZERS[optimizer], absent), tmp_path, accumulate=accumulate)
    guard = GradGuard()
    watched = fit(
        Net(OPTIMIZERS[optimizer], absent), tmp_path, GradHistogram(every_n_steps=1), guard, accumulate=accumulate
    )  # fmt: skip
    for mine, other in zip(watched.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert guard.summary["judged"] >= 2
    assert guard.findings == ()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_a_graceful_end_the_other_optimizer_takes_no_step(tmp_path, optimizer):
    guard = GradGuard(policy=Policy(respond={"nonfinite": "halt"}, stop="graceful"))
    module = fit(Net(OPTIMIZERS[optimizer], bad=7), tmp_path, guard)
    assert guard.stop_reason == "nonfinite"
    assert guard.summary["judged"] == 15
    assert all(p.isfinite().all() for p in module.parameters())
