"""At most two values in Lightning's progress bar: the gradient's norm, and how often something was done about it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_gradguard.guard import Guard

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class ProgressBar:
    """Shows ``grad_norm``, and ``clip_rate`` where there is a clipper, else ``skipped``.

    - ``grad_norm``: L2 norm of all gradients before clipping, each optimizer's at its newest judged step.
    - ``clip_rate``: clipped steps by judged ones, in [0, 1], of all optimizers and the whole run.
    - ``skipped``: steps that were not taken.

    They are plain numbers that have been read already. ``LightningModule.log(prog_bar=True)`` would put them back on
    the device, to be read again after every batch, and into ``callback_metrics``.

    Args:
        wanted: Whether anything is shown.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._trainer: Trainer | None = None
        self._guards: dict[int, Guard] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing of the run."""
        return {"_wanted": self._wanted, "_trainer": None, "_guards": {}}

    def start(self, trainer: Trainer) -> None:
        """A run begins, whose bar is that of rank 0."""
        self._trainer, self._guards = trainer if self._wanted and trainer.is_global_zero else None, {}

    def observe(self, guard: Guard, index: int) -> None:
        """Takes in the newest step of an optimizer; nobody is waited for, neither a device nor another rank.

        Args:
            guard: Its guard.
            index: Its number.
        """
        if self._trainer is None:
            return
        self._guards[index] = guard
        # Both kinds of bar read it after the batch, together with what the module logs.
        self._trainer._logger_connector._progress_bar_metrics.update(self._values())  # type: ignore[arg-type]

    def finish(self) -> None:
        """Lets go of the run."""
        self._trainer, self._guards = None, {}

    def _values(self) -> dict[str, float | str]:
        guards = list(self._guards.values())
        norm = math.hypot(*(guard.report.total_norm for guard in guards if guard.report is not None))
        if guards[0].clipper is None:
            # As a text, since the bar of rich gives each number three decimals.
            return {"grad_norm": norm, "skipped": str(sum(guard.counts["skipped"] for guard in guards))}
        clipped, judged = (sum(guard.counts[name] for guard in guards) for name in ("clipped", "judged"))
        return {"grad_norm": norm, "clip_rate": clipped / judged}
