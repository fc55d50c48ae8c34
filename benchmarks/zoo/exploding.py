"""Cases of gradients that grow without bound."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Case
from benchmarks.zoo.generative import critic
from benchmarks.zoo.models import he, scaled
from benchmarks.zoo.recipes import adam, chain, convnet, messages, pair, recurrent, residual, sgd
from benchmarks.zoo.sequences import communities, summation
from benchmarks.zoo.tasks import circles, regression
from lightning_gradguard import Cause, Fault

X = Fault.EXPLODING

_overflow = "the first steps already overflow, so that little but the overflow is ever seen"


def _identity(gain: float) -> object:
    """Return an initialisation of gain times the identity."""

    def fill(weight: Tensor) -> None:
        weight.copy_(gain * torch.eye(len(weight)))

    return fill


def _drift(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale inputs e-fold every 20 steps from step 100 on, as a wrong running mean in the data pipeline would."""
    return x * float(torch.tensor(max(0, number - 100) / 20).exp()), y


def _outlier(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y * 1e3 if number == 150 else y


_scaled_targets = partial(regression, scale=1e4)

CASES = [
    Case(
        "E01",
        "ReLU-15, three times He",
        **pair(chain, faulty={"weight": he(3.0)}, fixed={"weight": he()}, depth=15, optimizer=sgd(0.01)),
        level=0.7,
        fault=X,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.*", "net.head.*"),
        also=(Fault.NONFINITE, Fault.OVERSIZED_UPDATE),
        why=_overflow,
        kin=("dense", "sgd"),
    ),
    Case(
        "E02",
        "tanh-20, sigma_w = 3: chaos",
        **pair(
            chain,
            faulty={"weight": scaled(3.0)},
            fixed={"weight": scaled(1.0)},
            task=circles,
            depth=20,
            width=64,
            bias=0.0,
            activation=torch.tanh,
            optimizer=adam(5e-4),
        ),
        level=0.9,
        fault=X,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.[0-9].*",),
        kin=("dense", "adam"),
    ),
    Case(
        "E04",
        "mean squared error on targets times 10,000",
        **pair(
            chain, faulty={"task": _scaled_targets}, fixed={"task": regression}, depth=3, optimizer=sgd(0.05)
        ),
        level=0.5,
        fault=X,
        cause=Cause.TARGET_SCALE,
        culprits=("net.head.*", "net.layers.2.*"),
        also=(Fault.NONFINITE, Fault.OVERSIZED_UPDATE),
        why=_overflow,
        kin=("dense", "regression", "sgd"),
    ),
    Case(
        "E05",
        "ReLU RNN, W = 1.25 times the identity, 60 steps",
        **pair(
            recurrent,
            faulty={"recurrent": _identity(1.25)},
            fixed={"recurrent": _identity(0.9)},
            kind=nn.RNN,
            relu=True,
            task=summation,
            optimizer=sgd(1e-3, momentum=0.9),
        ),
        level=0.7,
        fault=X,
        cause=Cause.RECURRENCE,
        culprits=("net.rnn.*",),
        also=(Fault.NONFINITE, Fault.OVERSIZED_UPDATE),
        why=_overflow,
        kin=("recurrent", "momentum"),
    ),
    Case(
        "E06",
        "one batch with targets times 1,000 at step 150",
        **pair(
            chain,
            faulty={"spoil": _outlier},
            fixed={},
            task=regression,
            depth=3,
            weight=he(),
            optimizer=adam(2e-3),
        ),
        level=0.8,
        fault=Fault.SPIKE,
        cause=Cause.OUTLIER_BATCH,
        culprits=("net.*",),
        onset=150,
        kind="event",
        kin=("dense", "regression", "adam"),
    ),
    Case(
        "E11",
        "8 convolutions, six times He",
        **pair(convnet, faulty={"weight": he(6.0)}, fixed={"weight": he()}, depth=8, optimizer=sgd(0.02)),
        level=0.6,
        fault=X,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.convs.*", "net.head.*"),
        also=(Fault.NONFINITE, Fault.OVERSIZED_UPDATE),
        why=_overflow,
        kin=("convolutional", "sgd"),
    ),
    Case(
        "E12",
        "24 residual blocks without normalisation",
        **pair(
            residual,
            faulty={"norm": False},
            fixed={"norm": True},
            blocks=24,
            weight=he(),
            optimizer=sgd(0.02),
        ),
        level=0.8,
        fault=X,
        cause=Cause.TOO_DEEP,
        culprits=("net.*",),
        also=(Fault.NONFINITE, Fault.OVERSIZED_UPDATE),
        why=_overflow,
        kin=("residual", "sgd"),
    ),
    Case(
        "E13",
        "message passing over sums, not means, of neighbours",
        **pair(
            messages,
            faulty={"task": partial(communities, normalise=False)},
            fixed={},
            rounds=4,
            weight=he(),
            optimizer=sgd(0.05, momentum=0.9),
        ),
        level=0.7,
        fault=X,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.*",),
        also=(Fault.NONFINITE, Fault.OVERSIZED_UPDATE),
        why=_overflow,
        kin=("graph", "momentum"),
    ),
    Case(
        "E14",
        "inputs grow e-fold every 20 steps from step 100 on",
        **pair(
            chain,
            faulty={"spoil": _drift},
            fixed={},
            task=regression,
            depth=3,
            weight=he(),
            optimizer=adam(1e-3),
        ),
        level=0.8,
        fault=X,
        cause=Cause.UNNORMALIZED_INPUT,
        culprits=("net.*",),
        onset=100,
        kin=("dense", "regression", "adam"),
    ),
    Case(
        "E15",
        "a critic without a bound: its loss falls for ever, and so it seems to learn",
        build=partial(critic, bounded=False),
        fixed=partial(critic, bounded=True),
        level=0.5,
        fault=X,
        cause=Cause.LOSS_FUNCTION,
        culprits=("critic.*",),
        kin=("generative", "rmsprop"),
    ),
    Case(
        "E16",
        "tanh-30, sigma_w = 4: chaos",
        **pair(
            chain,
            faulty={"weight": scaled(4.0)},
            fixed={"weight": scaled(1.0)},
            task=circles,
            depth=30,
            width=64,
            bias=0.0,
            activation=torch.tanh,
            optimizer=adam(5e-4),
        ),
        level=0.9,
        fault=X,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.layers.[0-9].*",),
        kin=("dense", "adam"),
    ),
]
