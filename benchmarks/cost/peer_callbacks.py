"""Callbacks that call a peer from a Trainer, each as its own documentation describes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import grad_norm
from torch import Tensor

Trainer, Module = L.Trainer, L.LightningModule


class GradNorm(L.Callback):
    """Lightning's own example: log the norm of each gradient."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: Module, optimizer: torch.optim.Optimizer
    ) -> None:
        pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class AddHistogram(L.Callback):
    """Histogram of each gradient every few steps."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: Module, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step % self.every == 0:
            writer: Any = trainer.logger.experiment  # type: ignore[union-attr]
            for name, parameter in pl_module.named_parameters():
                writer.add_histogram(name, parameter.grad, trainer.global_step)


class AdaptiveClip(L.Callback):
    """timm's adaptive gradient clipping."""

    def __init__(self, module: ModuleType) -> None:
        self.clip = module.adaptive_clip_grad

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.clip(pl_module.parameters())


class SkipStep(L.Callback):
    """Loss and norm for OLMo-core's optimizer, whose own trainer takes them from clipping to 1."""

    def __init__(self) -> None:
        self._loss = torch.tensor(0.0)

    def on_before_backward(self, trainer: Trainer, pl_module: Module, loss: Tensor) -> None:
        self._loss = loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: Any) -> None:
        optimizer.latest_grad_norm = torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 1.0)
        optimizer.latest_loss = self._loss


class Monitor(L.Callback):
    """torch-module-monitor with the norm of each gradient, at every step; logged as often as Lightning logs."""

    def __init__(self, module: ModuleType) -> None:
        self.monitor = module.ModuleMonitor(monitor_step_fn=lambda step: True)
        self.monitor.add_gradient_metric("norm", lambda gradient: gradient.norm())

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.monitor.set_module(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: Any, index: int) -> None:
        self.monitor.begin_step(trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.monitor.monitor_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, index: int
    ) -> None:
        self.monitor.end_step()
        if trainer.global_step % trainer.log_every_n_steps == 0 and trainer.logger is not None:  # type: ignore[attr-defined]
            trainer.logger.log_metrics(self.monitor.get_step_metrics(), step=trainer.global_step)


class Scope(L.Callback):
    """trainscope with its defaults."""

    def __init__(self, module: ModuleType, folder: Path) -> None:
        from trainscope.core.config import TrainScopeConfig

        self.module, self.config = module, TrainScopeConfig(run_dir=str(folder))
        self._loss = torch.tensor(0.0)

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self.scope = self.module.TrainScope(pl_module, trainer.optimizers[0], config=self.config).attach()

    def on_before_backward(self, trainer: Trainer, pl_module: Module, loss: Tensor) -> None:
        self._loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.scope.step(self._loss.item())

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self.scope.detach()


class Watch(L.Callback):
    """wandb's watch on gradients."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        trainer.logger.watch(pl_module, log="gradients", log_freq=self.every, log_graph=False)  # type: ignore[union-attr]

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        import wandb

        trainer.logger.experiment.unwatch(pl_module)  # type: ignore[union-attr]
        wandb.finish()
