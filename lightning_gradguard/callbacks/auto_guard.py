"""`AutoGuard`: keeps a place for the guard that the environment asked for, until a Trainer's callbacks are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradguard.callbacks.base import Callback
from lightning_gradguard.callbacks.grad_guard import GradGuard
from lightning_gradguard.policy import Policy

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class AutoGuard(Callback):
    """Makes way for a `GradGuard` when a Trainer sets up, unless there is one already, from its user or its module.

    When the Trainer asks for callbacks from outside it does not say which ones it has; when it sets up, they are all
    there, and no state has been restored yet, so that a checkpoint's goes to the guard.

    Args:
        policy: "watch", "protect" or "strict".
    """

    def __init__(self, policy: str) -> None:
        self.policy: Policy = getattr(Policy, policy)()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes its place in the list of callbacks, where nobody else judges."""
        if any(isinstance(callback, GradGuard) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            return
        guard = GradGuard(policy=self.policy)
        place = trainer.callbacks.index(self)  # type: ignore[attr-defined]
        trainer.callbacks[place] = guard  # type: ignore[attr-defined]
        guard.setup(trainer, pl_module, stage)
