"""Healthy trainings with an unusual loss: focal, ordinal, censored, ranked, or below zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out.data import templates, waves
from benchmarks.held_out.nets import MLP
from benchmarks.held_out.training import Trial, measured_accuracy
from benchmarks.zoo.case import Case
from benchmarks.zoo.recipes import adam, sgd
from benchmarks.zoo.tasks import Task


def _focal_loss(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    losses = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def _focal(seed: int) -> Trial:
    net = MLP(64, 10, 3, 40)
    return Trial(net, templates(seed), sgd(0.2), seed, objective=_focal_loss, measure=measured_accuracy)


def _cumulative_loss(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    rank = (batch[1] * 2 + 2).clamp(0, 4).long()
    return F.binary_cross_entropy_with_logits(net(batch[0]), (torch.arange(4) < rank).float())


def _ordinal(seed: int) -> Trial:
    return Trial(MLP(12, 4, 2, 40), waves(seed), adam(3e-3), seed, objective=_cumulative_loss)


class Weighted(nn.Module):
    """Two tasks on one trunk, with weights learned from their uncertainty."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.value, self.sign = MLP(12, 24, 2, 32), nn.Linear(24, 1), nn.Linear(24, 2)
        self.log_variance = nn.Parameter(torch.zeros(2))


def _weighted_loss(net: Weighted, batch: tuple[Tensor, ...], number: int) -> Tensor:
    x, y = batch
    hidden = torch.relu(net.trunk(x))
    value = F.mse_loss(net.value(hidden), y)
    sign = F.cross_entropy(net.sign(hidden), (y[:, 0] > 0).long())
    precision = (-net.log_variance).exp()
    return value * precision[0] + sign * precision[1] + net.log_variance.sum() / 2


def _uncertainty(seed: int) -> Trial:
    return Trial(Weighted(), waves(seed), adam(1e-2), seed, objective=_weighted_loss)


def _mixture_loss(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    """Return the negative log-likelihood of three Gaussians."""
    logits, mean, log_width = net(batch[0]).chunk(3, 1)
    exponents = -0.5 * ((batch[1] - mean) / log_width.exp()).square()
    return -torch.logsumexp(logits.log_softmax(1) + exponents - log_width, 1).mean()


def _mixture(seed: int) -> Trial:
    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.rand(size, 1, generator=generator) * 2 - 1
        return y + 0.3 * torch.sin(6 * y) + 0.03 * torch.randn(size, 1, generator=generator), y

    net = MLP(1, 9, 2, 32, activation=torch.tanh)
    return Trial(net, Task(draw), adam(5e-3), seed, objective=_mixture_loss)


def _partial_likelihood(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    """Return Cox's partial likelihood: who leaves, among those still present at each time."""
    hazard = net(batch[0])[:, 0][batch[1].argsort()]
    return -(hazard - hazard.flip(0).logcumsumexp(0).flip(0)).mean()


def _survival(seed: int) -> Trial:
    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 12, generator=generator)
        chance = torch.rand(size, generator=generator)
        return x, -chance.log() * (-x[:, 0] - x[:, 1] * x[:, 2]).exp()

    return Trial(MLP(12, 1, 2, 24), Task(draw), adam(2e-3), seed, objective=_partial_likelihood)


def _order_loss(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    """Return the logistic loss on the order of neighbours in the batch."""
    output, target = net(batch[0]), batch[1]
    return F.softplus(-(output[:-1] - output[1:]) * (target[:-1] - target[1:]).sign()).mean()


def _ranking(seed: int) -> Trial:
    return Trial(MLP(12, 1, 2, 32), waves(seed), adam(3e-3), seed, objective=_order_loss)


CASES = [
    Case("HD02", "focal loss", _focal, 0.8),
    Case("HD08", "ordinal regression by cumulative logits", _ordinal, 0.2),
    Case("HD09", "two tasks weighted by their uncertainty: the loss goes below zero", _uncertainty, 0.4),
    Case("HD10", "a mixture of densities: the loss goes through zero", _mixture, 0.5),
    Case("HD17", "survival by Cox's partial likelihood", _survival, 0.03),
    Case("HD18", "ranking by pairs", _ranking, 0.5),
]
