"""`gradguard demo`: the whole product at work on 1,797 real images of digits, in three acts."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, GradientHalt, GradientWarning, Policy, SpikeClip
from lightning_gradguard.callbacks.base import PACKAGES
from lightning_gradguard.diagnosis.rendering import print_diagnosis

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    pl = importlib.import_module(next(p for p in PACKAGES if importlib.util.find_spec(p.partition(".")[0])))

WIDTH, LAYERS, BATCH = 64, 12, 32

Block = Callable[[nn.Module, nn.Module, nn.Module, Tensor], Tensor]

#: What a layer does with its linear map, the two kinds of normalization, and the activations of the layer before.
BLOCKS: dict[str, Block] = {
    "relu": lambda linear, layer_norm, batch_norm, h: torch.relu(linear(h)),
    "sigmoid": lambda linear, layer_norm, batch_norm, h: torch.sigmoid(linear(h)),
    "ReLU in residual blocks with normalization": lambda linear, layer_norm, batch_norm, h: (
        h + torch.relu(linear(layer_norm(h)))
    ),
    "ReLU and normalization": lambda linear, layer_norm, batch_norm, h: torch.relu(batch_norm(linear(h))),
    "Normalization after each layer": lambda linear, layer_norm, batch_norm, h: torch.sigmoid(
        batch_norm(linear(h))
    ),
}


class Digits(pl.LightningModule):
    """A classifier of 8 x 8 images: some layers of 64 units, and a linear head.

    Args:
        block: Which of `BLOCKS` each layer is.
        layers: How many.
    """

    def __init__(self, block: str = "sigmoid", layers: int = LAYERS) -> None:
        super().__init__()
        self.block = block
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.layer_norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers) if "residual" in block)
        batch_norm = "ormalization" in block and "residual" not in block
        self.batch_norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(layers) if batch_norm)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [N, 10] of images [N, 64]."""
        h, idle = images, nn.Identity()
        for i, linear in enumerate(self.linears):
            layer_norm = self.layer_norms[i] if self.layer_norms else idle
            batch_norm = self.batch_norms[i] if self.batch_norms else idle
            h = BLOCKS[self.block](linear, layer_norm, batch_norm, h)
        scores: Tensor = self.head(h)
        return scores

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy."""
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_accuracy", accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def digits(corrupt: bool = False) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of 1,437 images to train on and 360 to validate on.

    Args:
        corrupt: Whether one training image is NaN and another is multiplied by 10,000.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(
            "gradguard demo needs scikit-learn for its images: pip install scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pixels, dtype=torch.float32)[order]
    x, y = (x - x.mean()) / x.std(), torch.tensor(labels)[order]
    if corrupt:
        x[400], x[900] = math.nan, x[900] * 1e4
    train, val = TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])
    shuffled = DataLoader(train, BATCH, shuffle=True, generator=torch.Generator().manual_seed(1))
    return shuffled, DataLoader(val, len(val))


def train(
    name: str, folder: Path, module: Digits, *, epochs: int, guard: GradGuard | None, corrupt: bool = False
) -> float:
    """Trains, logging to ``folder/name``, and returns the accuracy on the validation images, in per cent."""
    loggers = importlib.import_module(f"{pl.__name__}.loggers")
    histogram = GradHistogram(every_n_steps=10, include=["*.weight"])
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=loggers.TensorBoardLogger(folder, name=name, version=""),
        callbacks=[histogram, guard] if guard is not None else [histogram],
        log_every_n_steps=5,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, *digits(corrupt))
    return 100 * float(trainer.callback_metrics["val_accuracy"])


def run(folder: Path, epochs: int = 12) -> None:
    """Plays the three acts; what an earlier demo wrote to ``folder`` is removed.

    Args:
        folder: Where the runs are logged.
        epochs: Longest training of an act.
    """
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    folder = folder / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    with _stage(console):
        name = _act_one(console, folder, epochs)
        _act_two(console, folder, epochs, name)
        _act_three(console, folder, epochs)
    console.rule()
    console.print(f"Look at the runs:\n{_tensorboard()} --logdir {folder}")


def _act_one(console: Console, folder: Path, epochs: int) -> str:
    """Returns the name of the first remedy."""
    console.rule(f"Act 1: {LAYERS} sigmoid layers, which do not learn")
    torch.manual_seed(0)
    guard = GradGuard(policy=Policy.strict(), trials=True)
    try:
        train("1_sigmoid_halted", folder, Digits(), epochs=epochs, guard=guard)
    except GradientHalt as halt:
        console.print(f"GradGuard halted before step {halt.step}:\n")
        print_diagnosis(halt.diagnosis)
        page = folder / "diagnosis.html"
        page.write_text(halt.diagnosis.to_html(), encoding="utf-8")
        console.print(f"\nThe same with pictures: {page}\n")
        return halt.diagnosis.remedies[0].name
    raise SystemExit("act 1 was to be halted, and was not")


def _act_two(console: Console, folder: Path, epochs: int, remedy: str) -> None:
    console.rule("Act 2: the same network with the first remedy")
    torch.manual_seed(0)
    guard = GradGuard(policy=Policy.strict())
    accuracy = train("2_first_remedy", folder, Digits(block=remedy), epochs=epochs, guard=guard)
    console.print(
        f"{remedy}: {accuracy:.1f} % of the validation images are right, after {guard.summary['judged']} judged "
        f"steps with {len(guard.findings)} findings."
    )


def _act_three(console: Console, folder: Path, epochs: int) -> None:
    console.rule("Act 3: a healthy network, one NaN image and one 10,000 times too bright")
    torch.manual_seed(0)
    bare = train("3_corrupt_unprotected", folder, Digits("relu", 3), epochs=epochs, guard=None, corrupt=True)
    torch.manual_seed(0)
    guard = GradGuard(clipper=SpikeClip())
    safe = train("3_corrupt_protected", folder, Digits("relu", 3), epochs=epochs, guard=guard, corrupt=True)
    steps = guard.summary
    console.print(f"Unprotected:                       {bare:5.1f} % right.")
    console.print(
        f"With GradGuard(clipper=SpikeClip()): {safe:5.1f} % right; of {steps['judged']} steps "
        f"{steps['clipped']} were clipped and {steps['skipped']} skipped."
    )


@contextmanager
def _stage(console: Console) -> Iterator[None]:
    """One thread, which is fastest for so small a network; and of all messages only those of the guard."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", GradientWarning)
            warnings.showwarning = lambda message, *_, **__: console.print(f"{message}\n")
            yield
    finally:
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _tensorboard() -> str:
    """The command as it can be typed here."""
    beside = Path(sys.executable).parent / "tensorboard"
    if shutil.which("tensorboard") or not beside.exists():
        return "tensorboard"
    return os.path.relpath(beside)
