"""At most two values in Lightning's progress bar: the gradient's norm, and how often something was done about it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_gradguard.callbacks.trainer_adapter import logging_step
from lightning_gradguard.guard import Guard
from lightning_gradguard.loggers import open_sinks
from lightning_gradguard.loggers.base import LogSink
from lightning_gradguard.loggers.overview import Overview
from lightning_gradguard.loggers.tags import tag_group

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_gradguard.diagnosis.diagnosis import Diagnosis


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


class RunLogging:
    """Feeds the overview of each optimizer, and writes it where Lightning logs; and the progress bar.

    Args:
        per_layer: Also write a scalar for each tensor.
        progress_bar: Also show two values in the progress bar.
    """

    def __init__(self, per_layer: bool, progress_bar: bool) -> None:
        self._per_layer, self._bar = per_layer, ProgressBar(progress_bar)
        self._trainer: Trainer | None = None
        self._sinks: list[LogSink] = []
        self._views: dict[int, tuple[tuple[str, ...], Overview]] = {}
        self._restored: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy writes nowhere: an open file has one writer."""
        return {**self.__dict__, "_sinks": [], "_trainer": None}

    def start(self, trainer: Trainer) -> None:
        """A run begins, whose loggers are written to on rank 0; or goes on from a checkpoint, with its pictures."""
        self._trainer, self._views = trainer, {}
        self._bar.start(trainer)
        self._sinks = open_sinks(trainer.loggers) if trainer.is_global_zero else []
        self._restored = self._restored if trainer.ckpt_path else {}

    def observe(self, guard: Guard, index: int, diagnosis: Diagnosis | None) -> None:
        """Takes in the newest step of an optimizer, and a diagnosis if there is a new one; writes where it is due."""
        self._bar.observe(guard, index)
        if not self._sinks or self._trainer is None or guard.report is None:
            return
        view = self._view(guard, index)
        view.observe(guard.report)
        if diagnosis is not None:
            view.add_diagnosis(diagnosis.to_markdown())
        if self._trainer._logger_connector.should_update_logs:
            self.write(guard, index)

    def write(self, guard: Guard, index: int, *, final: bool = False) -> None:
        """Writes the newest step of an optimizer.

        Args:
            guard: Its guard.
            index: Its number.
            final: Nothing follows, so that the picture has to be drawn.
        """
        if not self._sinks or self._trainer is None or guard.report is None or guard.record is None:
            return
        tilt, ratio = _known(guard.record.tilt), _known(guard.record.update_ratio)
        panel = self._view(guard, index).build_record(
            guard.report, tilt=tilt, update_ratio=ratio, final=final
        )
        for sink in self._sinks:
            sink.write(logging_step(self._trainer), panel)

    def finish(self, guards: Iterable[tuple[int, Guard]]) -> None:
        """Draws the last pictures, and lets the sinks go."""
        for index, guard in guards:
            self.write(guard, index, final=True)
        for sink in self._sinks:
            sink.close()
        self._sinks, self._trainer = [], None
        self._bar.finish()

    def state_dict(self) -> dict[str, Any]:
        """The pictures so far, so that those of a resumed run go on; plain types."""
        own = {
            str(i): {"names": list(names), "view": view.state_dict()}
            for i, (names, view) in self._views.items()
        }
        return {**self._restored, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps what `state_dict` gave until the optimizers are known."""
        self._restored = dict(state)

    def _view(self, guard: Guard, index: int) -> Overview:
        """An optimizer's view; a new one when other tensors are watched."""
        layout = guard.tracker.layout
        names = tuple(layout.names[i] for i in layout.order)
        if index not in self._views or self._views[index][0] != names:
            view = Overview(
                names,
                [layout.parameters[i].numel() for i in layout.order],
                matrices=[i in layout.layer_indices for i in layout.order],
                group=tag_group(index),
                per_layer=self._per_layer,
            )
            restored = self._restored.pop(str(index), None)
            if restored is not None and tuple(restored["names"]) == names:
                view.load_state_dict(restored["view"])
            self._views[index] = (names, view)
        return self._views[index][1]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
