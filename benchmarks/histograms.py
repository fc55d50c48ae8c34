"""Measure the cost of histograms: ``python benchmarks/histograms.py`` writes ``benchmarks/histograms.md``.

First part: all arms take turns in one process with one thread, on 30 million gradient elements in 100 tensors. One arm
is our histogram, counted and handed to TensorBoard's writer; the other is ``SummaryWriter.add_histogram``.
Both writers are idle when the clock starts. The writer saves to disk in a Python thread of its own; how long
that thread runs on afterwards is a separate column.

Second part: a training of a small transformer in a ``Trainer``, in which every step is shown: gradients alone, with
weights and updates, with activations, and ``wandb.watch`` beside it (offline). Fits of the arms take turns.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
import wandb
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_gradguard import GradHistogram
from lightning_gradguard.engine.readback import read
from lightning_gradguard.loggers.histograms import histogram_record
from lightning_gradguard.loggers.tensorboard import TensorBoardSink
from lightning_gradguard.stats.histogram import count

TENSORS, SIDE, ROUNDS = 100, 548, 20
#: Fits of each arm of the second part, and steps of each.
FITS, STEPS = 5, 22
#: Blocks of the second part's models.
BLOCKS = (4, 8)
NAMES = [f"model.encoder.layers.{i}.self_attention.in_proj_weight" for i in range(TENSORS)]


def gradients() -> list[Tensor]:
    """Return ordinary gradients whose sizes differ by tensor and by row."""
    return [10.0 ** -(1 + 4 * torch.rand(SIDE, 1)) * torch.randn(SIDE, SIDE) for _ in range(TENSORS)]


def ours(tensors: list[Tensor], sink: TensorBoardSink, step: int, samples: int | None) -> float:
    """Count and write; return the seconds spent counting."""
    begun = time.perf_counter()
    numbers = read(count(tensors, max_samples=samples).bins.flatten())
    counted = time.perf_counter() - begun
    columns = (numbers[30 * i : 30 * (i + 1)] for i in range(TENSORS))
    sink.write(step, histogram_record(dict(zip(NAMES, columns, strict=True))))
    return counted


def theirs(tensors: list[Tensor], writer: SummaryWriter, step: int) -> float:
    """Write the same with TensorBoard; it does not report counting separately."""
    for name, tensor in zip(NAMES, tensors, strict=True):
        writer.add_histogram(name, tensor, step)
    return float("nan")


def measure(folder: Path) -> dict[str, list[float]]:
    """Return medians per arm: seconds blocked, seconds counting, seconds of the writer thread, bytes."""
    tensors = gradients()
    writers = {name: SummaryWriter(folder / name) for name in ("sampled", "exact", "add_histogram")}
    sinks = {name: TensorBoardSink(writer) for name, writer in writers.items()}
    arms: dict[str, Callable[[int], float]] = {
        "sampled": lambda step: ours(tensors, sinks["sampled"], step, 4096),
        "exact": lambda step: ours(tensors, sinks["exact"], step, None),
        "add_histogram": lambda step: theirs(tensors, writers["add_histogram"], step),
    }
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in arms}
    for step in range(ROUNDS):
        for name, arm in arms.items():
            before = _size(folder / name)
            begun = time.perf_counter()
            counted = arm(step)
            blocked = time.perf_counter()
            writers[name].flush()
            rows[name].append(
                (blocked - begun, counted, time.perf_counter() - blocked, _size(folder / name) - before)
            )
    for writer in writers.values():
        writer.close()
    # Warm-up: the first rounds also describe the tags.
    return {
        name: [statistics.median(column) for column in zip(*found[ROUNDS // 4 :], strict=True)]
        for name, found in rows.items()
    }


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
        now = time.perf_counter()
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
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=TensorBoardLogger(folder),
        callbacks=[*callbacks, clock],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Transformer(blocks), data)
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
        "Made by `python benchmarks/histograms.py`: 30 million gradient elements in 100 tensors; medians, interleaved,",
        "one thread, CPU. Blocked is what a training step waits for; the writer's thread goes on after that.",
        "",
        "| arm | blocked, ms | of these counting | cheaper than `add_histogram` | thread after that, ms | KiB a step |",
        "|---|---|---|---|---|---|",
    ]
    titles = {
        "sampled": "`GradHistogram(max_tensors=100)`: 4,096 samples of each",
        "exact": "`GradHistogram(max_tensors=100, max_samples=None)`",
        "add_histogram": "`SummaryWriter.add_histogram`",
    }
    for name, (blocked, counted, after, size) in found.items():
        ratio = found["add_histogram"][0] / blocked
        counting = f"{1e3 * counted:.1f}" if counted == counted else "–"
        lines.append(
            f"| {titles[name]} | {1e3 * blocked:.1f} | {counting} | {ratio:.1f} times | {1e3 * after:.1f} "
            f"| {size / 1024:.1f} |"
        )
    lines += [
        "",
        "A training in a Trainer, one thread: transformers with AdamW, in which every step is shown (usually one in a",
        "hundred is). `GradHistogram` shows 24 tensors and modules at most; `wandb.watch` shows all tensors, and no",
        "updates or activations. Fits take turns; medians of steps.",
    ]
    for blocks, steps in trainings.items():
        lines += _table_of(blocks, steps)
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
