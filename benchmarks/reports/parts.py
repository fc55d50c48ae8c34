"""Parts that several reports share: a plain supervised module, loaders and scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Fit(L.LightningModule):
    """Supervised training of a net with Adam; subclasses change what their report is about.

    Args:
        net: Takes the inputs of a batch.
        loss: Function of output and target.
        lr: Learning rate.
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
        lr: float = 3e-3,
    ) -> None:
        super().__init__()
        if net is not None:
            self.net = net
        self.loss, self.lr = loss, lr

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Any:
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def batches(*tensors: Tensor, size: int = 64, shuffle: bool = True, drop_last: bool = False) -> DataLoader:
    """Return a loader of these tensors' rows."""
    return DataLoader(TensorDataset(*tensors), batch_size=size, shuffle=shuffle, drop_last=drop_last)


def r2(x: Any, y: Tensor) -> Callable[[Any], Tensor]:
    """Return a score: R squared of the module's prediction of ``y`` from ``x``."""
    return lambda module: explained(module.eval()(x), y)


def explained(prediction: Tensor, y: Tensor) -> Tensor:
    """Return R squared."""
    return 1 - ((prediction - y) ** 2).mean() / ((y - y.mean(0)) ** 2).mean()


def accuracy(x: Any, y: Tensor) -> Callable[[Any], Tensor]:
    """Return a score: share of rows whose largest output is at the right class."""
    return lambda module: (module.eval()(x).argmax(-1) == y).float().mean()


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers of these widths with activations between them."""
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o), activation()]
    return nn.Sequential(*layers[:-1])


def generator(seed: int) -> torch.Generator:
    """Return a generator of a case's data."""
    return torch.Generator().manual_seed(seed)
