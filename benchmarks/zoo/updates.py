"""Cases of steps that are too large."""

from __future__ import annotations

import torch

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import he
from benchmarks.zoo.recipes import adam, adamw, chain, convnet, pair, pretrained, rmsprop, sgd, transformer
from benchmarks.zoo.sequences import zipf
from benchmarks.zoo.tasks import Task, templates
from benchmarks.zoo.training import Training
from lightning_gradguard import Cause, Fault

BIG = Fault.OVERSIZED_UPDATE

_WAYS = (Fault.EXPLODING, Fault.DEAD, Fault.NONFINITE)
_diverges = (
    "steps that are too large make loss and gradients grow, kill units, or overflow: which, differs by seed"
)


def _tenfold(seed: int) -> Task:
    return templates_times(seed, 10.0)


def templates_times(seed: int, factor: float) -> Task:
    task = templates(seed)

    def draw(generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = task.draw(generator, size)
        return factor * x, y

    return Task(draw, inputs=task.inputs, outputs=task.outputs)


def _jump(step: int) -> float:
    """Return a schedule that mistakes steps for epochs: at step 150 the rate grows a thousandfold."""
    return 1.0 if step < 150 else 1000.0


def _steady(step: int) -> float:
    return 1.0


def _tuned(seed: int, *, lr: float) -> Training:
    """Return the fine-tuning of a trained net."""
    return pretrained(chain(seed, depth=4, weight=he(), optimizer=adam(lr)), 150, adam(2e-3))


CASES = [
    Case(
        "E03",
        "inputs times 10, learning rate 1",
        **pair(
            chain,
            faulty={"task": _tenfold, "optimizer": sgd(1.0)},
            fixed={"task": templates, "optimizer": sgd(0.1)},
            depth=3,
        ),
        level=0.8,
        fault=BIG,
        cause=Cause.UNNORMALIZED_INPUT,
        culprits=("net.*",),
        also=_WAYS,
        why=_diverges,
        kin=("dense", "sgd"),
    ),
    Case(
        "E08",
        "transformer, Adam, learning rate 0.3",
        **pair(
            transformer,
            faulty={"optimizer": adam(0.3)},
            fixed={"optimizer": adam(3e-3)},
            task=zipf,
        ),
        level=0.4,
        fault=BIG,
        cause=Cause.LEARNING_RATE_TOO_HIGH,
        culprits=("net.*",),
        kin=("transformer", "adam"),
    ),
    Case(
        "E09",
        "momentum 0.99, learning rate 0.5",
        **pair(
            chain,
            faulty={"optimizer": sgd(0.5, momentum=0.99)},
            fixed={"optimizer": sgd(0.5, momentum=0.0)},
            depth=2,
            weight=he(),
        ),
        level=0.8,
        fault=BIG,
        cause=Cause.MOMENTUM,
        culprits=("net.*",),
        also=_WAYS,
        why=_diverges,
        kin=("dense", "momentum"),
    ),
    Case(
        "U01",
        "convolutions, RMSprop, learning rate 0.3",
        **pair(
            convnet,
            faulty={"optimizer": rmsprop(0.3)},
            fixed={"optimizer": rmsprop(1e-3)},
            depth=4,
            weight=he(),
        ),
        level=0.8,
        fault=BIG,
        cause=Cause.LEARNING_RATE_TOO_HIGH,
        culprits=("net.*",),
        also=_WAYS,
        why=_diverges,
        kin=("convolutional", "rmsprop"),
    ),
    Case(
        "U02",
        "the learning rate leaps a thousandfold at step 150",
        **pair(
            chain,
            faulty={"schedule": _jump},
            fixed={"schedule": _steady},
            depth=4,
            weight=he(),
            optimizer=adamw(2e-3),
        ),
        level=0.8,
        fault=BIG,
        cause=Cause.LEARNING_RATE_TOO_HIGH,
        culprits=("net.*",),
        also=_WAYS,
        why=_diverges,
        onset=150,
        kin=("dense", "adamw", "schedule"),
    ),
    Case(
        "U03",
        "fine-tuning with a learning rate that destroys what was learned",
        **pair(_tuned, faulty={"lr": 0.5}, fixed={"lr": 1e-4}),
        level=0.8,
        fault=BIG,
        cause=Cause.LEARNING_RATE_TOO_HIGH,
        culprits=("net.*",),
        also=_WAYS,
        why=_diverges,
        kin=("dense", "fine-tuning", "adam"),
    ),
    Case(
        "U04",
        "weight decay of 30 in AdamW: weights lose a third at every step",
        **pair(
            chain,
            faulty={"optimizer": adamw(0.01, weight_decay=30.0)},
            fixed={"optimizer": adamw(0.01, weight_decay=0.01)},
            depth=3,
            weight=he(),
        ),
        level=0.8,
        fault=BIG,
        cause=Cause.WEIGHT_DECAY,
        culprits=("net.*",),
        kin=("dense", "adamw"),
    ),
    Case(
        "U05",
        "batch-normalised convolutions, SGD, learning rate 300",
        **pair(
            convnet,
            faulty={"optimizer": sgd(300.0)},
            fixed={"optimizer": sgd(0.1)},
            depth=4,
            weight=he(),
            norm=True,
        ),
        level=0.8,
        fault=BIG,
        cause=Cause.LEARNING_RATE_TOO_HIGH,
        culprits=("net.*",),
        also=_WAYS,
        why=_diverges,
        kin=("convolutional", "normalised", "sgd"),
    ),
]
