"""Small modules and trainers for the callbacks' tests."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    """Classifier on 8 numbers.

    A batch listed in ``bad`` becomes NaN.
    """

    def __init__(self, activation=nn.ReLU, depth=4, lr=0.1, bad=(), optimizer=None):
        super().__init__()
        layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), activation())]
        self.net = nn.Sequential(*layers, nn.Linear(8, 2))
        self.lr, self.bad, self.optimizer = lr, set(bad), optimizer
        self.steps = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.steps in self.bad:
            x = x * float("nan")
        self.steps += 1
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        if self.optimizer is not None:
            return self.optimizer(self.parameters())
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader(batches=40, size=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * size, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=size)


@pytest.fixture
def fit(tmp_path):
    """Fit a module with callbacks; return the trainer."""

    def run(module, *callbacks, batches=40, ckpt_path=None, **arguments):
        defaults = {
            "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path,
            "log_every_n_steps": 10,
        }  # fmt: skip
        trainer = pl.Trainer(callbacks=list(callbacks), **{**defaults, **arguments})
        trainer.fit(module, loader(batches), ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def classifier():
    def build(**kwargs):
        torch.manual_seed(0)
        return Classifier(**kwargs)

    return build
