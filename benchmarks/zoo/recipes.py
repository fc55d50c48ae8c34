"""Trainings built in one call; cases differ in the arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.models import Chain, ConvNet, Residual
from benchmarks.zoo.recurrent import Messages, Recurrent, Transformer
from benchmarks.zoo.sequences import communities, lookup, recall
from benchmarks.zoo.tasks import Task, images, templates
from benchmarks.zoo.training import MakeOptimizer, Training

MakeTask = Callable[[int], Task]


def sgd(lr: float, **options: Any) -> MakeOptimizer:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **options)


def adam(lr: float, **options: Any) -> MakeOptimizer:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, **options)


def adamw(lr: float, **options: Any) -> MakeOptimizer:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, **options)


def rmsprop(lr: float, **options: Any) -> MakeOptimizer:
    return lambda parameters: torch.optim.RMSprop(parameters, lr=lr, **options)


def _split(options: dict[str, Any]) -> dict[str, Any]:
    """Remove and return the ``options`` that `Training` takes."""
    names = ("batch_size", "schedule", "spoil", "reshape", "per_epoch", "pool")
    return {name: options.pop(name) for name in names if name in options}


def chain(
    seed: int, *, task: MakeTask = templates, optimizer: MakeOptimizer | None = None, **options: Any
) -> Training:
    """Return a `Chain` on a task; the default is SGD at 0.1."""
    rest, own = _split(options), task(seed)
    net = Chain(own.inputs, own.outputs, **options)
    return Training(net, own, optimizer or sgd(0.1), seed=seed, **rest)


def residual(
    seed: int, *, task: MakeTask = templates, optimizer: MakeOptimizer | None = None, **options: Any
) -> Training:
    """Return a `Residual` net on a task; the default is SGD at 0.05."""
    rest, own = _split(options), task(seed)
    return Training(
        Residual(own.inputs, own.outputs, **options), own, optimizer or sgd(0.05), seed=seed, **rest
    )


def convnet(
    seed: int, *, task: MakeTask = images, optimizer: MakeOptimizer | None = None, **options: Any
) -> Training:
    """Return a `ConvNet` on pictures; the default is SGD at 0.05 with momentum."""
    rest, own = _split(options), task(seed)
    return Training(
        ConvNet(own.outputs, **options), own, optimizer or sgd(0.05, momentum=0.9), seed=seed, **rest
    )


def recurrent(
    seed: int,
    *,
    kind: type[nn.RNNBase] = nn.RNN,
    task: MakeTask = recall,
    optimizer: MakeOptimizer | None = None,
    **options: Any,
) -> Training:
    """Return a `Recurrent` net on sequences; the default is Adam at 0.01."""
    rest, own = _split(options), task(seed)
    net = Recurrent(kind, own.inputs, own.outputs, **options)
    return Training(net, own, optimizer or adam(1e-2), seed=seed, **rest)


def transformer(
    seed: int, *, task: MakeTask = lookup, optimizer: MakeOptimizer | None = None, **options: Any
) -> Training:
    """Return a `Transformer` on sequences; the default is Adam at 0.003."""
    rest, own = _split(options), task(seed)
    net = Transformer(own.inputs, own.outputs, **options)
    return Training(net, own, optimizer or adam(3e-3), seed=seed, **rest)


def messages(
    seed: int, *, task: MakeTask = communities, optimizer: MakeOptimizer | None = None, **options: Any
) -> Training:
    """Return a `Messages` net on graphs; the default is Adam at 0.01."""
    rest, own = _split(options), task(seed)
    net = Messages(own.inputs, own.outputs, **options)
    return Training(
        net, own, optimizer or adam(1e-2), seed=seed, batch_size=rest.pop("batch_size", 16), **rest
    )


def pair(
    make: Callable[..., Training], *, faulty: dict[str, Any], fixed: dict[str, Any], **common: Any
) -> dict[str, Any]:
    """Return a build and its fixed twin, which differ only in the given options."""
    return {"build": partial(make, **common, **faulty), "fixed": partial(make, **common, **fixed)}


def touched(make: Callable[..., Training], touch: Callable[[Training], object], **options: Any) -> Any:
    """Return a build whose training ``touch`` changes before it begins."""

    def build(seed: int) -> Training:
        training = make(seed, **options)
        with torch.no_grad():
            touch(training)
        return training

    return build


def pretrained(training: Training, steps: int, optimizer: MakeOptimizer) -> Training:
    """Return the training after some steps of a plain loop with a separate optimizer."""
    own = optimizer([p for p in training.parameters() if p.requires_grad])
    for number in range(steps):
        own.zero_grad()
        training.loss(*training.batch(-1 - number), number).backward()
        own.step()
    own.zero_grad()
    return training
