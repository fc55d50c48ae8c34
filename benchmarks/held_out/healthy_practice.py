"""Healthy trainings with unusual practice: batch sizes, optimizers, schedules, unfreezing, changing data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from benchmarks.held_out.data import digits, rings, templates
from benchmarks.held_out.nets import MLP
from benchmarks.held_out.training import Trial, measured_accuracy
from benchmarks.zoo.case import Case
from benchmarks.zoo.models import he
from benchmarks.zoo.recipes import adam, sgd
from benchmarks.zoo.tasks import Task, accuracy
from benchmarks.zoo.training import MakeOptimizer


def _plain(seed: int, *, optimizer: MakeOptimizer | None = None, **options: Any) -> Trial:
    """Return three ReLU layers on templates; the default is SGD at 0.1."""
    return Trial(MLP(64, 10, 3, 40, weight=he()), templates(seed), optimizer or sgd(0.1), seed, **options)


def _single_examples(seed: int) -> Trial:
    return Trial(MLP(2, 2, 2, 32), rings(seed), adam(3e-3), seed, batch_size=1)


def _large_batches(seed: int) -> Trial:
    return Trial(MLP(64, 10, 2, 32), templates(seed), adam(3e-3), seed, batch_size=3000)


def _normed_at_one(seed: int) -> Trial:
    net = MLP(64, 10, 3, 64, norm=nn.BatchNorm1d, weight=he())
    return Trial(net, templates(seed), sgd(1.0), seed, batch_size=128)


def _last_of_one(seed: int) -> Trial:
    return Trial(MLP(64, 10, 2, 50), digits(), adam(2e-3), seed, batch_size=20, pool=401)


def _adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.02)


def _adadelta(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adadelta(parameters, lr=1.0)


def _triangles(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.CyclicLR(optimizer, 0.001, 0.3, 40, cycle_momentum=False)


def _to_zero(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.PolynomialLR(optimizer, 200, 1.0)


def _thaw(net: MLP, number: int) -> None:
    """Unfreeze one more layer every sixty steps, from the top."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith("out") or int(name[2]) >= 4 - number // 60)


def _thawing(seed: int) -> Trial:
    return Trial(MLP(64, 10, 4, 40, weight=he()), templates(seed), sgd(0.1), seed, before=_thaw)


def _half_of_the_classes(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (x, y) if number >= 150 else (x[y < 5], y[y < 5])


def _new_classes(seed: int) -> Trial:
    return Trial(MLP(64, 10, 3, 48), templates(seed), adam(3e-3), seed, spoil=_half_of_the_classes)


def _third_order(seed: int) -> Trial:
    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x = 2.0 * torch.randint(2, (size, 10), generator=generator) - 1
        return x, (x[:, 1] * x[:, 4] * x[:, 7] > 0).long()

    return Trial(MLP(10, 2, 1, 128, weight=he()), Task(draw), adam(5e-3), seed, batch_size=256)


class WithAside(nn.Module):
    """Net, and another beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = MLP(64, 10, 2, 32), MLP(64, 3, 2, 24)


def _every_fifth(seed: int) -> Trial:
    def objective(net: WithAside, batch: tuple[Tensor, ...], number: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(net.main(x), y)
        return loss + F.cross_entropy(net.side(x), y % 3) if number % 5 == 0 else loss

    def measure(net: WithAside, batch: tuple[Tensor, ...]) -> Tensor:
        return measured_accuracy(net.main, batch)

    return Trial(WithAside(), templates(seed), sgd(0.05), seed, objective=objective, measure=measure)


def _double(seed: int) -> Trial:
    def objective(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        return F.cross_entropy(net(batch[0].double()), batch[1])

    def measure(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return accuracy(net(batch[0].double()), batch[1])

    net = MLP(64, 10, 3, 40)
    return Trial(net, templates(seed), adam(3e-3), seed, objective=objective, measure=measure)


def _now_and_then(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * (2.5 if number % 30 == 7 else 1), y


def _trainer(**arguments: Any) -> Callable[[], dict[str, Any]]:
    return lambda: dict(arguments)


CASES = [
    Case("HA02", "batches of one example", _single_examples, 0.8, steps=500),
    Case("HA03", "batches of 3,000 examples", _large_batches, 0.8),
    Case("HA05", "batch normalisation, SGD at 1", _normed_at_one, 0.8),
    Case("HA09", "epochs whose last batch is one example", _last_of_one, 0.8),
    Case("HA13", "Adagrad", partial(_plain, optimizer=_adagrad), 0.8),
    Case("HA14", "Adadelta", partial(_plain, optimizer=_adadelta), 0.7),
    Case("HC03", "learning rate in triangles from 0.001 to 0.3", partial(_plain, scheduler=_triangles), 0.8),
    Case("HC08", "learning rate falls to zero, and stays there", partial(_plain, scheduler=_to_zero), 0.7),
    Case("HC10", "layers thaw from the top, one every 60 steps", _thawing, 0.8),
    Case("HC18", "five more classes from step 150 on: the loss leaps", _new_classes, 0.55),
    Case("HC24", "parity of three bits: a long plateau", _third_order, 0.85, steps=600),
    Case("HC28", "a part that is in use on every fifth batch only", _every_fifth, 0.8),
    Case(
        "HC30",
        "gradients clipped by value at 0.01",
        _plain,
        0.7,
        trainer=_trainer(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    ),
    Case("HC32", "double precision", _double, 0.8, trainer=_trainer(precision="64-true")),
    Case(
        "HC35",
        "inputs times 2.5 in one batch of thirty",
        partial(_plain, optimizer=adam(2e-3), spoil=_now_and_then),
        0.8,
    ),
]
