"""LightningModule that all cases share: a net, a task that generates its data, an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.zoo.tasks import Task

Schedule = Callable[[int], float]
Spoil = Callable[[int, Any, Any], tuple[Any, Any]]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

#: Batches in an epoch that never ends in practice.
ENDLESS = 100_000
#: Number of examples that quality is measured on.
HELD_OUT = 512


class Batches:
    """Numbered batches, each from its own random seed; numbering continues across epochs."""

    def __init__(self, make: Callable[[int], Any], per_epoch: int) -> None:
        self.make, self.per_epoch, self.served = make, per_epoch, 0

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.per_epoch):
            batch = self.make(self.served)
            self.served += 1
            yield batch


class Training(L.LightningModule):
    """Training that generates its own data.

    Args:
        net: Takes a task's inputs.
        task: Draws batches, and defines loss and quality.
        optimizer: Function from parameters to optimizer.
        seed: Seed of the data.
        batch_size: Number of examples, or a function from batch number to it.
        schedule: Function from step to the factor on the learning rate.
        spoil: Changes a numbered batch as a broken data pipeline would.
        reshape: Changes the loss before backward, for example by a constant factor.
        per_epoch: Batches per epoch.
        pool: Size of a fixed data set; None draws new examples for every batch.
    """

    def __init__(
        self,
        net: nn.Module,
        task: Task,
        optimizer: MakeOptimizer,
        *,
        seed: int,
        batch_size: int | Callable[[int], int] = 64,
        schedule: Schedule | None = None,
        spoil: Spoil | None = None,
        reshape: Callable[[Tensor], Tensor] | None = None,
        per_epoch: int = ENDLESS,
        pool: int | None = None,
    ) -> None:
        super().__init__()
        self.net, self.task = net, task
        self.seed, self.batch_size, self.per_epoch, self.pool = seed, batch_size, per_epoch, pool
        self.make_optimizer, self.schedule, self.spoil, self.reshape = optimizer, schedule, spoil, reshape
        #: Quality on the newest batch, for rules that need the accuracy.
        self.score = torch.zeros(())
        self._pool: Any = None

    def batch(self, number: int) -> tuple[Any, Any]:
        """Return inputs and targets of the batch with this number."""
        size = self.batch_size(number) if callable(self.batch_size) else self.batch_size
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + number)
        if self.pool is None:
            x, y = self.task.draw(generator, size)
        else:
            if self._pool is None:
                self._pool = self.task.draw(torch.Generator().manual_seed(self.seed), self.pool)
            rows = torch.randperm(self.pool, generator=generator)[:size]
            x, y = self._pool[0][rows], self._pool[1][rows]
        return (x, y) if self.spoil is None else self.spoil(number, x, y)

    def loss(self, x: Any, y: Any, number: int) -> Tensor:
        """Return the loss of a batch; most special trainings override this."""
        output = self.net(x)
        self.score = self.task.score(output.detach(), y)
        return self.task.loss(output, y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.loss(*batch, batch_idx)
        return loss if self.reshape is None else self.reshape(loss)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.schedule is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Batches:
        return Batches(self.batch, self.per_epoch)

    @torch.no_grad()
    def quality(self) -> float:
        """Return how well the task is learned, about 0 to 1.

        || Measured on the pool if there is one, else on new examples.
        """
        generator = torch.Generator().manual_seed(10_000_019 + self.seed)
        with evaluating(self):
            if self.pool is not None:
                x, y = self.task.draw(torch.Generator().manual_seed(self.seed), self.pool)
            else:
                x, y = self.task.draw(generator, HELD_OUT)
            return float(self.task.score(self.net(x), y))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and back at the end."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)
