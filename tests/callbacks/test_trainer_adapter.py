"""What a Trainer tells of a step."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_gradguard import GradGuard


class Counting(pl.LightningModule):
    """A module whose loss is the number of the batch, from 1 on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def training_step(self, batch, number):
        return self.weight.sum() * 0.5 + number

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Losses(pl.Callback):
    def __init__(self, guard):
        self.guard, self.seen = guard, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        if self.guard.report is not None:
            self.seen[trainer.global_step] = self.guard.report.loss


@pytest.mark.parametrize(
    ("accumulate", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (4, [2.5, 6.5]), (8, [4.5])]
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_loss_of_a_step_is_the_mean_of_its_batches(fit, accumulate, expected, precision):
    """Neither divided by their number, as it goes into the backward pass, nor that of the last one."""
    guard = GradGuard()
    losses = Losses(guard)
    fit(Counting(), guard, losses, batches=8, accumulate_grad_batches=accumulate, precision=precision)
    assert list(losses.seen.values()) == expected
