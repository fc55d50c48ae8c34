"""Healthy trainings that start from a trained net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out.data import changed, digit_pictures, rotated_templates, templates
from benchmarks.held_out.nets import MLP, VisionTransformer
from benchmarks.held_out.training import Trial, measured_accuracy, seeded
from benchmarks.zoo.case import Case
from benchmarks.zoo.models import he
from benchmarks.zoo.recipes import adam, adamw, sgd
from benchmarks.zoo.tasks import Task


def learned(net: nn.Module, task: Task, seed: int, steps: int) -> Any:
    """Return the net after some steps of Adam in a plain loop."""
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for number in range(steps):
        x, y = task.draw(seeded(31 * seed + number), 64)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return net


def learned_mlp(seed: int, steps: int = 150) -> MLP:
    """Return three ReLU layers that have learned `templates`."""
    net: MLP = learned(MLP(64, 10, 3, 48, weight=he()), templates(seed), seed, steps)
    return net


class LowRank(nn.Module):
    """Frozen net with low-rank updates beside its hidden layers, which start at zero (LoRA)."""

    def __init__(self, base: MLP, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        weights = [base.get_parameter(f"fc{k}.weight") for k in range(base.depth)]
        self.down = nn.ParameterList(
            nn.Parameter(torch.randn(rank, w.shape[1]) / w.shape[1] ** 0.5) for w in weights
        )
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(w.shape[0], rank)) for w in weights)

    def forward(self, x: Tensor) -> Tensor:
        for k, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            x = torch.relu(self.base.get_submodule(f"fc{k}")(x) + x @ down.T @ up.T * 2)
        return self.base.out(x)


def _low_rank(seed: int) -> Trial:
    return Trial(LowRank(learned_mlp(seed)), rotated_templates(seed), adamw(5e-3), seed)


class Prompted(nn.Module):
    """Frozen transformer with learned tokens beside its own, and a new head."""

    def __init__(self, base: VisionTransformer) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.prompt = nn.Parameter(0.02 * torch.randn(1, 6, 24))
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.base.tokens(x), self.prompt.expand(len(x), -1, -1)], 1)
        return self.head(self.base.encode(tokens)[:, 0])


def _prompts(seed: int) -> Trial:
    pictures = digit_pictures()
    base = learned(VisionTransformer(), pictures, seed, 120)
    odd = changed(pictures, lambda x, y: (x, y % 2))
    return Trial(Prompted(base), odd, adam(1e-2), seed)


def _more_of_the_same(seed: int) -> Trial:
    return Trial(learned_mlp(seed, 300), templates(seed), sgd(1e-2), seed, batch_size=32, pool=500)


def _rates_by_layer(seed: int) -> Trial:
    net = learned_mlp(seed)
    rates = {"out": 0.1, "fc2": 1e-2, "fc1": 1e-3, "fc0": 1e-5}

    def optimizer(_: Any) -> torch.optim.Optimizer:
        groups = [{"params": net.get_submodule(name).parameters(), "lr": lr} for name, lr in rates.items()]
        return torch.optim.SGD(groups)

    return Trial(net, rotated_templates(seed), optimizer, seed)


def _distillation(seed: int) -> Trial:
    teacher = learned_mlp(seed, 300).requires_grad_(False)

    def objective(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        student, taught = (net(batch[0]) / 4).log_softmax(1), (teacher(batch[0]) / 4).softmax(1)
        return 16 * F.kl_div(student, taught, reduction="batchmean")

    net = MLP(64, 10, 1, 24)
    return Trial(net, templates(seed), adam(5e-3), seed, objective=objective, measure=measured_accuracy)


CASES = [
    Case("HB15", "low-rank updates of a frozen net, from zero", _low_rank, 0.7),
    Case("HB17", "prompts for a frozen vision transformer", _prompts, 0.8),
    Case("HC17", "a net that has learned, on more of the same data", _more_of_the_same, 0.9),
    Case("HC31", "learning rates over four decades, by layer", _rates_by_layer, 0.7),
    Case("HD12", "distillation at temperature 4", _distillation, 0.8),
]
