"""Reports of NaN and Inf."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.reports.case import Case
from lightning_gradguard import Cause, Fault

# All labels that a batch of contrastive learning holds are different: no anchor has a positive.
_G = torch.Generator().manual_seed(101)
_PLACES = torch.rand(1536, 6, 3, generator=_G)
_PLACES[::40, 1] = _PLACES[::40, 0]  # two points at the same place
_SPREAD = torch.cdist(_PLACES, _PLACES).triu(1).sum((1, 2))[:, None] / 10


class Distances(L.LightningModule):
    """Predicts a potential from the distances between learned keypoints of a cloud."""

    def __init__(self, safe: bool) -> None:
        super().__init__()
        self.safe = safe
        self.move = nn.Linear(3, 3)
        self.head = nn.Sequential(nn.Linear(15, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.move(x)
        i, j = torch.triu_indices(6, 6, 1)
        squared = ((x[:, i] - x[:, j]) ** 2).sum(-1)
        return self.head((squared + 1e-12).sqrt() if self.safe else squared.sqrt())

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def _distances(variant: str) -> tuple[L.LightningModule, Any]:
    module = Distances(safe=variant == "cured")
    return module, DataLoader(TensorDataset(_PLACES, _SPREAD), batch_size=64, shuffle=True)


def _r2(x: Tensor, y: Tensor) -> Any:
    return lambda module: 1 - ((module(x) - y) ** 2).mean() / y.var()


CASES = (
    Case(
        "R00",
        "Distances between points of which two coincide: sqrt at zero",
        "placeholder",
        _distances,
        _r2(_PLACES, _SPREAD),
        0.8,
        faults=(Fault.NONFINITE,),
        causes=(Cause.LOSS_FUNCTION,),
        fixes={r"square root|clamp|eps": "cured"},
        steps=150,
    ),
)
