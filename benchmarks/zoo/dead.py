"""Cases of units with zero output and zero gradient."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import Chain, he
from benchmarks.zoo.recipes import adam, chain, convnet, messages, pair, sgd, touched
from benchmarks.zoo.tasks import Task, regression, templates
from benchmarks.zoo.training import Training
from lightning_gradguard import Cause, Fault

DEAD = Fault.DEAD


def _absolute(seed: int, *, factor: float) -> Task:
    """Return templates whose inputs all have the same sign."""
    task = templates(seed)

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x, y = task.draw(generator, size)
        return factor * x.abs(), y

    return Task(draw, inputs=task.inputs, outputs=task.outputs)


def _positive(weight: Tensor) -> None:
    he()(weight)
    weight.abs_()


def _kill_middle(training: Training) -> None:
    training.net.layers[2].bias.fill_(-20.0)


def _kill_most(training: Training) -> None:
    for layer in training.net.layers:
        layer.bias[3:] = -20.0


class _NonNegative(nn.Module):
    """Chain whose output is kept non-negative by a ReLU that is dead."""

    def __init__(self, net: Chain, bias: float) -> None:
        super().__init__()
        self.net = net
        nn.init.constant_(net.head.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.net(x))


def _dead_output(seed: int, *, bias: float) -> Training:
    own = regression(seed)

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x, y = own.draw(generator, size)
        return x, y + 3.0

    task = Task(draw, own.loss, own.score, own.inputs, own.outputs)
    net = _NonNegative(Chain(own.inputs, 1, depth=2, weight=he()), bias)
    return Training(net, task, sgd(0.02), seed=seed)


def _zero_norms(training: Training) -> None:
    for norm in training.net.norms:
        norm.weight.zero_()
        norm.bias.fill_(-1.0)


_with_norm = {"depth": 4, "weight": he(), "norm": nn.BatchNorm1d}

CASES = [
    Case(
        "D01",
        "ReLU-5, all biases -12",
        **pair(chain, faulty={"bias": -12.0}, fixed={"bias": 0.0}, depth=5, weight=he()),
        level=0.9,
        fault=DEAD,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("net.layers.*",),
        kin=("dense", "sgd"),
    ),
    Case(
        "D02",
        "positive weights, negative inputs",
        **pair(
            chain,
            faulty={"weight": _positive},
            fixed={"weight": he()},
            task=partial(_absolute, factor=-1.0),
            depth=4,
            bias=0.0,
            optimizer=adam(3e-3),
        ),
        level=0.8,
        fault=DEAD,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.*",),
        kin=("dense", "adam"),
    ),
    Case(
        "D03",
        "ReLU-2, inputs |x| times 5, learning rate 0.5",
        **pair(
            chain,
            faulty={"task": partial(_absolute, factor=5.0), "optimizer": sgd(0.5)},
            fixed={"task": partial(_absolute, factor=1.0), "optimizer": sgd(0.1)},
            depth=2,
        ),
        level=0.8,
        fault=DEAD,
        cause=Cause.LEARNING_RATE_TOO_HIGH,
        culprits=("net.layers.*",),
        also=(Fault.OVERSIZED_UPDATE, Fault.EXPLODING),
        why="the units are killed by the first, much too large steps",
        kin=("dense", "sgd"),
    ),
    Case(
        "D04",
        "all weights zero",
        **pair(chain, faulty={"weight": nn.init.zeros_}, fixed={"weight": he()}, depth=4, bias=0.0),
        level=0.9,
        fault=DEAD,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.*", "net.head.weight"),
        kin=("dense", "sgd"),
    ),
    Case(
        "D05",
        "one dead layer in the middle",
        build=touched(chain, _kill_middle, depth=5, weight=he()),
        fixed=partial(chain, depth=5, weight=he()),
        level=0.9,
        fault=DEAD,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("net.layers.2.*",),
        kin=("dense", "sgd"),
    ),
    Case(
        "D06",
        "61 of 64 units of each layer are dead",
        build=touched(chain, _kill_most, depth=4, width=64, weight=he()),
        fixed=partial(chain, depth=4, width=64, weight=he()),
        level=0.9,
        fault=DEAD,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("net.layers.*",),
        kin=("dense", "sgd"),
    ),
    Case(
        "D07",
        "a ReLU after the head, which never opens",
        **pair(_dead_output, faulty={"bias": -9.0}, fixed={"bias": 3.0}),
        level=0.5,
        fault=DEAD,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("net.net.head.*",),
        kin=("dense", "regression", "sgd"),
    ),
    Case(
        "D08",
        "convolutions with biases -12",
        **pair(convnet, faulty={"bias": -12.0}, fixed={"bias": 0.0}, depth=4, weight=he()),
        level=0.9,
        fault=DEAD,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("net.convs.*",),
        kin=("convolutional", "momentum"),
    ),
    Case(
        "D09",
        "batch normalisation with scale 0 and shift -1 before each ReLU",
        build=touched(chain, _zero_norms, **_with_norm),
        fixed=partial(chain, **_with_norm),
        level=0.9,
        fault=DEAD,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("net.layers.*", "net.norms.*"),
        kin=("dense", "normalised", "sgd"),
    ),
    Case(
        "D10",
        "message passing whose ReLUs are closed",
        **pair(messages, faulty={"bias": -15.0}, fixed={"bias": 0.0}, weight=he()),
        level=0.8,
        fault=DEAD,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("net.rounds.*",),
        kin=("graph", "adam"),
    ),
    Case(
        "D11",
        "hard sigmoid whose inputs are all beyond its flat end",
        **pair(
            chain,
            faulty={"bias": -8.0},
            fixed={"bias": 0.0},
            depth=2,
            activation=F.hardsigmoid,
            weight=he(),
            optimizer=adam(3e-3),
        ),
        level=0.9,
        fault=DEAD,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("net.layers.*",),
        kin=("dense", "adam"),
    ),
]
