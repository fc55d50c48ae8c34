"""`ExactSkip`: undo what an optimizer did at a skipped step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.callbacks.rollback import Snapshot
from lightning_gradguard.callbacks.trainer_adapter import warn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class ExactSkip:
    """Exact skips for optimizers that do more than use gradients.

    Those of torch leave a parameter without a gradient as it is, so a skip is exact at no cost. Others may count the
    step all the same, or move weights inside the closure and not find back (SAM, LBFGS). Before such an optimizer goes
    on with a skipped step, its weights and state are copied to host memory, and restored after the step. If it moves
    weights between two calls of its closure, they are copied before each step, with one warning; before its first step
    they always are.
    """

    def __init__(self) -> None:
        self._steps: dict[int, _OptimizerStep] = {}

    def observe(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Note a call of the closure, before it is judged."""
        if not _may_change_without_gradients(optimizer):
            return
        if id(optimizer) not in self._steps:
            self._steps[id(optimizer)] = _OptimizerStep(optimizer)
        self._steps[id(optimizer)].observe(trainer)

    def skip(self, optimizer: torch.optim.Optimizer, *, renew: bool = False) -> None:
        """Undo this step as soon as the optimizer has taken it.

        Args:
            optimizer: The optimizer.
            renew: Go back to what is there now, such as the weights after a rollback.
        """
        if id(optimizer) in self._steps:
            self._steps[id(optimizer)].skip(renew)

    def undo(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo at once, since the step will not be completed."""
        if id(optimizer) in self._steps:
            self._steps[id(optimizer)].undo()

    def close(self) -> None:
        """Remove all hooks."""
        for step in self._steps.values():
            step.close()
        self._steps = {}


class _OptimizerStep:
    """The current step of one optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._moves = isinstance(optimizer, torch.optim.LBFGS)
        self._is_first, self._calls, self._skipped = True, 0, False
        self._versions: list[int] = []
        self._snapshot: Snapshot | None = None
        self._hook = optimizer.register_step_post_hook(self._end)

    def observe(self, trainer: Trainer) -> None:
        """Note a call of the closure."""
        self._calls += 1
        if self._calls == 1:
            self._versions = self._current_versions()
            if self._moves or self._is_first:
                self._snapshot = self._take()
        elif not self._moves and self._versions != self._current_versions():
            self._moves = True
            warn(
                trainer,
                f"GradGuard: {type(self._optimizer).__name__} moves the weights between two calls of its closure, so "
                "weights and optimizer state are copied to host memory before each step. Without the copy a step that "
                "is skipped in between would leave moved weights.",
            )

    def skip(self, renew: bool) -> None:
        """Undo this step at its end."""
        self._skipped = True
        self._snapshot = self._take() if renew or self._snapshot is None else self._snapshot

    def undo(self) -> None:
        """Restore weights, state and settings from before."""
        if self._snapshot is not None and self._calls > 1:
            self._snapshot.restore()
        self._reset()

    def close(self) -> None:
        """Remove the hook."""
        self._hook.remove()
        self._reset()

    def _end(self, *_: Any) -> None:
        if self._skipped and self._snapshot is not None:
            self._snapshot.restore()
        self._is_first = False
        self._reset()

    def _reset(self) -> None:
        self._calls, self._skipped, self._snapshot, self._versions = 0, False, None, []

    def _take(self) -> Snapshot:
        return Snapshot(None, [self._optimizer], settings=True)

    def _current_versions(self) -> list[int]:
        return [_version(p) for group in self._optimizer.param_groups for p in group["params"]]


def _may_change_without_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Return False for optimizers of torch that skip exactly."""
    if not hasattr(optimizer, "register_step_post_hook"):
        return False
    own = type(optimizer).__module__.startswith("torch.optim")
    return not own or isinstance(optimizer, torch.optim.LBFGS)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
