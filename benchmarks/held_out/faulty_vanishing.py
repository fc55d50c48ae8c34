"""Cases of gradients that vanish with depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out.data import (
    changed,
    digit_pictures,
    digits,
    pairs,
    rings,
    templates,
    wine,
)
from benchmarks.held_out.nets import MLP, Highway, ResidualMLP, xavier_uniform
from benchmarks.held_out.recipes import twins
from benchmarks.held_out.training import Trial, seeded
from benchmarks.zoo.case import Case
from benchmarks.zoo.models import he, normal, scaled
from benchmarks.zoo.recipes import adam, adamw, sgd
from benchmarks.zoo.tasks import Task
from lightning_gradguard import Cause, Fault

V = Fault.VANISHING


class PlainConvolutions(nn.Module):
    """Fourteen convolutions of equal width, with or without batch normalisation, and a linear layer."""

    def __init__(self, *, normed: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1 if k == 0 else 8, 8, 3, padding=1) for k in range(14))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) if normed else nn.Identity() for _ in range(14))
        self.out = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.out(F.avg_pool2d(x, 2).flatten(1))


def _convolutions(seed: int, *, faulty: bool) -> Trial:
    return Trial(PlainConvolutions(normed=not faulty), digit_pictures(), sgd(0.05), seed, batch_size=32)


def _thirty_layers(seed: int, *, faulty: bool) -> Trial:
    net = MLP(2, 2, 30, 32) if faulty else ResidualMLP(2, 2, 15, 32)
    return Trial(net, rings(seed), sgd(0.01) if faulty else adam(2e-3), seed, batch_size=32)


def _raw_wine(seed: int, *, faulty: bool) -> Trial:
    net = MLP(13, 3, 5, 32, activation=torch.tanh, weight=scaled(1.0))
    return Trial(net, wine(standard=not faulty), sgd(0.03), seed, batch_size=16, pool=160)


def _autoencoder(seed: int, *, faulty: bool) -> Trial:
    net = MLP(64, 64, 9, 32, activation=torch.sigmoid if faulty else F.elu, weight=xavier_uniform)
    task = changed(digits(standard=False), lambda x, _: (x, x))

    def explained_by_pixel(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x = batch[1]
        return 1 - (net(x) - x).square().mean() / (x - x.mean(0)).square().mean()

    def reconstruction(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        return F.mse_loss(net(batch[0]), batch[1])

    return Trial(net, task, adam(2e-3), seed, objective=reconstruction, measure=explained_by_pixel)


def _highway(seed: int, *, faulty: bool) -> Trial:
    net = Highway(16, 40, 8.0 if faulty else -2.0, normal(0.06) if faulty else xavier_uniform)
    return Trial(net, templates(seed), sgd(0.1), seed)


def _small_factor(seed: int, *, faulty: bool) -> Trial:
    net = MLP(64, 10, 8, 40, weight=he(), scale=0.1 if faulty else 1.0)
    return Trial(net, templates(seed), sgd(0.05), seed)


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _softmax_units(seed: int, *, faulty: bool) -> Trial:
    net = MLP(64, 10, 6, 40, activation=_softmax if faulty else F.relu)
    return Trial(net, templates(seed), adamw(1e-3), seed)


def neighbourhoods(seed: int) -> Task:
    """Return graphs of 15 nodes, connected mostly within a class: features, neighbour means, classes."""
    centres = torch.randn(3, 8, generator=seeded(seed))

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.randint(3, (size, 15), generator=generator)
        x = 0.7 * centres[y] + torch.randn(size, 15, 8, generator=generator)
        chance = torch.rand(size, 15, 15, generator=generator) < 0.05
        edges = ((y[:, :, None] == y[:, None]) | chance).float() + torch.eye(15)
        return x, edges / edges.sum(2, keepdim=True), y

    return Task(draw)


class Rounds(nn.Module):
    """Twelve rounds of message passing: sigmoid without skips, or ReLU with them."""

    def __init__(self, *, saturating: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 24)
        self.rounds = nn.ModuleList(nn.Linear(24, 24) for _ in range(12))
        self.out = nn.Linear(24, 3)
        self.saturating = saturating

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for layer in self.rounds:
            message = layer(neighbours @ x)
            x = torch.sigmoid(message) if self.saturating else x + torch.relu(message) / 4
        return self.out(x)


def _rounds(seed: int, *, faulty: bool) -> Trial:
    def objective(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        return F.cross_entropy(net(batch[0], batch[1]).flatten(0, 1), batch[2].flatten())

    def by_node(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return (net(batch[0], batch[1]).argmax(-1) == batch[2]).float().mean()

    return Trial(
        Rounds(saturating=faulty),
        neighbourhoods(seed),
        adam(2e-3),
        seed,
        objective=objective,
        measure=by_node,
        batch_size=16,
    )


def contrastive(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    """Pull pairs of a class together and push others apart up to a margin of one."""
    distance = (net(batch[0]) - net(batch[1])).square().sum(1)
    apart = F.relu(1 - (distance + 1e-8).sqrt()).square()
    return (batch[2] * distance + (1 - batch[2]) * apart).mean()


def pair_accuracy(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the share of pairs that a distance of one half classifies correctly."""
    distance = (net(batch[0]) - net(batch[1])).norm(dim=1)
    return ((distance < 0.5) == (batch[2] > 0)).float().mean()


def _siamese(seed: int, *, faulty: bool) -> Trial:
    activation, weight = (torch.sigmoid, normal(0.1)) if faulty else (torch.relu, he())
    net = MLP(64, 8, 10, 32, activation=activation, weight=weight)
    task = pairs(seed, classes=4)
    return Trial(net, task, adam(1e-3), seed, objective=contrastive, measure=pair_accuracy)


CASES = [
    Case(
        "SV5",
        "14 plain convolutions with torch's own initialisation",
        **twins(_convolutions),
        level=0.8,
        fault=V,
        cause=Cause.TOO_DEEP,
        culprits=("net.convs.?.*",),
    ),
    Case(
        "SV6",
        "ReLU-30 with torch's own initialisation, rings",
        **twins(_thirty_layers),
        level=0.9,
        fault=V,
        cause=Cause.TOO_DEEP,
        culprits=("net.fc?.*", "net.fc1?.*"),
    ),
    Case(
        "SV7",
        "wine in raw units of up to 1680, tanh-5",
        **twins(_raw_wine),
        level=0.9,
        fault=V,
        cause=Cause.UNNORMALIZED_INPUT,
        culprits=("net.fc0.*",),
        also=(Fault.DEAD,),
        why="tanh is exactly 1 in single precision there, so that rows of the first layer get exactly nothing",
    ),
    Case(
        "SV9",
        "sigmoid-9 autoencoder of digits: learns their mean only",
        **twins(_autoencoder),
        level=0.25,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.fc[0-4].*",),
    ),
    Case(
        "SVA",
        "highway of 16 layers whose gates let nothing carry over, N(0, 0.06)",
        **twins(_highway),
        level=0.8,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.stem.*", "net.transforms.?.*", "net.gates.?.*"),
    ),
    Case(
        "SVB",
        "a factor of 0.1 behind each of 8 ReLU layers",
        **twins(_small_factor),
        level=0.8,
        fault=V,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("net.fc?.*",),
    ),
    Case(
        "SVD",
        "softmax as hidden activation, 6 layers",
        **twins(_softmax_units),
        level=0.8,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.fc[0-4].*",),
    ),
    Case(
        "SVG",
        "12 rounds of message passing with sigmoid",
        **twins(_rounds),
        level=0.9,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.stem.*", "net.rounds.?.*"),
    ),
    Case(
        "SVH",
        "siamese sigmoid-10 under a contrastive loss",
        **twins(_siamese),
        level=0.9,
        fault=V,
        cause=Cause.SATURATING_ACTIVATION,
        culprits=("net.fc?.*",),
        also=(Fault.STALLED,),
        why="every weight starves alike, below the eps of Adam",
    ),
]
