"""Parts that reports of supervised learning share: data, a module of net, loss and optimizer, and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, Policy, SpikeClip

_DIGITS = load_digits()
#: Scikit-learn's digits, [1797, 64] between 0 and 1, and their labels.
DIGITS = torch.tensor(_DIGITS.data, dtype=torch.float32) / 16
LABELS = torch.tensor(_DIGITS.target)

#: Name of the variant that clips gradient spikes as the fix of that name says.
CLIPPED = "spikes_clipped"


class Supervised(L.LightningModule):
    """Net that is trained on pairs of input and target.

    Args:
        net: The net.
        loss: Function from output and target to the loss.
        optimizer: Function from parameters to optimizer.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer = net, loss, optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def adam(rate: float) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Return a function that makes Adam."""
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def sgd(
    rate: float, momentum: float = 0.0, **further: Any
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Return a function that makes SGD."""
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=momentum, **further)


def batches(*tensors: Tensor, size: int = 64) -> DataLoader[Any]:
    """Return shuffled batches, the last incomplete one left out."""
    return DataLoader(TensorDataset(*tensors), batch_size=size, shuffle=True, drop_last=True)


def accuracy(x: Tensor, y: Tensor) -> Callable[[Any], Any]:
    """Return a score: the share of right classes."""

    def score(module: Any) -> Any:
        module.eval()
        return (module(x).argmax(-1) == y).float().mean()

    return score


def r_squared(x: Tensor, y: Tensor) -> Callable[[Any], Any]:
    """Return a score: the explained share of the variance."""

    def score(module: Any) -> Any:
        module.eval()
        return 1 - F.mse_loss(module(x).flatten(), y.flatten()) / y.var()

    return score


def clip_spikes(variant: str) -> dict[str, Any]:
    """Return Trainer arguments that clip gradient spikes in the variant of that name."""
    if variant != CLIPPED:
        return {}
    return {"callbacks": [GradGuard(clipper=SpikeClip(), policy=Policy.watch())]}
