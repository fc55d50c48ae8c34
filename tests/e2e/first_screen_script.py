"""Models and trainings for test_first_screen, also for ranks that it starts."""

import json
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, GradientHalt, GradientWarning, Policy, SteadyClip

WIDTH = 8


class Net(pl.LightningModule):
    """Regression with any body; batches ``bad`` are NaN.

    It logs under names that sort before and after "gradguard" by the letter.
    """

    def __init__(self, body, lr=0.05, bad=(), names=("Accuracy", "Loss/train", "1_mine", "epoch_loss", "_x")):
        super().__init__()
        self.body, self.lr, self.bad, self.names = body, lr, bad, names

    def training_step(self, batch, batch_idx):
        x = batch[0] * (float("nan") if self.global_step in self.bad else 1)
        loss = nn.functional.mse_loss(self.body(x), batch[1])
        for name in self.names:
            self.log(name, loss, on_step=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.body(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Rivals(Net):
    """Two parts with an optimizer each, stepped by hand."""

    def __init__(self, **options):
        super().__init__(
            nn.ModuleDict({"generator": deep(2, nn.Tanh), "critic": deep(2, nn.Tanh)}), **options
        )
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        step = self.global_step // 2
        for part, optimizer in zip(self.body.values(), self.optimizers(), strict=True):
            x = batch[0] * (float("nan") if step in self.bad and part is self.body["critic"] else 1)
            loss = nn.functional.mse_loss(part(x), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log("loss", loss, on_step=True)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=self.lr) for part in self.body.values()]


class OddNames(nn.Module):
    """Parameters whose names have slashes and letters of other scripts."""

    NAMES = ("w/in", "größe", "層/α", "a b", "w+", "0/1/2")

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            self.register_parameter(name, nn.Parameter(torch.randn(WIDTH, WIDTH) / 3))

    def forward(self, x):
        for name in self.NAMES:
            x = torch.tanh(x @ self._parameters[name])
        return x[:, :1]


class Tied(nn.Module):
    """Two layers that share a weight, and a last one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Branches(nn.Module):
    """Modules in modules, in lists and dicts, with norms."""

    def __init__(self):
        super().__init__()
        blocks = [{"norm": nn.LayerNorm(8), "mlp": deep(1, nn.GELU, out=8)} for _ in range(3)]
        self.encoder = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict(block) for block in blocks)})
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        for block in self.encoder["blocks"]:
            x = x + block["mlp"](block["norm"](x))
        return self.head(x)


def deep(layers, activation=nn.Sigmoid, out=1):
    inner = [part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), activation())]
    return nn.Sequential(*inner, nn.Linear(WIDTH, out))


def compiled():
    body = deep(12)
    body[4] = torch.compile(body[4], backend="eager")
    return body


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3),
        nn.Flatten(), nn.Linear(16, 1),
    )  # fmt: skip


def transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (2, 4)), layer, nn.Flatten(), nn.Linear(WIDTH, 1))


class Run(NamedTuple):
    """A training that has ended.

    Attributes:
        trainer: Its Trainer.
        module: The model.
        guard: The callback.
        messages: All warnings of ours, and the text of the halt.
        halt: The halt, or None.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    guard: GradGuard
    messages: list[str]
    halt: GradientHalt | None

    @property
    def parameters(self):
        """Names of the parameters as they were before something compiled a part."""
        return {re.sub(r"_orig_mod\.", "", name) for name, _ in self.module.named_parameters()}

    @property
    def named(self):
        """All names of tensors that anybody was told."""
        told = {name for text in self.messages for name in re.findall(r"`([^`\n]+)`", text)}
        found = {name for finding in self.guard.findings for name in finding.parameters}
        diagnosed = set(self.guard.diagnosis.parameters) if self.guard.diagnosis else set()
        return found | diagnosed | {name for name in told if name in self.parameters or "_orig_mod" in name}


def data(batches, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * size, WIDTH, generator=generator)
    y = x[:, :1] + 0.1 * torch.randn(len(x), 1, generator=generator)
    return DataLoader(TensorDataset(x, y), size)


def train(
    module, logger, guard=None, *, batches=40, seed=0, callbacks=(), ckpt_path=None, validate=False, histogram=None,
    guard_first=False, **options,
):  # fmt: skip
    """Train until the end or a halt.

    Args:
        module: The model.
        logger: A logger, or False for none; then there are no histograms either.
        guard: A guard; a strict one when None.
        batches: Steps of an epoch, without accumulation.
        seed: Of the data.
        callbacks: Further callbacks, which come last.
        ckpt_path: Checkpoint to resume from.
        validate: Validate after each epoch.
        histogram: Arguments of `GradHistogram`.
        guard_first: Place the guard before the histograms.
        **options: Options of the Trainer.
    """
    guard = guard or GradGuard(policy=Policy.strict())
    defaults = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 10,
    }  # fmt: skip
    own = [GradHistogram(**(histogram or {})), guard] if logger else [guard]
    if guard_first:
        own.reverse()
    trainer = pl.Trainer(logger=logger, callbacks=[*own, *callbacks], **{**defaults, **options})
    halt = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, data(batches, seed), data(2, 7) if validate else None, ckpt_path=ckpt_path)
        except GradientHalt as error:
            halt = error
    messages = [str(w.message) for w in caught if issubclass(w.category, GradientWarning)]
    return Run(trainer, module, guard, messages + ([str(halt)] if halt else []), halt)


def board(folder, name):
    """Return a logger that writes straight into a folder of this name, again after a resume."""
    return TensorBoardLogger(folder, name=name, version="")


class EndOfEpoch(pl.Callback):
    """Keep the numbers of ours that callbacks can see, at the end of each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, *_):
        metrics = trainer.callback_metrics.items()
        self.seen.append({name: float(x) for name, x in metrics if name.startswith("gradguard")})


def main(folder):
    """Train as one of the ranks, and write what callbacks see there."""
    torch.manual_seed(0)
    seen, logger = EndOfEpoch(), CSVLogger(folder, version=0)
    module = Net(deep(2, nn.Tanh))
    run = train(
        module, logger, GradGuard(clipper=SteadyClip()), callbacks=[seen], max_epochs=2, devices=2, strategy="ddp",
        log_every_n_steps=5, batches=20,
    )  # fmt: skip
    (Path(folder) / f"rank{run.trainer.global_rank}.json").write_text(json.dumps(seen.seen))


if __name__ == "__main__":
    main(sys.argv[1])
