"""Hands a step over to its guard: loss, scaler, and what there is to replay."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_gradguard.callbacks.subject import subject_of
from lightning_gradguard.callbacks.trainer import Losses, scaler_of, takes_no_step
from lightning_gradguard.guard import Guard

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def judge(
    guard: Guard,
    trainer: Trainer,
    module: LightningModule,
    optimizer: torch.optim.Optimizer,
    losses: Losses,
    newest: tuple[Any, int],
) -> None:
    """Lets a guard judge the step that an optimizer is about to take.

    Args:
        guard: Of this optimizer.
        trainer: Of the run.
        module: What is trained.
        optimizer: Whose step it is.
        losses: Of the micro-batches since its last step.
        newest: The batch under way, and its number.

    Raises:
        GradientHalt: If training cannot go on.
    """
    graph, scaler = losses.graph, scaler_of(trainer)
    if takes_no_step(module, scaler, graph):
        losses.take()
        return
    if not guard._lag:
        # With lag the report is of the step before, whose weights and batch are gone.
        guard.subject = partial(subject_of, trainer, module, optimizer, *newest)
    try:
        guard.step(
            losses.take(),
            scaler=scaler,
            graph=graph,
            step=trainer.global_step,
            # Of several micro-batches any could be the culprit, and only the last is at hand.
            batch=newest[0] if trainer.accumulate_grad_batches == 1 else None,
        )
    finally:
        guard.subject = None
