"""Gradients that vanish on their way to the input: V01 to V07 of DETECTION.md, and more."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import Branches, Chain, he, normal, scaled, xavier
from benchmarks.zoo.recipes import adam, chain, convnet, pair, sgd, touched, transformer
from benchmarks.zoo.tasks import Task, accuracy, circles
from benchmarks.zoo.training import Training
from lightning_gradguard import Cause, Fault

V = Fault.VANISHING

_relu_he = {"activation": torch.relu, "weight": he()}
_momentum = sgd(0.02, momentum=0.9)

_attention = {"tokens": False, "pooled": True, "optimizer": adam(3e-3)}
_tanh_15 = {"depth": 15, "activation": torch.tanh, "weight": scaled(1.0)}


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _leaky(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.3)


def _wide_circles(seed: int) -> Task:
    return circles(seed, scale=100.0)


def _sharpen(training: Training) -> None:
    for attention in training.net.attention:
        attention.q.weight.mul_(30.0)
        attention.k.weight.mul_(30.0)


def _weaken(training: Training) -> None:
    for layer in training.net.layers[:12]:
        layer.weight.mul_(0.15)


def _two_questions(seed: int) -> Task:
    """Four classes: one bit can be read from the left half of the inputs, the other from the right half."""
    generator = torch.Generator().manual_seed(seed)
    ways = torch.randn(2, 16, generator=generator)

    def draw(generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        bits = torch.randint(2, (size, 2), generator=generator)
        x = (2.0 * bits[:, :, None] - 1) * 0.7 * ways + torch.randn(size, 2, 16, generator=generator)
        return x.flatten(1), 2 * bits[:, 0] + bits[:, 1]

    return Task(draw, inputs=32, outputs=4, score=accuracy)


class _Fused(Branches):
    """Branches and a head on both."""

    def __init__(self, left: Chain, right: Chain, cut: int, outputs: int) -> None:
        super().__init__(left, right, cut)
        self.head = torch.nn.Linear(16, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(super().forward(x))


def _branches(seed: int, *, sick: bool) -> Training:
    task = _two_questions(seed)
    deep = {"activation": torch.sigmoid, "weight": xavier()} if sick else _relu_he
    left = Chain(16, 8, depth=8, width=24, **deep)
    right = Chain(16, 8, depth=1, width=24, weight=he())
    return Training(_Fused(left, right, 16, 4), task, sgd(0.1), seed=seed)


CASES = [
    Case(
        "V01",
        "sigmoid MLP-10, Xavier, circles",
        **pair(
            chain,
            sick={"activation": torch.sigmoid, "weight": xavier()},
            mended=_relu_he,
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
        "V02",
        "tanh-20, N(0, 0.01), circles",
        **pair(
            chain,
            sick={"weight": normal(0.01)},
            mended={"weight": scaled(1.05)},
            task=circles,
            depth=20,
            activation=torch.tanh,
            optimizer=_momentum,
        ),
        level=0.9,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.[0-9].*",),
        kin=("dense", "momentum"),
    ),
    Case(
        "V03",
        "ReLU-20, N(0, 0.05), templates",
        **pair(
            chain,
            sick={"weight": normal(0.05)},
            mended={"weight": he()},
            depth=20,
            width=64,
            optimizer=sgd(0.01, momentum=0.9),
        ),
        level=0.9,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.[0-9].*",),
        kin=("dense", "momentum"),
    ),
    Case(
        "V04",
        "sigmoid-8, Adam, templates: learns, but slowly",
        **pair(
            chain,
            sick={"activation": torch.sigmoid, "weight": xavier()},
            mended=_relu_he,
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
            chain, sick={"bias": 4.0}, mended={"bias": 0.0}, depth=6, activation=torch.tanh, weight=xavier()
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
            sick={"task": _wide_circles, "activation": torch.sigmoid, "weight": xavier()},
            mended={"task": circles, **_relu_he},
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
        "V07",
        "hardtanh-30, N(0, 0.06), templates",
        **pair(
            chain,
            sick={"weight": normal(0.06)},
            mended={"weight": scaled(1.05)},
            depth=30,
            width=48,
            activation=F.hardtanh,
            optimizer=sgd(0.01, momentum=0.9),
        ),
        level=0.9,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.[0-9].*", "net.layers.1[0-4].*"),
        kin=("dense", "momentum"),
    ),
    Case(
        "V10",
        "10 convolutions with GELU, N(0, 0.02)",
        **pair(
            convnet,
            sick={"weight": normal(0.02)},
            mended={"weight": he(1.1)},
            depth=10,
            activation=F.gelu,
            optimizer=adam(2e-3),
        ),
        level=0.9,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.convs.[0-4].*",),
        kin=("convolutional", "adam"),
    ),
    Case(
        "V11",
        "6 convolutions with sigmoid",
        **pair(
            convnet,
            sick={"activation": torch.sigmoid, "weight": xavier()},
            mended=_relu_he,
            depth=6,
            optimizer=sgd(0.03, momentum=0.9),
        ),
        level=0.9,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.convs.[0-2].*",),
        kin=("convolutional", "momentum"),
    ),
    Case(
        "V12",
        "softsign-15 with torch's own initialisation",
        **pair(
            chain,
            sick={},
            mended={"weight": scaled(1.4)},
            depth=15,
            activation=F.softsign,
            optimizer=sgd(0.03, momentum=0.9),
        ),
        level=0.9,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.[0-6].*",),
        kin=("dense", "momentum"),
    ),
    Case(
        "V13",
        "erf-8, biases 2.5",
        **pair(
            chain, sick={"bias": 2.5}, mended={"bias": 0.0}, depth=8, activation=torch.erf, weight=xavier()
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
            sick={"bias": -5.0, "weight": xavier()},
            mended={"bias": -0.7, "weight": he()},
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
        "V15",
        "leaky ReLU-12, N(0, 0.03), no biases: every weight starves alike",
        **pair(
            chain,
            sick={"weight": normal(0.03)},
            mended={"weight": he(0.96)},
            depth=12,
            width=64,
            activation=_leaky,
            bias=0.0,
            optimizer=sgd(0.01, momentum=0.9),
        ),
        level=0.9,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.*.weight",),
        also=(Fault.STALLED,),
        why="homogeneous: weight times gradient is the same in all layers, so that none is worse than another",
        kin=("dense", "momentum"),
    ),
    Case(
        "V16",
        "deep linear net, 12 layers, N(0, 0.05)",
        **pair(
            chain,
            sick={"weight": normal(0.05)},
            mended={"weight": scaled(1.0)},
            depth=12,
            activation=_identity,
            optimizer=sgd(0.01),
        ),
        level=0.9,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.[0-5].*",),
        kin=("dense", "sgd"),
    ),
    Case(
        "V17",
        "one of two branches vanishes, the other learns",
        **pair(_branches, sick={"sick": True}, mended={"sick": False}),
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
        mended=partial(transformer, **_attention),
        level=0.9,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.attention.*.q.*", "net.attention.*.k.*"),
        kin=("transformer", "adam"),
    ),
    Case(
        "V19",
        "tanh-12 in front of three healthy layers",
        build=touched(chain, _weaken, **_tanh_15),
        mended=partial(chain, **_tanh_15),
        level=0.9,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.[0-9].*",),
        kin=("dense", "sgd"),
    ),
    Case(
        "V20",
        "weight decay so large that all weights shrink to nothing",
        **pair(
            chain,
            sick={"optimizer": sgd(0.05, weight_decay=1.0)},
            mended={"optimizer": sgd(0.05, weight_decay=1e-4)},
            depth=6,
            activation=_leaky,
            weight=he(),
            bias=0.0,
        ),
        level=0.9,
        fault=V,
        cause=Cause.UNKNOWN,
        culprits=("net.*.weight",),
        onset=50,
        kin=("dense", "sgd"),
    ),
    Case(
        "V21",
        "sigmoid-8 with Nesterov momentum, four in accumulation",
        **pair(
            chain,
            sick={"activation": torch.sigmoid, "weight": xavier()},
            mended=_relu_he,
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
