"""Small trainings that fail, for test_replay.

The replay command imports their classes too.
"""

import os
import resource
import signal
import sys
import warnings
from collections import namedtuple
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard, Policy, Recorder

ROWS, BAD = 16, 7


class Model(pl.LightningModule):
    """A classifier with dropout and batch norm.

    Args:
        width: Of the hidden layer.
        fault: What goes wrong in batch 7, if anything: "log" takes the logarithm of zeros that dropout makes, "ray" has
            a hook write NaN into a gradient, "error" raises.
    """

    def __init__(self, width=16, fault=""):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.ReLU(), nn.Linear(width, 4)
        )
        self.fault = fault

    def training_step(self, batch, batch_idx):
        x, y = self.pair(batch)
        loss = F.cross_entropy(self.net(x), y)
        if batch_idx == BAD and self.fault == "log":
            loss = loss + 1e-3 * torch.log(F.dropout(x.abs(), 0.05)).mean()
        if self.fault == "error" and (x > 1e3).any():
            raise ArithmeticError("too large")
        self.log("loss", loss)
        return loss

    def pair(self, batch):
        return batch

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class FaultFromOutside(Model):
    """Net whose hook writes NaN into a gradient.

    It does so in training, and not in a replay.
    """

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == BAD:
            self.ray = self.net[4].weight.register_hook(lambda gradient: gradient * torch.nan)


class Amplifier(nn.Module):
    """Layer that doubles gradients and keeps values."""

    def forward(self, x):
        return 2 * x - x.detach()


class Deep(Model):
    """Net whose gradients vanish or explode.

    It has twelve sigmoid layers, or twelve amplifiers.
    """

    def __init__(self, grows=False):
        super().__init__()
        layers = [
            part for _ in range(12) for part in (nn.Linear(8, 8), Amplifier() if grows else nn.Sigmoid())
        ]
        for layer in layers[::2] if grows else ():
            nn.init.orthogonal_(layer.weight)
        self.net = nn.Sequential(*layers, nn.Linear(8, 4))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class Gan(pl.LightningModule):
    """Two nets, two optimizers, by hand.

    Args:
        tolerant: The critic replaces NaN in its input, so that the generator's step is halted.
    """

    def __init__(self, tolerant=False):
        super().__init__()
        self.automatic_optimization, self.tolerant = False, tolerant
        self.generator = nn.Linear(8, 8)
        self.critic = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        critic, generator = self.optimizers()
        x, _ = batch
        real = x.nan_to_num() if self.tolerant else x
        self.toggle_optimizer(critic)
        loss = self.critic(self.generator(real).detach()).mean() - self.critic(real).mean()
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        loss = -self.critic(self.generator(x)).mean()
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()
        self.untoggle_optimizer(generator)
        self.log("loss", loss)

    def configure_optimizers(self):
        return torch.optim.Adam(self.critic.parameters()), torch.optim.SGD(
            self.generator.parameters(), lr=0.01
        )


@dataclass
class Sample:
    image: torch.Tensor
    label: torch.Tensor


Pair = namedtuple("Pair", ["image", "label"])


class OfDicts(Model):
    def pair(self, batch):
        return batch["image"], batch["label"]


class OfSamples(Model):
    def pair(self, batch):
        return batch.image, batch.label


class OfPairs(OfSamples):
    pass


class Fused(Model):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


class Bare(Model):
    """Single layer without normalization.

    Large inputs stay large.
    """

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 4)


def batches(spoil=(), value=torch.nan, count=20, pack=lambda x, y: (x, y)):
    """Return batches of 16 rows.

    In batch 7 the given rows hold a wrong value.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        x = torch.randn(ROWS, 8, generator=generator)
        if number == BAD and spoil:
            x[list(spoil), 2] = value
        made.append(pack(x, torch.randint(4, (ROWS,), generator=generator)))
    return made


def fit(module, data, *callbacks, policy=None, recorder=None, guard=None, **options):
    """Train with a recorder; return guard and error.

    The error is None if training reaches its end.
    """
    callback = GradGuard(policy=policy or Policy.strict(), recorder=recorder or Recorder(), **(guard or {}))
    defaults = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    trainer = pl.Trainer(callbacks=[*callbacks, callback], **{**defaults, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(module, DataLoader(data, batch_size=None))
        except (Exception, SystemExit) as error:
            return callback, error
    return callback, None


class Spoiled(Model):
    """Net that gets NaN in one process only.

    Rows 3 and 9 of batch 7 are NaN, in the second process.
    """

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.fit_loop.epoch_loop.batch_idx + 1 == BAD and self.global_rank == 1:
            batch[0][[3, 9], 2] = torch.nan
        return batch


class TermRequested(pl.Callback):
    """Net that sends itself SIGTERM.

    A job scheduler does the same.
    """

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def main(kind):
    """Run a test's training in its own process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if kind == "ranks":
        _, error = fit(Spoiled(), batches(), strategy="ddp", devices=2)
    elif kind == "sigterm":
        _, error = fit(Model(), batches(), TermRequested(), recorder=Recorder(on=("halt", "sigterm")))
    else:
        # The disk is full after so many bytes.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        _, error = fit(Model(), batches(spoil=(3,)))
    print(f"ended by {type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
