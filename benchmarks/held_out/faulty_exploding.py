"""Cases of gradients, weights and losses that grow without bound."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out.data import digits, pairs, templates, waves
from benchmarks.held_out.faulty_vanishing import contrastive
from benchmarks.held_out.nets import MLP
from benchmarks.held_out.recipes import OVERFLOWS, SHOWS_ALL, twins
from benchmarks.held_out.training import Trial, seeded
from benchmarks.zoo.case import Case
from benchmarks.zoo.models import he, scaled
from benchmarks.zoo.recipes import adam, sgd
from benchmarks.zoo.tasks import Task, explained
from lightning_gradguard import Cause, Fault

E = Fault.EXPLODING


def _chaos(seed: int, *, faulty: bool) -> Trial:
    net = MLP(64, 10, 25, 48, activation=torch.tanh, weight=scaled(3.5 if faulty else 1.1))
    return Trial(net, digits(), sgd(0.01), seed)


def _above_the_stable_rate(seed: int, *, faulty: bool) -> Trial:
    optimizer = sgd(0.13 if faulty else 0.01)
    return Trial(nn.Linear(12, 1), waves(seed, scale=3.0), optimizer, seed, batch_size=100)


class Dynamics(nn.Module):
    """Net that applies the same linear step many times."""

    def __init__(self, times: int, gain: float) -> None:
        super().__init__()
        self.times = times
        self.step, self.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        nn.init.orthogonal_(self.step.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.step(x)
        return self.out(x)


def _dynamics(seed: int, *, faulty: bool) -> Trial:
    turn = torch.linalg.qr(torch.randn(6, 6, generator=seeded(seed)))[0]

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 6, generator=generator)
        return x, x @ turn

    net = Dynamics(40, 1.6) if faulty else Dynamics(3, 1.0)
    return Trial(net, Task(draw, F.mse_loss, explained), sgd(0.01 if faulty else 0.05), seed)


def _baird(seed: int, *, faulty: bool) -> Trial:
    """Return seven states with eight features; values are zero, and all transitions end in the last state."""
    states = torch.zeros(7, 8)
    for state in range(6):
        states[state, state], states[state, 7] = 2.0, 1.0
    states[6, 6], states[6, 7] = 1.0, 2.0
    discount = 0.99 if faulty else 0.1

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        now = torch.randint(7, (size,), generator=generator)
        return states[now], states[torch.full((size,), 6)]

    def half_gradient(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        return F.mse_loss(net(batch[0]), discount * net(batch[1]).detach())

    def nearness(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return 1 - (net(states).abs().mean() / 5).clamp(0, 9)

    net = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 1, 1, 1, 1, 1, 10, 1]]))
    return Trial(net, Task(draw), sgd(0.05), seed, objective=half_gradient, measure=nearness)


def _without_margin(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    """Pull pairs of a class together and push others apart without limit."""
    distance, same = (net(batch[0]) - net(batch[1])).square().sum(1), batch[2]
    together = (same * distance).sum() / (same.sum() + 1)
    return together - ((1 - same) * distance).sum() / ((1 - same).sum() + 1)


def _boundless(seed: int, *, faulty: bool) -> Trial:
    def bounded(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return 2.0 * (net(batch[0]).abs().max() < 100)

    net = MLP(64, 8, 3, 32, weight=he())
    objective = _without_margin if faulty else contrastive
    return Trial(net, pairs(seed, classes=5), adam(2e-3), seed, objective=objective, measure=bounded)


def _rate_finder(seed: int, *, faulty: bool) -> Trial:
    def rising(step: int) -> float:
        return 1.06**step if faulty else 1.0

    net = MLP(64, 10, 3, 40, weight=he())
    return Trial(net, templates(seed), sgd(1e-3 if faulty else 0.1), seed, schedule=rising)


def _momentum_above_one(seed: int, *, faulty: bool) -> Trial:
    optimizer = sgd(0.05, momentum=1.02 if faulty else 0.9)
    return Trial(MLP(64, 10, 3, 32, weight=he()), templates(seed), optimizer, seed)


def powers(*, standard: bool) -> Task:
    """Return a sine of a number from -2 to 2, with its first six powers as features."""
    widths = torch.tensor([1.15, 1.8, 3.0, 5.3, 9.6, 17.7]) if standard else torch.ones(6)

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x = 4 * torch.rand(size, 1, generator=generator) - 2
        return torch.cat([x**k for k in range(1, 7)], 1) / widths, torch.sin(2 * x)

    return Task(draw, F.mse_loss, explained)


def _powers(seed: int, *, faulty: bool) -> Trial:
    net = nn.Linear(6, 1) if faulty else MLP(6, 1, 1, 32)
    return Trial(net, powers(standard=not faulty), sgd(0.02) if faulty else adam(1e-2), seed)


CASES = [
    Case(
        "SE2",
        "tanh-25, sigma_w = 3.5, digits: chaos",
        **twins(_chaos),
        level=0.6,
        fault=E,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.fc?.*",),
    ),
    Case(
        "SE3",
        "linear regression above the stable learning rate",
        **twins(_above_the_stable_rate),
        level=0.5,
        fault=E,
        cause=Cause.LEARNING_RATE_TOO_HIGH,
        culprits=("*",),
        also=OVERFLOWS,
        why=SHOWS_ALL,
    ),
    Case(
        "SE5",
        "linear dynamics unrolled 40 times, gain 1.6",
        **twins(_dynamics),
        level=0.5,
        fault=E,
        cause=Cause.RECURRENCE,
        culprits=("*",),
        also=OVERFLOWS,
        why=SHOWS_ALL,
    ),
    Case(
        "SE7",
        "off-policy temporal differences with linear values: Baird's counterexample",
        **twins(_baird),
        level=0.5,
        fault=E,
        cause=Cause.UNKNOWN,
        culprits=("*",),
        also=(Fault.NONFINITE, Fault.OVERSIZED_UPDATE),
        why=SHOWS_ALL,
    ),
    Case(
        "SEE",
        "distances pushed apart without a margin: the loss falls for ever",
        **twins(_boundless),
        level=1.1,
        fault=E,
        cause=Cause.LOSS_FUNCTION,
        culprits=("*",),
        also=(Fault.OVERSIZED_UPDATE, Fault.NONFINITE),
        why="the weights grow without bound",
    ),
    Case(
        "SEA",
        "a learning-rate finder left in: the rate rises by 6 % at each step, without end",
        **twins(_rate_finder),
        level=0.8,
        fault=E,
        cause=Cause.LEARNING_RATE_TOO_HIGH,
        culprits=("*",),
        onset=120,
        also=OVERFLOWS,
        why=SHOWS_ALL,
    ),
    Case(
        "SEC",
        "momentum of 1.02: the velocity grows of itself",
        **twins(_momentum_above_one),
        level=0.8,
        fault=E,
        cause=Cause.MOMENTUM,
        culprits=("*",),
        also=OVERFLOWS,
        why=SHOWS_ALL,
    ),
    Case(
        "SED",
        "powers up to the sixth as features, not scaled",
        **twins(_powers),
        level=0.4,
        fault=E,
        cause=Cause.UNNORMALIZED_INPUT,
        culprits=("*",),
        also=OVERFLOWS,
        why=SHOWS_ALL,
    ),
]
