"""Measure the cost of histograms: ``python benchmarks/histograms.py`` writes ``benchmarks/histograms.md``.

Both arms take turns in one process with one thread, on 30 million gradient elements in 100 tensors. One arm
is our histogram, counted and handed to TensorBoard's writer; the other is ``SummaryWriter.add_histogram``.
Both writers are idle when the clock starts. The writer saves to disk in a Python thread of its own; how long
that thread runs on afterwards is a separate column.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_gradguard.engine.readback import read
from lightning_gradguard.loggers.histograms import histogram_record
from lightning_gradguard.loggers.tensorboard import TensorBoardSink
from lightning_gradguard.stats.histogram import count

TENSORS, SIDE, ROUNDS = 100, 548, 20
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


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
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
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
