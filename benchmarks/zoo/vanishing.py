"""Gradients that vanish on their way to the input: V01 to V07 of DETECTION.md, and more."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import Branches, Chain, he, normal, scaled, xavier
from benchmarks.zoo.recipes import adam, chain, convnet, sgd, touched, transformer
from benchmarks.zoo.tasks import Task, accuracy, circles, templates
from benchmarks.zoo.training import Training
from lightning_gradguard import Cause, Fault

V = Fault.VANISHING

_relu_he = {"activation": torch.relu, "weight": he()}


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


def _shrink(seed: int, *, decay: float) -> Training:
    return chain(seed, depth=6, width=32, weight=he(), bias=0.0, optimizer=sgd(0.05, weight_decay=decay))


CASES = [
    Case(
        "V01", "sigmoid MLP-10, Xavier, circles", partial(chain, task=circles, depth=10, activation=torch.sigmoid, weight=xavier()),
        0.9, V, Cause.SATURATING_ACTIVATION, ("net.layers.[0-4].*",),
        mended=partial(chain, task=circles, depth=10, optimizer=sgd(0.05, momentum=0.9), **_relu_he), kin=("dense", "sgd"),
    ),
    Case(
        "V02", "tanh-20, N(0, 0.01), circles", partial(chain, task=circles, depth=20, activation=torch.tanh, weight=normal(0.01)),
        0.9, V, Cause.BAD_INITIALIZATION, ("net.layers.[0-9].*",),
        mended=partial(chain, task=circles, depth=20, activation=torch.tanh, weight=scaled(1.05), optimizer=sgd(0.03, momentum=0.9)),
        kin=("dense", "sgd"),
    ),
    Case(
        "V03", "ReLU-20, N(0, 0.05), templates", partial(chain, depth=20, width=64, weight=normal(0.05)),
        0.9, V, Cause.BAD_INITIALIZATION, ("net.layers.[0-9].*",),
        mended=partial(chain, depth=20, width=64, weight=he(), optimizer=adam(1e-3)), kin=("dense", "sgd"),
    ),
    Case(
        "V04", "sigmoid-8, Adam, templates: learns, but slowly",
        partial(chain, depth=8, width=32, activation=torch.sigmoid, weight=xavier(), optimizer=adam(1e-3)),
        0.9, V, Cause.SATURATING_ACTIVATION, ("net.layers.[0-3].*",),
        mended=partial(chain, depth=8, width=32, optimizer=adam(1e-3), **_relu_he), kin=("dense", "adam"),
    ),
    Case(
        "V05", "tanh-6, all biases 4, templates", partial(chain, depth=6, activation=torch.tanh, weight=xavier(), bias=4.0),
        0.9, V, Cause.SATURATING_ACTIVATION, ("net.layers.[0-2].*",),
        mended=partial(chain, depth=6, activation=torch.tanh, weight=xavier(), bias=0.0), kin=("dense", "sgd"),
    ),
    Case(
        "V06", "sigmoid-6, inputs times 100, circles",
        partial(chain, task=partial(circles, scale=100.0), depth=6, activation=torch.sigmoid, weight=xavier()),
        0.9, V, Cause.UNNORMALIZED_INPUT, ("net.layers.[0-2].*",),
        also=(), mended=partial(chain, task=circles, depth=6, optimizer=sgd(0.1, momentum=0.9), **_relu_he), kin=("dense", "sgd"),
    ),
    Case(
        "V07", "hardtanh-30, N(0, 0.06), templates", partial(chain, depth=30, width=48, activation=F.hardtanh, weight=normal(0.06)),
        0.9, V, Cause.BAD_INITIALIZATION, ("net.layers.[0-9].*", "net.layers.1[0-4].*"),
        mended=partial(chain, depth=30, width=48, activation=F.hardtanh, weight=scaled(1.05), optimizer=adam(1e-3)),
        kin=("dense", "sgd"),
    ),
    Case(
        "V10", "10 convolutions, N(0, 0.02)", partial(convnet, depth=10, weight=normal(0.02)),
        0.9, V, Cause.BAD_INITIALIZATION, ("net.convs.[0-4].*",),
        mended=partial(convnet, depth=10, weight=he(), optimizer=adam(2e-3)), kin=("convolutional", "sgd"),
    ),
    Case(
        "V11", "8 convolutions with sigmoid", partial(convnet, depth=8, activation=torch.sigmoid, weight=xavier()),
        0.9, V, Cause.SATURATING_ACTIVATION, ("net.convs.[0-3].*",),
        mended=partial(convnet, depth=8, weight=he()), kin=("convolutional", "sgd"),
    ),
    Case(
        "V12", "softsign-15 with torch's own initialisation", partial(chain, depth=15, activation=F.softsign),
        0.9, V, Cause.BAD_INITIALIZATION, ("net.layers.[0-6].*",),
        mended=partial(chain, depth=15, activation=F.softsign, weight=scaled(1.4), optimizer=adam(2e-3)), kin=("dense", "sgd"),
    ),
    Case(
        "V13", "erf-8, biases 2.5", partial(chain, depth=8, activation=torch.erf, weight=xavier(), bias=2.5),
        0.9, V, Cause.SATURATING_ACTIVATION, ("net.layers.[0-3].*",),
        mended=partial(chain, depth=8, activation=torch.erf, weight=xavier(), bias=0.0), kin=("dense", "sgd"),
    ),
    Case(
        "V14", "softplus-8, biases -5", partial(chain, depth=8, activation=F.softplus, weight=xavier(), bias=-5.0),
        0.9, V, Cause.SATURATING_ACTIVATION, ("net.layers.[0-3].*",),
        mended=partial(chain, depth=8, activation=F.softplus, weight=he(), bias=-0.7, optimizer=adam(1e-3)), kin=("dense", "sgd"),
    ),
    Case(
        "V15", "ReLU-20, N(0, 0.05), no biases: every weight starves alike",
        partial(chain, depth=20, width=64, weight=normal(0.05), bias=0.0),
        0.9, V, Cause.BAD_INITIALIZATION, ("net.*.weight",),
        also=(Fault.STALLED,), why="homogeneous: the product of weight and gradient is the same in all layers, so none is worse",
        mended=partial(chain, depth=20, width=64, weight=he(), bias=0.0, optimizer=adam(1e-3)), kin=("dense", "sgd"),
    ),
    Case(
        "V16", "deep linear net, 12 layers, N(0, 0.05)",
        partial(chain, depth=12, activation=lambda x: x, weight=normal(0.05)),
        0.9, V, Cause.BAD_INITIALIZATION, ("net.layers.[0-5].*",),
        mended=partial(chain, depth=12, activation=lambda x: x, weight=scaled(1.0), optimizer=sgd(0.01)), kin=("dense", "sgd"),
    ),
    Case(
        "V17", "one of two branches vanishes, the other learns", partial(_branches, sick=True),
        0.8, V, Cause.SATURATING_ACTIVATION, ("net.left.layers.[0-4].*",),
        mended=partial(_branches, sick=False), kin=("branches", "sgd"),
    ),
    Case(
        "V18", "attention with huge logits: the softmax is saturated",
        partial(transformer, tokens=False, pooled=True, sharpness=300.0, optimizer=sgd(0.1)),
        0.9, V, Cause.SATURATING_ACTIVATION, ("net.attention.*.q.*", "net.attention.*.k.*"),
        mended=partial(transformer, tokens=False, pooled=True, optimizer=sgd(0.1)), kin=("transformer", "sgd"),
    ),
    Case(
        "V19", "tanh-12 in front of three healthy layers",
        touched(
            chain,
            lambda t: [layer.weight.mul_(0.15) for layer in list(t.net.layers)[:12]],
            depth=15, activation=torch.tanh, weight=scaled(1.0),
        ),
        0.9, V, Cause.BAD_INITIALIZATION, ("net.layers.[0-9].*",),
        mended=partial(chain, depth=15, activation=torch.tanh, weight=scaled(1.0)), kin=("dense", "sgd"),
    ),
    Case(
        "V20", "weight decay so large that all weights shrink to nothing", partial(_shrink, decay=1.0),
        0.9, V, Cause.UNKNOWN, ("net.*.weight",), onset=50,
        mended=partial(_shrink, decay=1e-4), kin=("dense", "sgd"),
    ),
    Case(
        "V21", "sigmoid-8 with Nesterov momentum",
        partial(chain, task=templates, depth=8, activation=torch.sigmoid, weight=xavier(), optimizer=sgd(0.05, momentum=0.9, nesterov=True)),
        0.9, V, Cause.SATURATING_ACTIVATION, ("net.layers.[0-3].*",),
        mended=partial(chain, depth=8, optimizer=sgd(0.05, momentum=0.9, nesterov=True), **_relu_he), kin=("dense", "momentum"),
    ),
]
