"""What a training shows of itself: the views of its optimizers, and the sinks that they are written to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_gradguard.guard import Guard
from lightning_gradguard.sinks.loggers import open_sinks
from lightning_gradguard.sinks.overview import Overview

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_gradguard.doctor.diagnosis import Diagnosis


class Display:
    """Feeds the overview of each optimizer, and writes it where Lightning logs.

    Args:
        trainer: Whose loggers are written to; on ranks other than 0 nothing is.
        per_layer: Also write a scalar for each tensor.
    """

    def __init__(self, trainer: Trainer, per_layer: bool) -> None:
        self._sinks = open_sinks(trainer.loggers) if trainer.is_global_zero else []
        self._per_layer = per_layer
        self._views: dict[int, tuple[tuple[str, ...], Overview]] = {}

    def observe(self, guard: Guard, index: int, diagnosis: Diagnosis | None) -> None:
        """Takes in the newest step of an optimizer, and a diagnosis if there is a new one."""
        if not self._sinks or guard.report is None:
            return
        view = self._view(guard, index)
        view.observe(guard.report)
        if diagnosis is not None:
            view.diagnose(diagnosis.to_markdown())

    def write(self, guard: Guard, index: int, step: int, *, final: bool = False) -> None:
        """Writes the newest step of an optimizer.

        Args:
            guard: Its guard.
            index: Its number.
            step: Place on the x axis.
            final: Nothing follows, so that the picture has to be drawn.
        """
        if not self._sinks or guard.report is None or guard.letter is None:
            return
        tilt, ratio = _known(guard.letter.tilt), _known(guard.letter.update_ratio)
        panel = self._view(guard, index).panel(guard.report, tilt=tilt, update_ratio=ratio, final=final)
        for sink in self._sinks:
            sink.write(step, panel)

    def close(self) -> None:
        """Finishes the pictures that are being drawn."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def _view(self, guard: Guard, index: int) -> Overview:
        """An optimizer's view; a new one when other tensors are watched."""
        layout = guard.watch.layout
        names = tuple(layout.names[i] for i in layout.order)
        if index not in self._views or self._views[index][0] != names:
            view = Overview(
                names,
                [layout.parameters[i].numel() for i in layout.order],
                matrices=[i in layout.layer_indices for i in layout.order],
                group=f"gradguard_{index}" if index else "gradguard",
                per_layer=self._per_layer,
            )
            self._views[index] = (names, view)
        return self._views[index][1]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
