"""LightningModule that the held-out cases share: a net, data, an objective of any form, an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.zoo.tasks import Task, accuracy
from benchmarks.zoo.training import ENDLESS, Batches, MakeOptimizer, Training, evaluating

#: Function from net, batch and its number to a scalar to minimise; the number is -1 during evaluation.
Objective = Callable[[Any, tuple[Tensor, ...], int], Tensor]
#: Function from net and batch to a quality, 1 at best.
Measure = Callable[[Any, tuple[Tensor, ...]], Tensor]


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def measured_accuracy(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the share of right answers of a classifier on the batch's first tensor."""
    return accuracy(net(batch[0]), batch[1])


class Trial(Training):
    """Training that generates its own data.

    Quality is measured on examples that training does not see. It is the task's score. With a custom objective it is
    ``measure``, or without one the relative decrease of the objective since training began.

    Args:
        net: Net to train.
        task: Draws batches; its loss and score are used unless there is an objective.
        optimizer: Function from parameters to optimizer.
        seed: Seed of the data.
        objective: Replaces the task's loss.
        measure: Replaces the task's score; only with an objective.
        batch_size: Number of examples, or a function from batch number to it (without a pool).
        pool: Size of a fixed data set, drawn in epochs whose last batch is smaller; None draws new examples for every
            batch.
        schedule: Function from step to the factor on the learning rate.
        scheduler: Function from optimizer to learning-rate scheduler, used at every step; instead of ``schedule``.
        spoil: Changes a numbered batch as a broken data pipeline would.
        before: Called with the net and the batch's number before each batch.
        after: Called with the net after each batch.
        examined: Number of examples for measuring quality.
    """

    def __init__(
        self,
        net: nn.Module,
        task: Task,
        optimizer: MakeOptimizer,
        seed: int,
        *,
        objective: Objective | None = None,
        measure: Measure | None = None,
        batch_size: int | Callable[[int], int] = 64,
        pool: int | None = None,
        schedule: Callable[[int], float] | None = None,
        scheduler: Callable[[Any], Any] | None = None,
        spoil: Callable[[int, Any, Any], tuple[Any, Any]] | None = None,
        before: Callable[[Any, int], None] | None = None,
        after: Callable[[Any], None] | None = None,
        examined: int = 512,
    ) -> None:
        super().__init__(
            net,
            task,
            optimizer,
            seed=seed,
            batch_size=batch_size,
            schedule=schedule,
            spoil=spoil,
            pool=pool,
        )
        self.objective, self.measure, self.scheduler = objective, measure, scheduler
        self.before, self.after, self.examined = before, after, examined
        self.number = 0
        self._start: float | None = None
        self._first_loss: Tensor | None = None

    def batch(self, number: int) -> Any:
        """Return a new batch, given its number, before it is spoiled."""
        size = self.batch_size(number) if callable(self.batch_size) else self.batch_size
        return self.task.draw(seeded(77_777 * (self.seed + 3) + number), size)

    def train_dataloader(self) -> Any:
        if self.pool is None:
            return Batches(self.batch, ENDLESS)
        data = TensorDataset(*self.task.draw(seeded(self.seed + 5), self.pool))
        return DataLoader(data, batch_size=self.batch_size, shuffle=True, generator=seeded(self.seed))

    def on_fit_start(self) -> None:
        if self.objective is not None and self.measure is None:
            self._start = self.examine()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.before is not None:
            self.before(self.net, self.number)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        number, self.number = self.number, self.number + 1
        batch = tuple(batch) if self.spoil is None else self.spoil(number, *batch)
        if self.objective is None:
            return self.loss(*batch, number)
        loss = self.objective(self.net, batch, number)
        if self._first_loss is None:
            self._first_loss = loss.detach()
        self.score = 1 - loss.detach() / self._first_loss
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if self.after is not None:
            self.after(self.net)

    def configure_optimizers(self) -> Any:
        if self.scheduler is None:
            return super().configure_optimizers()
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"},
        }

    def examine(self) -> float:
        """Return the measure, or else the objective, on unseen examples.

        || The random state of the run stays unchanged.
        """
        with torch.random.fork_rng(devices=[]), evaluating(self):
            torch.manual_seed(4242)
            batch = self.task.draw(seeded(999_999_000 + self.seed), self.examined)
            if self.objective is not None and self.measure is None:
                with torch.enable_grad():  # some objectives contain derivatives
                    return float(self.objective(self.net, batch, -1).detach())
            with torch.no_grad():
                if self.measure is not None:
                    return float(self.measure(self.net, batch))
                return float(self.task.score(self.net(batch[0]), batch[1]))

    def quality(self) -> float:
        end = self.examine()
        return end if self._start is None else 1 - end / self._start
