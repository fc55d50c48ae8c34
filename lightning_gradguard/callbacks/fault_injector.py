"""`FaultInjector`: brings a fault of `lightning_gradguard.testing` into a Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_gradguard.callbacks.base import Callback
from lightning_gradguard.testing import Injection, inject

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class FaultInjector(Callback):
    """Lets gradients go wrong at chosen steps; where it stands in the list of callbacks does not matter.

    Steps are counted as ``trainer.global_step`` does. For several faults, add several of them.

    Example:
        >>> from lightning_gradguard import GradGuard, testing
        >>> callbacks = [testing.FaultInjector(testing.NaN(at=7, rank=1)), GradGuard()]

    Args:
        injection: What goes wrong, where and when.

    Raises:
        TypeError: If it is no `Injection`.
        ValueError: When training begins, if the injection's pattern matches no parameter that is trained.
    """

    def __init__(self, injection: Injection) -> None:
        if not isinstance(injection, Injection):
            raise TypeError(
                f"injection must be one of testing's, such as testing.NaN(at=7), got {injection!r}"
            )
        self.injection = injection
        self._open = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a pattern that would never act."""
        self.injection.targets(pl_module.named_parameters())

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Begins, at its steps."""
        self._open.close()
        now = inject(
            pl_module.named_parameters(), self.injection, step=trainer.global_step, rank=trainer.global_rank
        )
        self._open.enter_context(now)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends."""
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends where backward failed."""
        self._open.close()
