"""Trainings that are halted, for test_halting.

As a script, it runs each in a process of its own.

``python halting_script.py FOLDER`` writes ``FOLDER/STOP/status`` for each way to stop, and all that a training leaves.
"""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, Policy, SpikeClip

BAD, BATCHES = 8, 24


class Net(pl.LightningModule):
    """Net whose loss is NaN from batch ``bad`` on.

    It has batch norm. With manual optimization two heads are trained in turn.

    Attributes:
        kept: Parameters before each batch.
    """

    def __init__(self, bad=BAD, optimizer=torch.optim.AdamW, by_hand=False):
        super().__init__()
        torch.manual_seed(0)
        self.bad, self.optimizer, self.automatic_optimization = bad, optimizer, not by_hand
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])
        self.kept = {}

    def training_step(self, batch, number):
        x, y = batch
        self.kept[number] = {name: p.detach().clone() for name, p in self.named_parameters()}
        x = x * (torch.nan if number >= self.bad else 1.0)
        if self.automatic_optimization:
            loss = sum(nn.functional.cross_entropy(head(self.body(x)), y) for head in self.heads)
            self.log("loss", loss)
            return loss
        for optimizer, head in zip(self.optimizers(), self.heads, strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(head(self.body(x)), y))
            optimizer.step()
        return None

    def validation_step(self, batch, number):
        self.log("val_loss", nn.functional.cross_entropy(self.heads[0](self.body(batch[0])), batch[1]))

    def configure_optimizers(self):
        if self.automatic_optimization:
            return self.optimizer(self.parameters(), lr=0.01)
        own = [*self.body.parameters(), *self.heads[0].parameters()]
        return self.optimizer(own, lr=0.01), self.optimizer(self.heads[1].parameters(), lr=0.01)


def data(batches=BATCHES):
    x = torch.randn(8 * batches, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


def fit(module, folder, *, stop, callbacks=(), guard=None, logger=None, **options):
    """Fit with a checkpoint after every step.

    Return the guard, or raise the halt.
    """
    guard = guard or GradGuard(policy=Policy(respond={"nonfinite": "halt"}, stop=stop), clipper=SpikeClip())
    saver = ModelCheckpoint(
        folder,
        filename="{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        save_last=True,
        save_on_train_epoch_end=True,
    )
    saver.save_on_exception = True  # where Lightning knows it
    trainer = pl.Trainer(
        **{"max_epochs": 3, **options}, accelerator="cpu", logger=logger or False, log_every_n_steps=3,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, guard, saver],
        default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data(), data(2))
    return guard


class FinalizedLogger(CSVLogger):
    """Logger that records how it was finalized."""

    def finalize(self, status):
        super().finalize(status)
        (Path(self.log_dir) / "finalized").write_text(status)


def main(folder):
    torch.set_num_threads(1)
    children = {}
    for stop in ("raise", "graceful"):
        (folder / stop).mkdir()
        children[stop] = os.fork()
        if not children[stop]:
            own = folder / stop
            sys.stderr = (own / "stderr").open("w", buffering=1)
            logs = [FinalizedLogger(own, "csv", ""), TensorBoardLogger(own, "tb", "")]
            # What it raises is left to Python, as in a script of anybody's.
            fit(Net(), own / "checkpoints", stop=stop, logger=logs)
            return
    for stop, child in children.items():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / stop / "status").write_text(str(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
