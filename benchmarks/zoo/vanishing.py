"""Cases of gradients that vanish because of a bad initialisation."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import he, normal, scaled
from benchmarks.zoo.recipes import chain, convnet, pair, sgd, touched
from benchmarks.zoo.tasks import circles
from benchmarks.zoo.training import Training
from lightning_gradguard import Cause, Fault

V = Fault.VANISHING

_momentum = sgd(0.02, momentum=0.9)

_tanh_15 = {"depth": 15, "activation": torch.tanh, "weight": scaled(1.0)}


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _leaky(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x, 0.3)


def _weaken(training: Training) -> None:
    for layer in training.net.layers[:12]:
        layer.weight.mul_(0.15)


CASES = [
    Case(
        "V02",
        "tanh-20, N(0, 0.01), circles",
        **pair(
            chain,
            faulty={"weight": normal(0.01)},
            fixed={"weight": scaled(1.05)},
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
            faulty={"weight": normal(0.05)},
            fixed={"weight": he()},
            depth=20,
            width=64,
            optimizer=sgd(0.01, momentum=0.9),
        ),
        level=0.8,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.[0-9].*",),
        kin=("dense", "momentum"),
    ),
    Case(
        "V07",
        "hardtanh-30, N(0, 0.06), templates",
        **pair(
            chain,
            faulty={"weight": normal(0.06)},
            fixed={"weight": scaled(1.05)},
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
        "8 convolutions with GELU, N(0, 0.015)",
        **pair(
            convnet,
            faulty={"weight": normal(0.015)},
            fixed={"weight": he(1.1)},
            depth=8,
            activation=F.gelu,
            optimizer=sgd(0.02, momentum=0.9),
        ),
        level=0.9,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.convs.[0-3].*",),
        kin=("convolutional", "momentum"),
    ),
    Case(
        "V12",
        "softsign-15 with torch's own initialisation",
        **pair(
            chain,
            faulty={},
            fixed={"weight": scaled(1.4)},
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
        "V15",
        "leaky ReLU-12, N(0, 0.03), no biases: every weight starves alike",
        **pair(
            chain,
            faulty={"weight": normal(0.03)},
            fixed={"weight": he(0.96)},
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
            faulty={"weight": normal(0.05)},
            fixed={"weight": scaled(1.0)},
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
        "V19",
        "tanh-12 in front of three healthy layers",
        build=touched(chain, _weaken, **_tanh_15),
        fixed=partial(chain, **_tanh_15),
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
            faulty={"optimizer": sgd(0.05, weight_decay=1.0)},
            fixed={"optimizer": sgd(0.05, weight_decay=1e-4)},
            depth=6,
            activation=_leaky,
            weight=he(),
            bias=0.0,
        ),
        level=0.9,
        fault=V,
        cause=Cause.WEIGHT_DECAY,
        culprits=("net.*.weight",),
        onset=50,
        kin=("dense", "sgd"),
    ),
]
