"""`FaultInjector`: inject faults into a Trainer's gradients."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_gradguard.callbacks.trainer_adapter import Callback
from lightning_gradguard.injections import Injection, inject

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class FaultInjector(Callback):
    """Callback that injects faults at chosen steps.

    Its place in the list of callbacks does not matter.

    Steps are counted as ``trainer.global_step``. For several faults, add several of them.

    Example:
        >>> from lightning_gradguard import GradGuard, testing
        >>> callbacks = [testing.FaultInjector(testing.NaN(at=7, rank=1)), GradGuard()]

    Args:
        injection: The fault, with its steps and parameters.

    Raises:
        TypeError: If it is not an `Injection`.
        ValueError: When training begins, if the injection's pattern matches no trainable parameter.
    """

    def __init__(self, injection: Injection) -> None:
        if not isinstance(injection, Injection):
            raise TypeError(f"injection must be an Injection, such as testing.NaN(at=7), got {injection!r}")
        self.injection = injection
        self._active = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a pattern that would never act."""
        self.injection.targets(pl_module.named_parameters())

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the fault at its steps."""
        self._active.close()
        injected = inject(
            pl_module.named_parameters(), self.injection, step=trainer.global_step, rank=trainer.global_rank
        )
        self._active.enter_context(injected)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the fault."""
        self._active.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the fault if the backward pass raised."""
        self._active.close()
