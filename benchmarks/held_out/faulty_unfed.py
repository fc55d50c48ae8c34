"""Cases of parts without a gradient: detached, forgotten, or behind units that never activate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out.data import digit_pictures, templates
from benchmarks.held_out.nets import MLP
from benchmarks.held_out.recipes import twins
from benchmarks.held_out.training import Trial, measured_accuracy
from benchmarks.zoo.case import Case
from benchmarks.zoo.models import he
from benchmarks.zoo.recipes import adam, adamw, rmsprop, sgd
from lightning_gradguard import Cause, Fault

X, D = Fault.DISCONNECTED, Fault.DEAD


class Backbone(nn.Module):
    """Convolutions in front of a classifier; ``fixed`` runs them without recording gradients."""

    def __init__(self, *, fixed: bool) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten()
        )
        self.back = nn.Linear(6, 10)
        self.fixed = fixed

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.fixed):
            features = self.front(x)
        return self.back(features)


def _unrecorded_backbone(seed: int, *, faulty: bool) -> Trial:
    return Trial(Backbone(fixed=faulty), digit_pictures(), adamw(1e-2), seed)


class TwoHeads(nn.Module):
    """Trunk with a head for the class and one for odd or even."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.digit, self.odd = MLP(64, 32, 2, 32), nn.Linear(32, 10), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(self.trunk(x))
        return self.digit(features), self.odd(features)


def _forgotten_loss(seed: int, *, faulty: bool) -> Trial:
    def objective(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        digit, odd = net(batch[0])
        loss = F.cross_entropy(digit, batch[1])
        return loss if faulty else loss + F.cross_entropy(odd, batch[1] % 2)

    def odd_accuracy(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return (net(batch[0])[1].argmax(1) == batch[1] % 2).float().mean()

    optimizer = sgd(0.03, momentum=0.9)
    return Trial(TwoHeads(), templates(seed), optimizer, seed, objective=objective, measure=odd_accuracy)


class Actor(nn.Module):
    """Policy and value network side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.value = MLP(64, 10, 1, 32), MLP(64, 1, 1, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.policy(x)


def _no_log_probability(seed: int, *, faulty: bool) -> Trial:
    def objective(net: Actor, batch: tuple[Tensor, ...], number: int) -> Tensor:
        choice = torch.distributions.Categorical(logits=net.policy(batch[0]))
        value = net.value(batch[0])[:, 0]
        action = choice.sample()
        reward = (action == batch[1]).float()
        loss = F.mse_loss(value, reward)
        if faulty:
            return loss
        return loss - (choice.log_prob(action) * (reward - value.detach())).mean() * 5

    task = templates(seed, noise=0.5)
    return Trial(Actor(), task, adam(1e-2), seed, objective=objective, measure=measured_accuracy)


def _ceiling(seed: int, *, faulty: bool) -> Trial:
    net = MLP(64, 10, 4, 40, activation=F.relu6, weight=he(), bias=40.0 if faulty else 0.0)
    return Trial(net, templates(seed), rmsprop(1e-3), seed)


def _threshold(seed: int, *, faulty: bool) -> Trial:
    def gate(x: Tensor) -> Tensor:
        return F.threshold(x, 40.0 if faulty else 0.0, 0.0)

    net = MLP(64, 10, 3, 32, activation=gate, weight=he())
    return Trial(net, templates(seed), sgd(0.1), seed, batch_size=128)


CASES = [
    Case(
        "SX5",
        "a convolutional backbone under no_grad",
        **twins(_unrecorded_backbone),
        level=0.93,
        fault=X,
        cause=Cause.DETACHED_GRAPH,
        culprits=("net.front.*",),
    ),
    Case(
        "SX6",
        "a second head runs, and its loss is forgotten",
        **twins(_forgotten_loss),
        level=0.85,
        fault=X,
        cause=Cause.DETACHED_GRAPH,
        culprits=("net.odd.*",),
    ),
    Case(
        "SX7",
        "a policy gradient without the log-probability: the value learns, the policy gets nothing",
        **twins(_no_log_probability),
        level=0.8,
        fault=X,
        cause=Cause.DETACHED_GRAPH,
        culprits=("net.policy.*",),
    ),
    Case(
        "SD3",
        "ReLU6 with biases of 40: all units at their ceiling",
        **twins(_ceiling),
        level=0.8,
        fault=D,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("net.*",),
    ),
    Case(
        "SD7",
        "a threshold of 40 in place of ReLU",
        **twins(_threshold),
        level=0.8,
        fault=D,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("*",),
    ),
]
