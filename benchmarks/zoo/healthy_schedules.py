"""Healthy trainings whose schedule could mislead a rule: rates, unfreezing, fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import he
from benchmarks.zoo.recipes import adam, adamw, chain, convnet, pretrained, sgd, touched, transformer
from benchmarks.zoo.sequences import zipf
from benchmarks.zoo.training import Training

_relu = {"depth": 4, "weight": he()}


def _harder(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Add more and more noise, as a curriculum."""
    return x + 0.01 * min(number, 250) * torch.randn(
        x.shape, generator=torch.Generator().manual_seed(number)
    ), y


def _fall(step: int) -> float:
    return 1.0 if step < 150 else 0.1


def _cosine(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(step, 300) / 300))


def _restarts(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (step % 75) / 75))


def _long_warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 150)


def _one_cycle(step: int) -> float:
    return step / 100 + 0.02 if step < 100 else max(0.0, (300 - step) / 200) + 1e-4


class Thaw(L.Callback):
    """Callback that freezes parts and unfreezes them at a step."""

    def __init__(self, parts: Sequence[str], at: int) -> None:
        self.parts, self.at = parts, at

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for part in self.parts:
            pl_module.get_submodule(part).requires_grad_(trainer.global_step >= self.at)


def _thawing() -> dict[str, Any]:
    return {"callbacks": [Thaw(("net.layers.0", "net.layers.1"), 150)]}


def _freeze_first(training: Training) -> None:
    training.net.layers[0].requires_grad_(False)


def _tuned(seed: int, **options: Any) -> Training:
    """Return the fine-tuning of a trained net: the loss starts low."""
    return pretrained(chain(seed, depth=4, weight=he(), optimizer=adam(3e-4), **options), 150, adam(2e-3))


def _new_head(seed: int) -> Training:
    """Return a transfer: a trained net gets a new head and a smaller rate for the rest."""
    training = _tuned(seed)
    training.net.head = nn.Linear(32, 10)
    training.make_optimizer = lambda _: torch.optim.Adam(
        [
            {"params": training.net.layers.parameters(), "lr": 1e-5},
            {"params": training.net.head.parameters(), "lr": 1e-2},
        ]
    )
    return training


CASES = [
    Case(
        "H20",
        "first layer frozen",
        touched(chain, _freeze_first, **_relu),
        0.9,
        kin=("dense", "frozen", "sgd"),
    ),
    Case(
        "H22",
        "learning rate falls to a tenth",
        partial(chain, schedule=_fall, **_relu),
        0.9,
        kin=("dense", "schedule", "sgd"),
    ),
    Case(
        "H27",
        "two layers thawed at step 150",
        partial(chain, **_relu),
        0.9,
        trainer=_thawing,
        kin=("dense", "frozen", "sgd"),
    ),
    Case(
        "H50",
        "cosine schedule, convolutions",
        partial(convnet, depth=3, weight=he(), schedule=_cosine),
        0.9,
        kin=("convolutional", "schedule", "momentum"),
    ),
    Case(
        "H51",
        "warm restarts",
        partial(chain, schedule=_restarts, optimizer=adamw(3e-3), **_relu),
        0.9,
        kin=("dense", "schedule", "adamw"),
    ),
    Case(
        "H52",
        "warm-up over half of training",
        partial(transformer, task=zipf, schedule=_long_warm_up),
        0.4,
        kin=("transformer", "schedule", "adam"),
    ),
    Case(
        "H53",
        "one cycle, down to nothing",
        partial(chain, schedule=_one_cycle, optimizer=sgd(0.1, momentum=0.9), depth=3, weight=he()),
        0.9,
        kin=("dense", "schedule", "momentum"),
    ),
    Case(
        "H54",
        "fine-tuning that starts at a low loss",
        _tuned,
        0.9,
        kin=("dense", "fine-tuning", "adam"),
    ),
    Case(
        "H55",
        "a new head on a net that has learned, whose layers move a thousand times less",
        _new_head,
        0.9,
        kin=("dense", "fine-tuning", "adam"),
    ),
    Case(
        "H56",
        "a curriculum on a net that has learned: the loss rises, as it should",
        partial(_tuned, spoil=_harder),
        0.9,
        kin=("dense", "fine-tuning", "adam"),
    ),
]
