"""`AutoGuard`: add the guard that the environment asks for, if a Trainer has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_gradguard.callbacks.base import Callback
from lightning_gradguard.callbacks.grad_guard import GradGuard
from lightning_gradguard.policy import Policy

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class AutoGuard(Callback):
    """Placeholder for a `GradGuard`, unless the user or the module of a Trainer brought one.

    When a Trainer loads callbacks from entry points, it does not tell which callbacks it has. When it sets up, all are
    there, and no state has been restored yet. The guard takes the place then, so it gets the state of a checkpoint.

    Args:
        policy: "watch", "protect" or "strict".
    """

    def __init__(self, policy: str) -> None:
        self.policy: Policy = getattr(Policy, policy)()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace itself in the callbacks, unless a guard is there."""
        if any(isinstance(callback, GradGuard) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            return
        guard = GradGuard(policy=self.policy)
        place = trainer.callbacks.index(self)  # type: ignore[attr-defined]
        trainer.callbacks[place] = guard  # type: ignore[attr-defined]
        guard.setup(trainer, pl_module, stage)
