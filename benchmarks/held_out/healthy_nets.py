"""Healthy nets on vectors with an unusual form: gates, weight norms, experts, fixed points, generated weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from benchmarks.held_out.data import rings, templates
from benchmarks.held_out.nets import MLP, Highway, xavier_uniform
from benchmarks.held_out.training import Trial, seeded
from benchmarks.zoo.case import Case
from benchmarks.zoo.models import he
from benchmarks.zoo.recipes import adam, sgd
from benchmarks.zoo.tasks import Task, explained


def _highway(seed: int) -> Trial:
    return Trial(Highway(16, 40, -2.0, xavier_uniform), templates(seed), adam(2e-3), seed)


def _weight_norm(seed: int) -> Trial:
    net = MLP(64, 10, 4, 40, weight=he())
    for k in range(4):
        parametrizations.weight_norm(net.get_submodule(f"fc{k}"))
    return Trial(net, templates(seed), sgd(0.1), seed)


def _spectral_norm(seed: int) -> Trial:
    net = MLP(64, 10, 4, 40)
    for k in range(4):
        parametrizations.spectral_norm(net.get_submodule(f"fc{k}"))
    return Trial(net, templates(seed), adam(3e-3), seed)


class Siren(nn.Module):
    """Three layers with sine activations of frequency 30, and their initialisation (Sitzmann et al., 2020)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1 if k == 0 else width, width) for k in range(3))
        self.out = nn.Linear(width, 1)
        with torch.no_grad():
            for k, layer in enumerate(self.layers):
                bound = 1.0 if k == 0 else (6 / width) ** 0.5 / 30
                layer.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.out(x)


def _siren(seed: int) -> Trial:
    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x = 2 * torch.rand(size, 1, generator=generator) - 1
        return x, torch.sin(9 * x) + 0.5 * torch.cos(31 * x)

    return Trial(Siren(), Task(draw, F.mse_loss, explained), adam(5e-4), seed, batch_size=128)


class Experts(nn.Module):
    """Mixture in which each example goes to its best expert; the last of six is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 6)
        self.experts = nn.ModuleList(MLP(64, 32, 1, 16) for _ in range(6))
        self.out = nn.Linear(32, 10)
        with torch.no_grad():
            self.gate.bias[5] = -50.0

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.gate(x).softmax(1).max(1)
        hidden = torch.zeros(len(x), 32)
        for k, expert in enumerate(self.experts):
            mine = chosen == k
            if mine.any():
                hidden = hidden.index_add(0, mine.nonzero()[:, 0], share[mine, None] * expert(x[mine]))
        return self.out(hidden)


class Hypernetwork(nn.Module):
    """Net that generates the weights of a small net from a context of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 12 * 8 + 8))
        nn.init.normal_(self.maker[2].weight, std=0.05)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        made = self.maker(context)
        hidden = torch.tanh(torch.einsum("ni,nij->nj", x, made[:, :96].view(-1, 12, 8)))
        return (hidden * made[:, 96:]).sum(1)


def _hypernetwork(seed: int) -> Trial:
    directions = torch.randn(3, 12, generator=seeded(seed))

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(size, 12, generator=generator)
        which = torch.randint(3, (size,), generator=generator)
        return x, F.one_hot(which, 3).float(), torch.tanh((x * directions[which]).sum(1) / 3)

    def objective(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        return F.mse_loss(net(batch[0], batch[1]), batch[2])

    return Trial(Hypernetwork(), Task(draw), adam(5e-3), seed, objective=objective)


class Equilibrium(nn.Module):
    """Fixed point of one layer, found without gradients; they flow through its last two steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.back, self.out = nn.Linear(64, 40), nn.Linear(40, 40, bias=False), nn.Linear(40, 10)
        nn.init.orthogonal_(self.back.weight, 0.6)

    def forward(self, x: Tensor) -> Tensor:
        drive = self.inward(x)
        state = torch.zeros_like(drive)
        with torch.no_grad():
            for _ in range(15):
                state = torch.tanh(self.back(state) + drive)
        for _ in range(2):
            state = torch.tanh(self.back(state) + drive)
        return self.out(state)


class EulerFlow(nn.Module):
    """Neural differential equation in twenty Euler steps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 24)
        self.field = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
        self.out = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(20):
            x = x + self.field(x) / 20 * 2
        return self.out(x)


class Maxout(nn.Module):
    """Largest of four units, at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 40 * 4), nn.Linear(40, 10 * 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).view(-1, 40, 4).amax(2)
        return self.second(hidden).view(-1, 10, 4).amax(2)


class ReZero(nn.Module):
    """Residual blocks, each multiplied by a factor that starts at zero."""

    def __init__(self, blocks: int = 24, width: int = 40) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.factors = nn.Parameter(torch.zeros(blocks))
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, factor in zip(self.blocks, self.factors, strict=True):
            x = x + factor * torch.relu(block(x))
        return self.out(x)


def _experts(seed: int) -> Trial:
    return Trial(Experts(), templates(seed), adam(5e-3), seed)


def _equilibrium(seed: int) -> Trial:
    return Trial(Equilibrium(), templates(seed), adam(3e-3), seed)


def _rezero(seed: int) -> Trial:
    return Trial(ReZero(), templates(seed), adam(3e-3), seed)


def _euler(seed: int) -> Trial:
    return Trial(EulerFlow(), rings(seed), adam(5e-3), seed)


def _maxout(seed: int) -> Trial:
    return Trial(Maxout(), templates(seed), sgd(0.1), seed)


CASES = [
    Case("HB07", "highway of 16 layers, gates at -2", _highway, 0.8),
    Case("HB11", "weight normalisation", _weight_norm, 0.8),
    Case("HB12", "spectral normalisation", _spectral_norm, 0.8),
    Case("HB13", "sine activations fit a signal", _siren, 0.8),
    Case("HB14", "each example to one of six experts, one starved", _experts, 0.8),
    Case("HB18", "a net that makes another's weights", _hypernetwork, 0.6),
    Case("HB19", "a fixed point, gradients through its last steps only", _equilibrium, 0.8),
    Case("HB20", "a neural differential equation, 20 Euler steps", _euler, 0.9),
    Case("HB33", "maxout", _maxout, 0.7),
    Case("HB35", "24 residual blocks times factors of zero", _rezero, 0.8),
]
