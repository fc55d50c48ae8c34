"""Cases of vanishing gradients in saturated functions."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import Branches, Chain, he, xavier
from benchmarks.zoo.recipes import adam, chain, convnet, pair, sgd, touched, transformer
from benchmarks.zoo.tasks import Task, accuracy, circles
from benchmarks.zoo.training import Training
from lightning_gradguard import Cause, Fault

V = Fault.VANISHING

_relu_he = {"activation": torch.relu, "weight": he()}
_momentum = sgd(0.02, momentum=0.9)

_attention = {"tokens": False, "pooled": True, "optimizer": adam(3e-3)}


def _wide_circles(seed: int) -> Task:
    return circles(seed, scale=100.0)


def _sharpen(training: Training) -> None:
    for attention in training.net.attention:
        attention.q.weight.mul_(30.0)
        attention.k.weight.mul_(30.0)


def _two_questions(seed: int) -> Task:
    """Return four classes: one bit depends on the left half of the inputs, the other on the right half."""
    generator = torch.Generator().manual_seed(seed)
    ways = torch.randn(2, 16, generator=generator)

    def draw(generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        bits = torch.randint(2, (size, 2), generator=generator)
        x = (2.0 * bits[:, :, None] - 1) * 0.7 * ways + torch.randn(size, 2, 16, generator=generator)
        return x.flatten(1), 2 * bits[:, 0] + bits[:, 1]

    return Task(draw, inputs=32, outputs=4, score=accuracy)


class _Fused(Branches):
    """Two branches and a head on both."""

    def __init__(self, left: Chain, right: Chain, cut: int, outputs: int) -> None:
        super().__init__(left, right, cut)
        self.head = torch.nn.Linear(16, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(super().forward(x))


def _branches(seed: int, *, faulty: bool) -> Training:
    task = _two_questions(seed)
    deep = {"activation": torch.sigmoid, "weight": xavier()} if faulty else _relu_he
    left = Chain(16, 8, depth=8, width=24, **deep)
    right = Chain(16, 8, depth=1, width=24, weight=he())
    return Training(_Fused(left, right, 16, 4), task, sgd(0.1), seed=seed)


CASES = [
    Case(
        "V01",
        "sigmoid MLP-10, Xavier, circles",
        **pair(
            chain,
            faulty={"activation": torch.sigmoid, "weight": xavier()},
            fixed=_relu_he,
            task=circles,
            depth=10,
            optimizer=_momentum,
        ),
        level=0.9,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.layers.[0-4].*",),
        kin=("dense", "momentum"),
    ),
    Case(
        "V04",
        "sigmoid-8, Adam, templates: learns, but slowly",
        **pair(
            chain,
            faulty={"activation": torch.sigmoid, "weight": xavier()},
            fixed=_relu_he,
            depth=8,
            optimizer=adam(1e-3),
        ),
        level=0.9,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.layers.[0-3].*",),
        kin=("dense", "adam"),
    ),
    Case(
        "V05",
        "tanh-6, all biases 4, templates",
        **pair(
            chain, faulty={"bias": 4.0}, fixed={"bias": 0.0}, depth=6, activation=torch.tanh, weight=xavier()
        ),
        level=0.9,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.layers.[0-2].*",),
        kin=("dense", "sgd"),
    ),
    Case(
        "V06",
        "sigmoid-6, inputs times 100, circles",
        **pair(
            chain,
            faulty={"task": _wide_circles, "activation": torch.sigmoid, "weight": xavier()},
            fixed={"task": circles, **_relu_he},
            depth=6,
            optimizer=_momentum,
        ),
        level=0.9,
        fault=V,
        cause=Cause.UNNORMALIZED_INPUT,
        culprits=("net.layers.[0-2].*",),
        kin=("dense", "momentum"),
    ),
    Case(
        "V11",
        "6 convolutions with sigmoid",
        **pair(
            convnet,
            faulty={"activation": torch.sigmoid, "weight": xavier()},
            fixed=_relu_he,
            depth=6,
            optimizer=sgd(0.03, momentum=0.9),
        ),
        level=0.8,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.convs.[0-2].*",),
        kin=("convolutional", "momentum"),
    ),
    Case(
        "V13",
        "erf-8, biases 2.5",
        **pair(
            chain, faulty={"bias": 2.5}, fixed={"bias": 0.0}, depth=8, activation=torch.erf, weight=xavier()
        ),
        level=0.9,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.layers.[0-3].*",),
        kin=("dense", "sgd"),
    ),
    Case(
        "V14",
        "softplus-8, biases -5",
        **pair(
            chain,
            faulty={"bias": -5.0, "weight": xavier()},
            fixed={"bias": -0.7, "weight": he()},
            depth=8,
            activation=F.softplus,
            optimizer=adam(1e-3),
        ),
        level=0.9,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.layers.[0-3].*",),
        kin=("dense", "adam"),
    ),
    Case(
        "V17",
        "one of two branches vanishes, the other learns",
        **pair(_branches, faulty={"faulty": True}, fixed={"faulty": False}),
        level=0.8,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.left.layers.[0-4].*",),
        kin=("branches", "sgd"),
    ),
    Case(
        "V18",
        "attention whose queries and keys are 30 times too large: the softmax is saturated",
        build=touched(transformer, _sharpen, **_attention),
        fixed=partial(transformer, **_attention),
        level=0.9,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.attention.*.q.*", "net.attention.*.k.*"),
        kin=("transformer", "adam"),
    ),
    Case(
        "V21",
        "sigmoid-8 with Nesterov momentum, four in accumulation",
        **pair(
            chain,
            faulty={"activation": torch.sigmoid, "weight": xavier()},
            fixed=_relu_he,
            depth=8,
            batch_size=16,
            optimizer=sgd(0.02, momentum=0.9, nesterov=True),
        ),
        level=0.9,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.layers.[0-3].*",),
        trainer=partial(dict, accumulate_grad_batches=4),
        kin=("dense", "momentum", "accumulation"),
    ),
]
