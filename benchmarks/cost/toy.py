"""Toy trainings in which a guard works hardest: just begun, diverging, and with a loss that hardly falls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cost.measuring import Rounds, interleave
from benchmarks.cost.trainer_arms import BARE, OURS, Starts, silenced
from benchmarks.cost.turns import in_turns
from lightning_gradguard import GradGuard, GradHistogram, GradientHalt, SpikeClip

LAYERS, WIDTH, ROWS = 13, 64, 32
#: Steps of a training that has just begun.
FIRST = 32
#: Step from which the learning rate grows, its growth a step, and its largest multiple: gradients then explode, and
#: stay finite for as long as the training lasts.
BEGIN, GROWTH, MOST = 50, 1.1, 60.0
#: Constant part of a loss that hardly falls, beside one of about 1 that can be learned.
FLOOR = 40.0


class Toy(L.LightningModule):
    """Deep net that copies its input, with Adam.

    Args:
        grows: The learning rate grows from step `BEGIN` on.
        floor: Constant part of the loss, which cannot be learned. A loss of which it is most hardly falls.
    """

    def __init__(self, *, grows: bool = False, floor: float = 0.0) -> None:
        super().__init__()
        layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.LeakyReLU())]
        self.net = nn.Sequential(*layers[:-1])
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, a=0.01, nonlinearity="leaky_relu")
        self.grows, self.floor = grows, floor
        self.losses: list[float] = []

    def training_step(self, x: Tensor) -> Tensor:
        loss = F.mse_loss(self.net(x), x) + self.floor
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer | dict[str, object]:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        if not self.grows:
            return optimizer
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(MOST, GROWTH ** max(0, n - BEGIN)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


class Batches(torch.utils.data.IterableDataset[Tensor]):
    """The same endless batches in every training: float32 [32, 64] along few directions, which can be learned."""

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(4, WIDTH, generator=generator)
        while True:
            yield torch.randn(ROWS, 4, generator=generator) @ directions / 2


def first_steps(rounds: int, folder: Path, clock: Callable[[], float] = time.perf_counter) -> Rounds:
    """Time whole trainings of the first steps, with and without callbacks, one after the other.

    Returns:
        Seconds from the call of ``fit`` to the first batch, then of each of the first steps.
    """

    def train(arm: str) -> list[float]:
        torch.manual_seed(0)
        return _fit(Toy(), _guarded() if arm == OURS else [], FIRST, folder, clock)

    return interleave((BARE, OURS), rounds, train)


def diverging(
    steps: int, rounds: int, folder: Path, clock: Callable[[], float] = time.perf_counter
) -> tuple[Rounds, list[str]]:
    """Time trainings that explode, with and without callbacks, one after the other.

    Returns:
        Seconds of each step from the first finding on, and the faults found, in the order in which they came. Without
        any finding, the seconds of the last step.
    """
    found: list[tuple[int, str]] = []

    def train(arm: str) -> list[float]:
        torch.manual_seed(0)
        callbacks = _guarded() if arm == OURS else []
        seconds = _fit(Toy(grows=True), callbacks, steps, folder, clock)[1:]
        for callback in callbacks:
            if isinstance(callback, GradGuard):
                found[:] = [(f.step, f.fault.value) for f in callback.findings]
        return seconds

    whole = interleave((BARE, OURS), rounds, train).seconds
    # A halt ends a training before the others.
    end = min(len(seconds) for of_arm in whole.values() for seconds in of_arm)
    begin = min([step for step, _ in found] + [end - 1])
    cut = {arm: [seconds[begin:end] for seconds in of_arm] for arm, of_arm in whole.items()}
    return Rounds(cut), list(dict.fromkeys(fault for _, fault in found))


def fine_tuning(
    floor: float,
    warm_up: int,
    rounds: int,
    folder: Path,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Rounds, float]:
    """Let a bare Trainer and one with callbacks take turns, late in a training.

    Args:
        floor: As in `Toy`.
        warm_up: Steps before the first turn, all of them with callbacks.
        rounds: Timed turns of each arm.
        folder: Folder for event files.
        clock: Clock that returns seconds.

    Returns:
        Mean seconds of a step in each turn, and the last losses as a share of the first ones.
    """
    torch.manual_seed(0)
    toy = Toy(floor=floor)

    def fit(callbacks: Sequence[L.Callback], steps: int) -> None:
        _fit(toy, callbacks, steps, folder, clock)

    turns = in_turns({BARE: [], OURS: _guarded()}, fit, warm_up, rounds, clock)
    return turns.rounds, median(toy.losses[-50:]) / median(toy.losses[:5])


def _guarded() -> list[L.Callback]:
    return [GradHistogram(), GradGuard(clipper=SpikeClip())]


def _fit(
    toy: Toy, callbacks: Sequence[L.Callback], steps: int, folder: Path, clock: Callable[[], float]
) -> list[float]:
    """Train, and return the seconds before the first batch and of each step."""
    starts = Starts(clock)
    with silenced():
        trainer = L.Trainer(
            max_steps=steps + 1,
            accelerator="cpu",
            devices=1,
            logger=TensorBoardLogger(folder, name=None),
            callbacks=[starts, *callbacks],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(Batches(), batch_size=None)
        began = clock()
        with suppress(GradientHalt):
            trainer.fit(toy, loader)
    return [end - begin for begin, end in pairwise([began, *starts.times])]
