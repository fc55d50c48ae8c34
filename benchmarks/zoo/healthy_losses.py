"""Healthy trainings whose loss could mislead a rule: below, near or at zero, rising, or not falling."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.case import Case
from benchmarks.zoo.generative import Adversarial, Contrastive, Density, Variational, critic
from benchmarks.zoo.models import Apply, Chain, he
from benchmarks.zoo.recipes import adam, chain, sgd
from benchmarks.zoo.tasks import Task, accuracy, regression, templates
from benchmarks.zoo.training import Training

_relu = {"depth": 3, "weight": he()}


def _hinge(seed: int) -> Task:
    """Return margins between well separated classes: at the end the loss and all gradients are exactly zero."""
    own = templates(seed, noise=0.5)
    return Task(own.draw, F.multi_margin_loss, accuracy, own.inputs, own.outputs)


def _alignment(seed: int) -> Task:
    """Return a task with negative cosine loss: it starts near zero and falls to minus one."""
    own = regression(seed, outputs=16)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return -F.cosine_similarity(output, target, dim=1).mean()

    def score(output: Tensor, target: Tensor) -> Tensor:
        return F.cosine_similarity(output, target, dim=1).mean()

    return Task(own.draw, loss, score, own.inputs, own.outputs)


def _quantile(seed: int) -> Task:
    """Return a task for the 0.9 quantile, by the pinball loss, whose gradient has only two values."""
    own = regression(seed)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        error = target - output
        return torch.maximum(0.9 * error, -0.1 * error).mean()

    return Task(own.draw, loss, own.score, own.inputs, own.outputs)


def _imbalanced(seed: int) -> Task:
    """Return two classes, one of them only one in twenty: the loss starts low, and most batches teach little."""
    own = templates(seed, classes=2)

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x, y = own.draw(generator, 20 * size)
        order = (y * torch.rand(len(y), generator=generator)).argsort()
        rare = max(1, size // 20)
        rows = torch.cat([order[: size - rare], order[-rare:]])
        return x[rows], y[rows]

    def balanced(output: Tensor, target: Tensor) -> Tensor:
        right = (output.argmax(1) == target).float()
        return (right[target == 0].mean() + right[target == 1].mean()) / 2

    return Task(draw, score=balanced, inputs=64, outputs=2)


def _tiny(seed: int) -> Training:
    """Return a net whose outputs are as small as its targets, with a matching learning rate."""
    task = regression(seed, scale=1e-4)
    net = nn.Sequential(Chain(task.inputs, 1, depth=3, weight=he()), Apply(lambda x: 1e-4 * x))
    return Training(net, task, sgd(0.02 * 1e8), seed=seed)


class Noise(L.Callback):
    """Callback that adds noise to every gradient, about as large as the gradient of a batch."""

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        generator = torch.Generator().manual_seed(trainer.global_step)
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def _private() -> dict[str, Any]:
    return {"callbacks": [Noise()]}


class Rewarded(Training):
    """Policy gradient on templates: the loss stays near zero, and its gradient is mostly noise."""

    def __init__(self, seed: int) -> None:
        task = templates(seed, classes=4)
        super().__init__(Chain(64, 4, depth=2, weight=he()), task, adam(3e-3), seed=seed, batch_size=128)
        self.baseline = torch.zeros(())
        self.luck = torch.Generator().manual_seed(seed)

    def loss(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        scores = self.net(x).log_softmax(1)
        action = torch.multinomial(scores.detach().exp(), 1, generator=self.luck)[:, 0]
        reward = (action == y).float()
        advantage = reward - self.baseline
        self.baseline = 0.9 * self.baseline + 0.1 * reward.mean()
        self.score = self.task.score(scores.detach(), y)
        return -(advantage * scores.gather(1, action[:, None])[:, 0]).mean()


class Distilled(Training):
    """Net with self-distillation: it follows its own slow average, and that loss starts at exactly zero."""

    def __init__(self, seed: int) -> None:
        task = regression(seed)
        super().__init__(Chain(task.inputs, 1, depth=2, weight=he()), task, adam(3e-3), seed=seed)
        self.slow = Chain(task.inputs, 1, depth=2).requires_grad_(False)
        self.slow.load_state_dict(self.net.state_dict())

    def loss(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        output = self.net(x)
        with torch.no_grad():
            for slow, own in zip(self.slow.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(own, 0.05)
            goal = 0.9 * self.slow(x) + 0.1 * y
        self.score = self.task.score(output.detach(), y)
        return F.mse_loss(output, goal)


class Multitask(Training):
    """Net with two heads; the second trains on every tenth batch only."""

    def __init__(self, seed: int) -> None:
        super().__init__(Chain(64, 32, depth=3, weight=he()), templates(seed), adam(2e-3), seed=seed)
        self.often, self.rarely = nn.Linear(32, 10), nn.Linear(32, 1)

    def loss(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        features = torch.relu(self.net(x))
        scores = self.often(features)
        self.score = self.task.score(scores.detach(), y)
        loss = F.cross_entropy(scores, y)
        if number % 10 == 0:
            loss = loss + F.binary_cross_entropy_with_logits(self.rarely(features)[:, 0], (y % 2).float())
        return loss

    @torch.no_grad()
    def quality(self) -> float:
        x, y = self.task.draw(torch.Generator().manual_seed(10_000_019 + self.seed), 512)
        return float(self.task.score(self.often(torch.relu(self.net(x))), y))


CASES = [
    Case(
        "H70", "adversarial training, two optimizers", Adversarial, 0.5, steps=600, kin=("generative", "adam")
    ),
    Case("H71", "variational autoencoder", Variational, 0.7, kin=("generative", "adam")),
    Case(
        "H72",
        "a Wasserstein critic with gradient penalty",
        partial(critic, bounded=True),
        0.5,
        kin=("generative", "rmsprop"),
    ),
    Case("H73", "InfoNCE", Contrastive, 0.8, kin=("contrastive", "adam")),
    Case(
        "H74",
        "margins between distances",
        partial(Contrastive, distance=True),
        0.5,
        kin=("contrastive", "adam"),
    ),
    Case("H75", "log-density, far below zero", Density, 0.8, kin=("density", "regression", "adam")),
    Case(
        "H76",
        "negative cosine: from zero to minus one",
        partial(chain, task=_alignment, optimizer=adam(3e-3), **_relu),
        0.8,
        kin=("dense", "regression", "adam"),
    ),
    Case(
        "H77",
        "hinge loss, to exactly zero",
        partial(chain, task=_hinge, optimizer=adam(3e-3), **_relu),
        0.99,
        kin=("dense", "adam"),
    ),
    Case(
        "H78",
        "a huge constant in the loss",
        partial(chain, reshape=lambda loss: loss + 1000.0, **_relu),
        0.9,
        kin=("dense", "sgd"),
    ),
    Case(
        "H79",
        "a huge negative constant in the loss",
        partial(chain, reshape=lambda loss: loss - 1000.0, optimizer=adam(2e-3), **_relu),
        0.9,
        kin=("dense", "adam"),
    ),
    Case("H80", "policy gradient: a loss about zero", Rewarded, 0.7, kin=("reinforcement", "adam")),
    Case(
        "H81", "self-distillation: a loss that starts near zero", Distilled, 0.3, kin=("regression", "adam")
    ),
    Case(
        "H82",
        "quantile regression",
        partial(chain, task=_quantile, optimizer=adam(3e-3), **_relu),
        0.5,
        kin=("dense", "regression", "adam"),
    ),
    Case(
        "H83",
        "one class in twenty",
        partial(chain, task=_imbalanced, optimizer=sgd(0.05), **_relu),
        0.9,
        kin=("dense", "sgd"),
    ),
    Case("H84", "a head that is trained on every tenth batch", Multitask, 0.9, kin=("dense", "adam")),
    Case(
        "H85",
        "regression of targets that are nearly zero: the loss starts at 1e-8",
        _tiny,
        0.5,
        kin=("dense", "regression", "sgd"),
    ),
    Case(
        "H86",
        "noise on the gradient, as in differential privacy",
        partial(chain, optimizer=sgd(0.05), **_relu),
        0.8,
        trainer=_private,
        kin=("dense", "sgd"),
    ),
]
