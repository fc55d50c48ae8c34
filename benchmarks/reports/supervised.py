"""Parts that reports of supervised learning share: digits, and a module of net, loss and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.reports import parts
from lightning_gradguard import GradGuard, Policy, SpikeClip

_DIGITS = load_digits()
#: Scikit-learn's digits, [1797, 64] between 0 and 1, and their labels.
DIGITS = torch.tensor(_DIGITS.data, dtype=torch.float32) / 16
LABELS = torch.tensor(_DIGITS.target)

#: Name of the variant that clips gradient spikes as the fix of that name says.
CLIPPED = "spikes_clipped"


class Supervised(parts.Fit):
    """Net that is trained on pairs of input and target with any optimizer.

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
        super().__init__(net, loss)
        self.optimizer = optimizer

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
    return parts.batches(*tensors, size=size, drop_last=True)


def clip_spikes(variant: str) -> dict[str, Any]:
    """Return Trainer arguments that clip gradient spikes in the variant of that name."""
    if variant != CLIPPED:
        return {}
    return {"callbacks": [GradGuard(clipper=SpikeClip(), policy=Policy.watch())]}
