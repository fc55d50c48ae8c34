"""What remedies are tried on: a module's training step without its Trainer."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.callbacks.trainer import package_of, scaler_of, warn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gradguard.doctor.checkup import Checkup
    from lightning_gradguard.doctor.trials.attempt import Subject


def subject_of(
    trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer, batch: Any, batch_idx: int
) -> Subject:
    """The training step as a function of the batch, which logs nothing.

    Raises:
        ValueError: If the training step does more than compute a loss.
    """
    # The doctor's rooms are loaded where they are asked for.
    from lightning_gradguard.doctor.trials.attempt import Subject

    if any(hasattr(p, "placements") for p in module.parameters()):
        raise ValueError("the parameters are sharded over processes, so no process can run a step by itself")
    if not module.automatic_optimization:
        raise ValueError("the module optimizes by hand, so its training step cannot be run without a step")
    needs = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in needs:
        raise ValueError("the training step takes its batches itself")
    # As Lightning tells it: a second argument, whatever its name, is the batch's number.
    more = (batch_idx,) if len(needs) > 1 else ()

    def loss_of(batch: Any) -> Tensor:
        # The module is in a sandbox, which puts back what is set here.
        for name in ("log", "log_dict"):
            setattr(module, name, _ignore)
        loggers = trainer.loggers
        trainer.loggers = _silent(trainer) * len(loggers)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        before = [deepcopy(scheduler.state_dict()) for scheduler in schedulers]
        groups = [[dict(group) for group in opt.param_groups] for opt in trainer.optimizers]
        try:
            with trainer.precision_plugin.train_step_context():
                output = module.training_step(batch, *more)
        finally:
            trainer.loggers = loggers
            for scheduler, state in zip(schedulers, before, strict=True):
                scheduler.load_state_dict(state)
            for opt, own in zip(trainer.optimizers, groups, strict=True):
                for group, old in zip(opt.param_groups, own, strict=True):
                    group.update(old)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError(f"training_step must return a loss, got {type(output).__name__}")
        return loss

    return Subject(module, loss_of, batch, optimizer, batch_idx)


def check_up(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Checkup | None:
    """The check-up of a training's first batch, with one warning of what it finds.

    None where training goes on from a checkpoint, and where the training step cannot be run by itself.
    """
    if trainer.global_step or not trainer.optimizers:
        return None
    from lightning_gradguard.doctor.checkup import checkup

    scaler = scaler_of(trainer)
    try:
        subject = subject_of(trainer, module, trainer.optimizers[0], batch, batch_idx)
        result = checkup(
            module, batch, loss_of=subject.loss_of, scale=1.0 if scaler is None else scaler.get_scale()
        )
    except Exception:  # what a model raises is for the training itself to raise
        return None
    if not result.ok:
        found = "; ".join(str(check) for check in result.findings)
        warn(trainer, f"GradGuard: check-up before training: {found}")
    return result


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Takes what would be logged."""


def _silent(trainer: Trainer) -> list[Any]:
    """A logger that writes nowhere."""
    return [importlib.import_module(f"{package_of(trainer)}.loggers.logger").DummyLogger()]
