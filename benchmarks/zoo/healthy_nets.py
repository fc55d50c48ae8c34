"""Healthy trainings whose net could mislead a rule: deep, normalised, residual, convolutional."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import Branches, Chain, he, orthogonal, scaled, xavier
from benchmarks.zoo.recipes import (
    adam,
    chain,
    convnet,
    residual,
    rmsprop,
    sgd,
    touched,
)
from benchmarks.zoo.tasks import Task, circles, explained, images, regression, spirals, templates
from benchmarks.zoo.training import Training


def _half_dead(training: Training) -> None:
    for layer in training.net.layers:
        layer.bias[::2] = -20.0


class _Heads(nn.Module):
    """Deep and shallow path to the same outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Branches(Chain(32, 8, depth=6, weight=he()), Chain(32, 8, depth=1, weight=he()), 32)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.both(x))


def _heads(seed: int) -> Training:
    return Training(_Heads(), templates(seed), adam(2e-3), seed=seed)


class Autoencoder(nn.Module):
    """Convolutional autoencoder with a narrow code."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()
        )
        self.code = nn.Linear(144, 8)
        self.up = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 100))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.code(self.down(x)))


def _autoencoder(seed: int) -> Training:
    own = images(seed, noise=0.1)

    def draw(generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, _ = own.draw(generator, size)
        return x, x.flatten(1)

    return Training(Autoencoder(), Task(draw, F.mse_loss, explained), adam(3e-3), seed=seed)


CASES = [
    Case("H01", "ReLU-5, He", partial(chain, depth=5, weight=he()), 0.9, kin=("dense", "sgd")),
    Case("H02", "20 pre-LN residual blocks", partial(residual, blocks=20), 0.9, kin=("residual", "sgd")),
    Case(
        "H03",
        "12 residual blocks that start at zero",
        partial(residual, blocks=12, zero=True, optimizer=adam(2e-3)),
        0.9,
        kin=("residual", "adam"),
    ),
    Case(
        "H04",
        "batch normalisation and dropout",
        partial(chain, depth=4, norm=nn.BatchNorm1d, dropout=0.3),
        0.9,
        kin=("dense", "normalised", "sgd"),
    ),
    Case(
        "H05",
        "layer normalisation, 15 layers",
        partial(chain, depth=15, norm=nn.LayerNorm, weight=he(), optimizer=sgd(0.05)),
        0.8,
        kin=("dense", "normalised", "sgd"),
    ),
    Case(
        "H06",
        "tanh-10, Xavier",
        partial(chain, depth=10, activation=torch.tanh, weight=xavier(), bias=0.0),
        0.9,
        kin=("dense", "sgd"),
    ),
    Case(
        "H07",
        "ReLU-10, He, SGD",
        partial(chain, depth=10, weight=he(), optimizer=sgd(0.03)),
        0.8,
        kin=("dense", "sgd"),
    ),
    Case(
        "H08",
        "two sigmoid layers",
        partial(chain, depth=2, activation=torch.sigmoid, weight=xavier(), optimizer=adam(1e-2)),
        0.9,
        kin=("dense", "adam"),
    ),
    Case(
        "H30",
        "layer normalisation, 40 layers",
        partial(chain, depth=40, activation=torch.tanh, norm=nn.LayerNorm, weight=he(), optimizer=adam(1e-3)),
        0.6,
        kin=("dense", "normalised", "adam"),
    ),
    Case(
        "H31",
        "SELU-15 with its own initialisation",
        partial(chain, depth=15, activation=F.selu, weight=scaled(1.0), bias=0.0, optimizer=sgd(0.01)),
        0.9,
        kin=("dense", "sgd"),
    ),
    Case(
        "H32",
        "tanh-30, orthogonal",
        partial(
            chain, depth=30, activation=torch.tanh, weight=orthogonal(1.05), bias=0.0, optimizer=adam(5e-4)
        ),
        0.8,
        kin=("dense", "adam"),
    ),
    Case(
        "H33",
        "deep linear net, 10 layers",
        partial(
            chain, task=regression, depth=10, activation=lambda x: x, weight=orthogonal(), optimizer=sgd(0.01)
        ),
        0.5,
        kin=("dense", "regression", "sgd"),
    ),
    Case(
        "H34",
        "softplus-4",
        partial(chain, depth=4, activation=F.softplus, weight=xavier(), optimizer=adam(3e-3)),
        0.9,
        kin=("dense", "adam"),
    ),
    Case(
        "H35",
        "half of the units of each layer are dead, and the rest learn",
        touched(chain, _half_dead, depth=3, width=64, weight=he()),
        0.9,
        kin=("dense", "sgd"),
    ),
    Case(
        "H36",
        "3 convolutions",
        partial(convnet, depth=3, weight=he()),
        0.9,
        kin=("convolutional", "momentum"),
    ),
    Case(
        "H37",
        "12 convolutions with skips and batch normalisation",
        partial(convnet, depth=12, norm=True, skip=True, weight=he(), optimizer=sgd(0.02)),
        0.9,
        kin=("convolutional", "residual", "normalised", "sgd"),
    ),
    Case("H38", "convolutional autoencoder", _autoencoder, 0.5, kin=("convolutional", "generative", "adam")),
    Case("H43", "a deep and a shallow branch", _heads, 0.9, kin=("branches", "adam")),
    Case(
        "H44",
        "GELU-6, RMSprop",
        partial(chain, depth=6, activation=F.gelu, weight=he(), optimizer=rmsprop(1e-3)),
        0.9,
        kin=("dense", "rmsprop"),
    ),
    Case(
        "H45",
        "tanh-6 on the circles",
        partial(
            chain,
            task=circles,
            depth=6,
            activation=torch.tanh,
            weight=xavier(),
            optimizer=sgd(0.05, momentum=0.9),
        ),
        0.9,
        kin=("dense", "momentum"),
    ),
    Case(
        "H15",
        "two spirals, fitted to the last of 100 points",
        partial(chain, task=spirals, depth=4, width=64, weight=he(), optimizer=adam(3e-3), pool=100),
        0.95,
        steps=500,
        kin=("dense", "adam"),
    ),
]
