"""Measure the cost of histograms: ``python benchmarks/histograms.py`` writes ``benchmarks/histograms.md``.

First part: what a callback adds to a step of a ``Trainer``, with one thread, on 30 million gradient elements in 100
tensors. The gradients are new tensors at each step, so most of them are not in a cache. One arm is our histogram,
counted and handed to TensorBoard's writer; the other is ``SummaryWriter.add_histogram``. The writer is idle when the
clock starts. It saves to disk in a Python thread of its own, whose time is a separate column. Fits of a few steps take
turns. All times are processor time of the thread, so that other programs on the machine count less.

Second part: a training of a small transformer in a ``Trainer``, in which every step is shown: gradients alone, with
weights and updates, with activations, and ``wandb.watch`` beside it (offline). Fits of the arms take turns.

Third part: how far the histogram of 4,096 elements is from that of all, on gradients of small trainings, if they are
read one by one as the package does, in pairs, or in blocks of 16, which is a cache line. A block lies in one row, and
the elements of a row are alike, so it tells less than 16 elements from 16 rows.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_gradguard import GradHistogram
from lightning_gradguard.stats.histogram import _places, count

TENSORS, SIDE = 100, 548
#: Fits of each arm of the first part, and steps of each; the first two describe the tags.
ROUNDS, FRESH = 5, 6
#: Fits of each arm of the second part, and steps of each.
FITS, STEPS = 3, 22
#: Blocks of the second part's models.
BLOCKS = (4, 8)


class Fresh(L.LightningModule):
    """Module that gets new, ordinary gradients at each step; their sizes differ by tensor and by row."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.ModuleList(nn.Linear(SIDE, SIDE, bias=False) for _ in range(TENSORS))
        self.noise = [torch.randn(SIDE, SIDE) for _ in range(10)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for i, layer in enumerate(self.layers):
            layer.weight.grad = 10.0 ** -(1 + 4 * torch.rand(SIDE, 1)) * self.noise[i % len(self.noise)]
        self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class AddHistogram(L.Callback):
    """Callback that writes what `GradHistogram` writes, with TensorBoard's own method."""

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for name, parameter in pl_module.named_parameters():
            trainer.logger.experiment.add_histogram(name, parameter.grad, trainer.global_step)


class Timed(L.Callback):
    """Callback that calls another one's hooks, and times them.

    Args:
        timed: The other one.
    """

    def __init__(self, timed: L.Callback) -> None:
        self.timed = timed
        #: Of each step: seconds of this thread, seconds of the writer's thread, bytes.
        self.rows: list[tuple[float, float, int]] = []

    def on_fit_start(self, *arguments: Any) -> None:
        self.timed.on_fit_start(*arguments)

    def on_before_optimizer_step(self, trainer: L.Trainer, *arguments: Any) -> None:
        writer = trainer.logger.experiment
        writer.flush()
        before = _size(Path(writer.log_dir))
        begun, whole = time.thread_time(), time.process_time()
        self.timed.on_before_optimizer_step(trainer, *arguments)
        blocked = time.thread_time() - begun
        writer.flush()
        others = time.process_time() - whole - (time.thread_time() - begun)
        self.rows.append((blocked, others, _size(Path(writer.log_dir)) - before))

    def on_fit_end(self, *arguments: Any) -> None:
        self.timed.on_fit_end(*arguments)


def measure(folder: Path) -> dict[str, list[float]]:
    """Return medians per arm: seconds of the training's thread, seconds of the writer's thread, bytes."""
    arms: dict[str, Callable[[], L.Callback]] = {
        "sampled": lambda: GradHistogram(every_n_steps=1, max_tensors=TENSORS),
        "exact": lambda: GradHistogram(every_n_steps=1, max_tensors=TENSORS, max_samples=None),
        "add_histogram": AddHistogram,
    }
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in arms}
    module = Fresh()
    for _ in range(ROUNDS):
        for name, arm in arms.items():
            timed = Timed(arm())
            fit(module, DataLoader(TensorDataset(torch.zeros(FRESH, 1))), folder / name, [timed])
            rows[name] += timed.rows[2:]
    return {
        name: [statistics.median(column) for column in zip(*found, strict=True)]
        for name, found in rows.items()
    }


def fit(module: L.LightningModule, data: DataLoader, folder: Path, callbacks: list[L.Callback]) -> None:
    """Train for one epoch."""
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=TensorBoardLogger(folder),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)


class Text(nn.Module):
    """Transformer on tokens, of which few are frequent."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.blocks, self.head = nn.TransformerEncoder(layer, 3), nn.Linear(128, 4000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(x)))

    @staticmethod
    def batch() -> Tensor:
        return (4000 * torch.rand(16, 32) ** 6).long()


class Images(nn.Module):
    """Convolutions and a wide layer with ReLU, whose units are often off."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 64, 128, 256]
        convolutions = [
            part
            for i, o in pairwise(sizes)
            for part in (nn.Conv2d(i, o, 3, stride=2), nn.BatchNorm2d(o), nn.ReLU())
        ]
        self.net = nn.Sequential(
            *convolutions, nn.Flatten(), nn.Linear(256 * 9, 1024), nn.ReLU(), nn.Linear(1024, 500)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @staticmethod
    def batch() -> Tensor:
        return torch.randn(16, 3, 32, 32) * torch.rand(16, 3, 1, 1)


#: Largest error of a cumulative share in 95 of 100 random samples of 4,096 elements.
BOUND = math.sqrt(math.log(2 / 0.05) / (2 * 4096))
#: Kinds of sampling: elements that are read together.
WIDTHS = {1: "one by one", 2: "in pairs", 16: "in blocks of 16"}


def real_gradients(kind: type[Text] | type[Images]) -> Iterator[tuple[str, Tensor]]:
    """Yield gradients of more than 16,384 elements, with a kind of layer, of some steps of a training."""
    model = kind()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(40):
        x = kind.batch()
        out = model(x)
        target = x.roll(-1, 1) if kind is Text else torch.arange(len(x))
        loss = nn.functional.cross_entropy(out.flatten(0, -2), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, p in model.named_parameters():
            if step % 4 == 0 and p.numel() > 2**14:
                layer = {"embedding": "embedding with rare rows", "blocks": "attention", "head": "attention"}
                yield (
                    layer.get(name.partition(".")[0], "convolution" if p.ndim == 4 else "linear after ReLU"),
                    p.grad,
                )


def distance(gradient: Tensor, width: int) -> float:
    """Return by how much a cumulative share of 4,096 elements is off, if so many neighbours are read at a time."""
    flat = gradient.flatten()
    rows = flat[: flat.numel() // width * width].view(-1, width)
    chosen = rows[_places(4096 // width, len(rows), flat.device)]
    sample, whole = (count([part], max_samples=None).bins[0].cumsum(0) for part in (chosen, flat))
    return float((sample / sample[-1] - whole / whole[-1]).abs().max())


def accuracy() -> dict[str, dict[int, list[float]]]:
    """Return the distances of each kind of layer by width."""
    found: dict[str, dict[int, list[float]]] = {}
    for kind in (Text, Images):
        torch.manual_seed(0)
        for layer, gradient in real_gradients(kind):
            for width in WIDTHS:
                found.setdefault(layer, {}).setdefault(width, []).append(distance(gradient, width))
    return found


class Transformer(L.LightningModule):
    """Blocks of width 192 over sequences of 32: twelve tensors and 0.44 million parameters each."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(192, 4, 768, dropout=0.0, batch_first=True)
        self.blocks, self.head = nn.TransformerEncoder(layer, blocks), nn.Linear(192, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.head(self.blocks(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Clock(L.Callback):
    """Callback that times batches; it has to stand last."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_train_batch_end(self, *_: object) -> None:
        now = time.thread_time()
        if self._begun:
            self.seconds.append(now - self._begun)
        self._begun = now


class Watch(L.Callback):
    """Callback with ``wandb.watch``, which shows at each ``log`` what its hooks have counted."""

    def __init__(self, what: str, folder: Path) -> None:
        self.what, self.folder = what, folder

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.run = wandb.init(
            project="p", mode="offline", dir=self.folder, settings=wandb.Settings(silent=True)
        )
        self.run.watch(module, log=self.what, log_freq=1)

    def on_train_batch_end(self, *_: object) -> None:
        self.run.log({"x": 0})

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.run.unwatch(module)
        self.run.finish()


def train(folder: Path, blocks: int, callbacks: list[L.Callback]) -> list[float]:
    """Train some steps; return the seconds of each, without the first two."""
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(4 * STEPS, 32, 192)), 4)
    clock = Clock()
    fit(Transformer(blocks), data, folder, [*callbacks, clock])
    return clock.seconds[1:]


def in_training(folder: Path, blocks: int) -> dict[str, float]:
    """Return the median seconds of a step of each arm."""

    def shown(*of: str) -> list[L.Callback]:
        return [GradHistogram(every_n_steps=1, of=of)]

    arms: dict[str, Callable[[], list[L.Callback]]] = {
        "bare": list,
        "gradient": lambda: shown("gradient"),
        "update": lambda: shown("gradient", "weight", "update"),
        "activation": lambda: shown("gradient", "weight", "update", "activation"),
        "watch": lambda: [Watch("gradients", folder)],
        "watch all": lambda: [Watch("all", folder)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(FITS):
        for name, callbacks in arms.items():
            seconds[name] += train(folder / name, blocks, callbacks())
    return {name: statistics.median(found) for name, found in seconds.items()}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _table_of(blocks: int, steps: dict[str, float]) -> list[str]:
    kinds = {
        "gradient": "`GradHistogram()`",
        "update": '`GradHistogram(of=("gradient", "weight", "update"))`',
        "activation": '`GradHistogram(of=("gradient", "weight", "update", "activation"))`',
        "watch": '`wandb.watch(log="gradients")`',
        "watch all": '`wandb.watch(log="all")`: gradients and weights',
    }
    tensors = len(list(Transformer(blocks).parameters()))
    alone = steps["gradient"] - steps["bare"]
    lines = [
        "",
        f"| {tensors} tensors | step, ms | added to a step that is shown, ms | of that for gradients alone |",
        "|---|---|---|---|",
        f"| without | {1e3 * steps['bare']:.1f} | – | – |",
    ]
    for name, title in kinds.items():
        added = steps[name] - steps["bare"]
        lines.append(f"| {title} | {1e3 * steps[name]:.1f} | {1e3 * added:.1f} | {added / alone:.2f} times |")
    return lines


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
        trainings = {blocks: in_training(Path(folder) / "training", blocks) for blocks in BLOCKS}
    lines = [
        "# Cost of histograms",
        "",
        "Made by `python benchmarks/histograms.py`: 30 million gradient elements in 100 tensors, new ones at each step",
        "of a Trainer; medians, fits take turns, one thread, CPU. Blocked is processor time of the training's thread.",
        "TensorBoard's writer has a thread of its own.",
        "",
        "| arm | blocked, ms | cheaper than `add_histogram` | writer's thread, ms | KiB a step |",
        "|---|---|---|---|---|",
    ]
    titles = {
        "sampled": "`GradHistogram(max_tensors=100)`: 4,096 samples of each",
        "exact": "`GradHistogram(max_tensors=100, max_samples=None)`",
        "add_histogram": "`SummaryWriter.add_histogram`",
    }
    for name, (blocked, after, size) in found.items():
        ratio = found["add_histogram"][0] / blocked
        lines.append(
            f"| {titles[name]} | {1e3 * blocked:.1f} | {ratio:.1f} times | {1e3 * after:.1f} | {size / 1024:.1f} |"
        )
    lines += [
        "",
        "A training in a Trainer, one thread: transformers with AdamW, in which every step is shown (usually one in a",
        "hundred is). `GradHistogram` shows 24 tensors and modules at most; `wandb.watch` shows all tensors, and no",
        "updates or activations. Fits take turns; medians of steps, processor time.",
    ]
    for blocks, steps in trainings.items():
        lines += _table_of(blocks, steps)
    lines += [
        "",
        "Largest error of a cumulative share with 4,096 elements, on gradients of real trainings: 95th percentile, and",
        "share of histograms that are off by more than 2.1 %, which may be 5 %.",
        "",
        "| gradients | histograms | " + " | ".join(WIDTHS.values()) + " |",
        "|---|---|" + "---|" * len(WIDTHS),
    ]
    for layer, widths in accuracy().items():
        cells = [
            f"{100 * sorted(errors)[int(0.95 * len(errors))]:.1f} %; "
            f"{100 * sum(error > BOUND for error in errors) / len(errors):.0f} %"
            for errors in widths.values()
        ]
        lines.append(f"| {layer} | {len(widths[1])} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
