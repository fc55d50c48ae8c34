"""LightningModule for packages without one of their own, and Trainers that are silent and offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.real.case import Run

#: Arguments of every Trainer, also of those that a package makes.
SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}

MakeOptimizer = Callable[[Any], Any]


class Plain(L.LightningModule):
    """Training of one net with one loss.

    Args:
        net: Model of a package.
        loss: Function of net and batch.
        optimizer: Function from parameters to what ``configure_optimizers`` returns.
    """

    def __init__(self, net: nn.Module, loss: Callable[[Any, Any], Tensor], optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.net, self.loss, self.make_optimizer = net, loss, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net, batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


class Numbered:
    """Loader of as many batches as are asked for, each made from its number."""

    def __init__(self, make: Callable[[int], Any], count: int = 10**6) -> None:
        self.make, self.count, self.served = make, count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            self.served += 1
            yield self.make(self.served - 1)


def train(
    module: L.LightningModule,
    loader: Any,
    steps: int,
    exam: Callable[[Any], float] | None = None,
    **arguments: Any,
) -> Run:
    """Return the training of a module.

    Args:
        module: The module.
        loader: Its training data.
        steps: Optimizer steps.
        exam: As in `Run`.
        **arguments: Further arguments of the Trainer.
    """

    def fit(callbacks: Sequence[Any]) -> None:
        own = arguments.pop("callbacks", ())
        limits = {"max_steps": steps, "max_epochs": -1}
        trainer = L.Trainer(callbacks=[*own, *callbacks], **SILENT, **limits, **arguments)
        trainer.fit(module, loader)

    return Run(fit, exam)


def adamw(rate: float, steps: int = 0, warm: int = 0, decay: float = 0.01) -> MakeOptimizer:
    """Return AdamW, with a linear warm-up and a fall to zero along a line if ``steps`` is given."""

    def make(parameters: Any) -> Any:
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        if not steps:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min((s + 1) / max(warm, 1), max(0.0, (steps - s) / max(1, steps - warm)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return make


def adam(rate: float) -> MakeOptimizer:
    """Return Adam."""
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def seeded(seed: int, number: int) -> torch.Generator:
    """Return the random numbers of one batch."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + number)
