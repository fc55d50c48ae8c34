"""Trainings with Lightning: bare, with torch's clipping, with our defaults, and with each peer."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from benchmarks.cost import peers
from benchmarks.cost.models import Training, Transformer, loader
from benchmarks.cost.peer_callbacks import (
    AdaptiveClip,
    AddHistogram,
    GradNorm,
    Monitor,
    Scope,
    SkipStep,
    Watch,
)
from lightning_gradguard import GradGuard, GradHistogram, SpikeClip, SteadyClip
from lightning_gradguard.engine.sampling_schedule import EAGER, SETTLED

BARE, CLIP = "bare", "gradient_clip_val=1.0"
OURS, STEADY = "SpikeClip + histograms", "SteadyClip + histograms"
#: Steps between two histograms, for every arm that draws them; the clock runs for one interval.
INTERVAL = 100


@dataclass(frozen=True)
class Size:
    """Size of a training: the transformer, the batch, and its steps.

    Attributes:
        context: Length of the learned positions; 0 for none.
        warm_up: Steps before the clock starts; a guard runs full evaluations more often until then.
        steps: Timed steps.
    """

    layers: int
    width: int
    vocabulary: int
    batch: int
    length: int
    context: int = 0
    warm_up: int = SETTLED + EAGER + 4
    steps: int = INTERVAL

    def net(self) -> Transformer:
        return Transformer(self.layers, self.width, self.vocabulary, self.context)


@dataclass(frozen=True)
class Arm:
    """Configuration of a Trainer.

    Attributes:
        does: Description for the table.
        each_step: True if it checks all gradients at every step.
        callbacks: Creates the callbacks, given a folder to write to.
        options: Arguments of the Trainer.
        optimizer: Creates an optimizer other than AdamW.
        logger: Creates a logger other than TensorBoard's, given a folder.
    """

    does: str
    each_step: bool = True
    callbacks: Callable[[Path], list[L.Callback]] = lambda folder: []
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[Any, float], torch.optim.Optimizer] | None = None
    logger: Callable[[Path], Logger] = lambda folder: TensorBoardLogger(folder, name=None)


ARMS = {
    BARE: Arm("nothing; the loss is logged to TensorBoard, as in all arms", each_step=False),
    CLIP: Arm("clips the global norm", options={"gradient_clip_val": 1.0}),
    OURS: Arm(
        "judges, clips spikes, stops NaN, shows layers; 24 histograms",
        callbacks=lambda folder: [GradHistogram(every_n_steps=INTERVAL), GradGuard(clipper=SpikeClip())],
    ),
    STEADY: Arm(
        "the same, and scales gradients at nearly every step",
        callbacks=lambda folder: [
            # All names, said in another way: two callbacks of one Trainer must differ.
            GradHistogram(every_n_steps=INTERVAL, include=["*"]),
            GradGuard(clipper=SteadyClip()),
        ],
    ),
    "grad_norm": Arm(
        "logs a norm of each tensor (`lightning.pytorch.utilities`)", callbacks=lambda folder: [GradNorm()]
    ),
    "add_histogram": Arm(
        "a histogram of each tensor (`SummaryWriter`)",
        each_step=False,
        callbacks=lambda folder: [AddHistogram(INTERVAL)],
    ),
}

PEERS = {
    "zclip": Arm(
        "clips spikes of the global norm", callbacks=lambda folder: [_of("zclip").ZClipLightningCallback()]
    ),
    "timm AGC": Arm(
        "clips by row (`adaptive_clip_grad`)", callbacks=lambda folder: [AdaptiveClip(_of("timm AGC"))]
    ),
    "SkipStepAdamW": Arm(
        "clips the global norm, skips spikes of it and of the loss, in an AdamW of its own",
        callbacks=lambda folder: [SkipStep()],
        optimizer=lambda parameters, rate: _of("SkipStepAdamW").SkipStepAdamW(
            parameters, lr=rate, foreach=True
        ),
    ),
    "torch-module-monitor": Arm(
        "keeps a norm of each tensor", callbacks=lambda folder: [Monitor(_of("torch-module-monitor"))]
    ),
    "trainscope": Arm(
        "records gradients, weights and activations; looks for spikes of the loss",
        callbacks=lambda folder: [Scope(_of("trainscope"), folder)],
    ),
    "wandb.watch": Arm(
        "a histogram of each tensor, to `WandbLogger(offline=True)`",
        each_step=False,
        callbacks=lambda folder: [Watch(INTERVAL)],
        logger=lambda folder: WandbLogger(save_dir=folder, offline=True),
    ),
}

EVERY = {**ARMS, **PEERS}


def available() -> dict[str, Arm]:
    """Return the arms whose packages are installed."""
    return {**ARMS, **{name: arm for name, arm in PEERS.items() if peers.find(name) is not None}}


def train(
    arm: Arm, size: Size, folder: Path, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], int]:
    """Run one training.

    Returns:
        Seconds of each timed step, and the number of the guard's findings.
    """
    torch.manual_seed(0)
    module = Training(size.net())
    if arm.optimizer is not None:
        optimizer = arm.optimizer(module.parameters(), module.rate)
        module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    place = folder / str(next(_numbers))
    place.mkdir(parents=True)
    starts, callbacks = Starts(clock), arm.callbacks(place)
    with silenced():
        trainer = L.Trainer(
            max_steps=size.warm_up + size.steps + 1,
            accelerator="cpu",
            devices=1,
            logger=arm.logger(place),
            callbacks=[starts, *callbacks],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arm.options,
        )
        trainer.fit(module, loader(size.batch, size.length, size.vocabulary))
    found = sum(len(c.findings) for c in callbacks if isinstance(c, GradGuard))
    times = starts.times[size.warm_up : size.warm_up + size.steps + 1]
    return [end - begin for begin, end in pairwise(times)], found


@contextmanager
def silenced() -> Iterator[None]:
    """Silence Lightning and wandb, and restore their settings afterwards."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    with warnings.catch_warnings(), patch.dict(os.environ, {"WANDB_SILENT": "true"}):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)


class Starts(L.Callback):
    """Callback that comes first, so that one batch start to the next covers all the work of a step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, index: int
    ) -> None:
        self.times.append(self.clock())


def _of(peer: str) -> Any:
    module = peers.find(peer)
    assert module is not None
    return module


_numbers = count()
