"""Show GradGuard on real images: ``gradguard demo``."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, GradientHalt, GradientWarning, Policy, SteadyClip
from lightning_gradguard.callbacks.trainer_adapter import PACKAGES
from lightning_gradguard.diagnosis.diagnosis import Diagnosis, Remedy
from lightning_gradguard.diagnosis.rendering import print_diagnosis

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    pl = importlib.import_module(next(p for p in PACKAGES if importlib.util.find_spec(p.partition(".")[0])))

WIDTH, LAYERS, BATCH, RATE = 64, 12, 32, 0.1


def run(folder: Path, epochs: int = 12) -> None:
    """Run the three acts of the demo.

    What an earlier demo wrote to the folder is deleted.

    Args:
        folder: Folder to log to; the runs are written to ``demo`` in it.
        epochs: Most epochs of each training.
    """
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    folder = folder / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    with _single_thread_and_own_warnings(console):
        diagnosis = _halt_and_diagnose(console, folder, epochs)
        _train_with_fix(console, folder, epochs, diagnosis.remedies[0])
        _protect_from_bad_images(console, folder, epochs)
    console.rule()
    console.print(f"Look at the runs in TensorBoard:\n\n  {_tensorboard()} --logdir {folder}\n")
    console.print(
        "Open http://localhost:6006: the first pictures are the runs' heat maps. Type `gradguard/` into "
        '"Filter tags" to see norm, tilt and clip rate beside them, or the name of a layer from a message, such as '
        f"`{diagnosis.parameters[0]}`, to see its histogram. The Text tab has the diagnosis."
    )


def _halt_and_diagnose(console: Console, folder: Path, epochs: int) -> Diagnosis:
    """Return the diagnosis of a network that is halted."""
    console.rule(f"Act 1: a network of {LAYERS} sigmoid layers, which does not learn")
    torch.manual_seed(0)
    guard = GradGuard(policy=Policy.strict(), trials=True)
    try:
        train("1_sigmoid_halted", folder, Digits(), epochs=epochs, guard=guard)
    except GradientHalt as halt:
        console.print(f"GradGuard halted training before step {halt.step}:\n")
        print_diagnosis(halt.diagnosis)
        page = folder / "diagnosis.html"
        page.write_text(halt.diagnosis.to_html(), encoding="utf-8")
        console.print(f"\nThe same with pictures: {page}\n")
        return halt.diagnosis
    raise SystemExit(
        f"gradguard demo: {epochs} epochs are too few to find the fault of act 1; use --epochs 12"
    )


def _train_with_fix(console: Console, folder: Path, epochs: int, fix: Remedy) -> None:
    console.rule("Act 2: the same network with the first of these fixes")
    torch.manual_seed(0)
    change = fix.change
    assert change is not None, "fixes of the first act are tried, so each has a change"
    module = Digits(
        change.activation or "sigmoid",
        normalize=change.normalise,
        residual=change.skip,
        initialization=change.initialise,
        layers=LAYERS // 2 if change.shorten else LAYERS,
        rate=RATE * change.rate,
    )
    guard = GradGuard(policy=Policy.strict())
    accuracy = train("2_first_remedy", folder, module, epochs=epochs, guard=guard)
    console.print(
        f"{fix.name}: {accuracy:.1f} % of the validation images are classified correctly. GradGuard judged "
        f"{guard.summary['judged']} steps and made {len(guard.findings)} findings."
    )


def _protect_from_bad_images(console: Console, folder: Path, epochs: int) -> None:
    console.rule("Act 3: one NaN image, and one image 10,000 times too bright")
    torch.manual_seed(0)
    network = Digits("relu", layers=3)
    bare = train("3_corrupt_unprotected", folder, network, epochs=epochs, guard=None, corrupt=True)
    torch.manual_seed(0)
    network, guard = Digits("relu", layers=3), GradGuard(clipper=SteadyClip())
    safe = train("3_corrupt_protected", folder, network, epochs=epochs, guard=guard, corrupt=True)
    steps = guard.summary
    console.print(f"Without GradGuard:                    {bare:5.1f} % correct.")
    console.print(
        f"With GradGuard(clipper=SteadyClip()): {safe:5.1f} % correct. Of {steps['judged']} steps "
        f"{steps['clipped']} were clipped and {steps['skipped']} skipped. "
        "SteadyClip scales ordinary steps a little, and a spike to the size of an ordinary step."
    )


class Digits(pl.LightningModule):
    """Classifier of 8 x 8 images with 64-unit layers.

    Args:
        activation: Name of the function after each layer.
        normalize: Normalize each layer: its output by batch, or in a residual block its input by layer.
        residual: Add each layer's input to its output.
        initialization: "he" or "xavier" for the weights, with biases of zero; torch's own when None.
        layers: Number of layers.
        rate: Learning rate.
    """

    def __init__(
        self,
        activation: str = "sigmoid",
        *,
        normalize: bool = False,
        residual: bool = False,
        initialization: str | None = None,
        layers: int = LAYERS,
        rate: float = RATE,
    ) -> None:
        super().__init__()
        self.activation, self.residual, self.rate = getattr(functional, activation), residual, rate
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        norm = nn.LayerNorm if residual else nn.BatchNorm1d
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(layers) if normalize)
        self.head = nn.Linear(WIDTH, 10)
        if initialization is not None:
            for linear in (*self.linears, self.head):
                # The gain of a layer before a ReLU is that of He.
                gain = nn.init.calculate_gain("relu") if initialization == "he" else 1.0
                nn.init.xavier_normal_(linear.weight, gain)
                nn.init.zeros_(linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores [N, 10] of images [N, 64]."""
        h = images
        for i, linear in enumerate(self.linears):
            if self.residual:
                h = h + self.activation(linear(self.norms[i](h) if self.norms else h))
            else:
                out = linear(h)
                h = self.activation(self.norms[i](out) if self.norms else out)
        scores: Tensor = self.head(h)
        return scores

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_accuracy", accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def digits(corrupt: bool = False) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return loaders of 1,437 training and 360 validation images.

    Args:
        corrupt: Make one training image NaN, and multiply another by 10,000.
    """
    from sklearn.datasets import load_digits

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
    """Train, log, and return the validation accuracy, percent."""
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
    with Console().status(f"Training {name}"):  # on a terminal only
        trainer.fit(module, *digits(corrupt))
    return 100 * float(trainer.callback_metrics["val_accuracy"])


@contextmanager
def _single_thread_and_own_warnings(console: Console) -> Iterator[None]:
    """Use one thread, and print only GradGuard's warnings."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)  # fastest for so small a network
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
    """Return the command that starts TensorBoard."""
    beside = Path(sys.executable).parent / "tensorboard"
    if shutil.which("tensorboard") or not beside.exists():
        return "tensorboard"
    return os.path.relpath(beside)
