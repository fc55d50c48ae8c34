"""Log judged steps to loggers and progress bar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_gradguard.callbacks.trainer_adapter import is_early, logging_step, publish_metrics, warn
from lightning_gradguard.forms import check_form
from lightning_gradguard.guard import Guard
from lightning_gradguard.loggers import open_sinks
from lightning_gradguard.loggers.base import LogSink
from lightning_gradguard.loggers.overview import Overview
from lightning_gradguard.loggers.status import RunEnd
from lightning_gradguard.loggers.tags import tag_group

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_gradguard.diagnosis.diagnosis import Diagnosis


class RunLogging:
    """Overview of each optimizer's steps.

    It is written at the first steps and at those at which Lightning logs. Its numbers are also among the Trainer's
    ``callback_metrics``, in every process, so that other callbacks can follow them.

    Args:
        per_layer: Also write a scalar for each tensor.
        progress_bar: Also show `progress_bar_values`.
    """

    def __init__(self, *, per_layer: bool, progress_bar: bool) -> None:
        self._per_layer, self._progress_bar = per_layer, progress_bar
        self._sinks: list[LogSink] = []
        # By the index of the optimizer: names of the tensors in order, and their overview.
        self._overviews: dict[int, tuple[tuple[str, ...], Overview]] = {}
        self._restored: dict[str, Any] = {}
        self._step = 0  # Lightning's newest
        # By the index of the optimizer: the last step whose numbers were written.
        self._written: dict[int, int] = {}
        self._published: set[str] = set()
        self._is_due = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy writes nowhere, since an open file has one writer.
        return {**self.__dict__, "_sinks": []}

    def start(self, trainer: Trainer) -> None:
        """Begin or resume a training.

        Rank 0 opens the loggers.
        """
        self._overviews = {}
        self._step, self._written, self._published, self._is_due = 0, {}, set(), False
        self._sinks = open_sinks(trainer.loggers) if trainer.is_global_zero else []
        self._restored = self._restored if trainer.ckpt_path else {}

    def observe(
        self,
        trainer: Trainer,
        guards: Mapping[int, Guard],
        index: int,
        diagnosis: Diagnosis | None,
        mistakes: Sequence[str] = (),
        rollbacks: int = 0,
    ) -> None:
        """Add a step; write if Lightning logs now.

        Args:
            trainer: Trainer of the run.
            guards: Guards by the index of their optimizer.
            index: Index of the optimizer.
            diagnosis: Diagnosis if there is a new one, or None.
            mistakes: New mistakes that the graph shows, in Markdown.
            rollbacks: Rollbacks so far.
        """
        if self._progress_bar and trainer.is_global_zero:
            # Both kinds of bar read it after the batch, together with the values that the module logs.
            metrics = trainer._logger_connector._progress_bar_metrics
            metrics.update(progress_bar_values(guards))  # type: ignore[arg-type]
        report = guards[index].report
        if report is None or trainer.barebones:
            return
        self._step = logging_step(trainer)
        overview = self._overview(trainer, guards[index], index)
        lasting = guards[index].fault_tracker.lasting
        if self._sinks:
            overview.observe(report, lasting, rollbacks)
            if diagnosis is not None:
                overview.add_diagnosis(diagnosis.to_markdown())
            for mistake in mistakes:
                overview.add_mistake(mistake)
        else:
            overview.count(report, lasting, rollbacks)
        if trainer._logger_connector.should_update_logs or is_early(self._step):
            self._is_due = True
            self._write(trainer, guards[index], index)

    def end_batch(self, trainer: Trainer, guards: Mapping[int, Guard]) -> None:
        """Publish the newest numbers, where they were logged or an epoch ends."""
        if self._is_due or trainer.is_last_batch:
            self.publish(trainer, guards)
        self._is_due = False

    def publish(self, trainer: Trainer, guards: Mapping[int, Guard]) -> None:
        """Put the newest numbers among the Trainer's metrics."""
        metrics: dict[str, float] = {}
        for index, guard in guards.items():
            if guard.report is not None and index in self._overviews:
                metrics |= self._overviews[index][1].scalars(guard.report, **_of_record(guard))
        # What this step does not have must not stay there from an older one.
        absent = dict.fromkeys(self._published - metrics.keys(), math.nan)
        self._published |= metrics.keys()
        if metrics:
            publish_metrics(trainer, metrics | absent)

    def finish(self, trainer: Trainer, guards: Mapping[int, Guard], end: RunEnd) -> None:
        """Write final heat maps and how the run ended; close the loggers."""
        for index, guard in guards.items():
            self._write(trainer, guard, index, end=end)
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def state_dict(self) -> dict[str, Any]:
        """Return the overviews so far as plain types."""
        own = {
            str(index): {"names": list(names), "view": overview.state_dict()}
            for index, (names, overview) in self._overviews.items()
        }
        return {**self._restored, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold the state until the optimizers are known."""
        self._restored = dict(state)

    def _write(self, trainer: Trainer, guard: Guard, index: int, *, end: RunEnd | None = None) -> None:
        if not self._sinks or guard.report is None or guard.record is None:
            return
        overview = self._overview(trainer, guard, index)
        overview.show_clipping(guard.clip_spans)
        record = overview.build_record(guard.report, **_of_record(guard), final=end is not None, end=end)
        if end is not None and self._written.get(index) == self._step:
            record = replace(record, scalars={})
        self._written[index] = self._step
        for sink in self._sinks:
            sink.write(self._step, record)

    def _overview(self, trainer: Trainer, guard: Guard, index: int) -> Overview:
        """Return an optimizer's overview, new for changed tensors."""
        layout = guard.tracker.layout
        names, known = layout.ordered_names, self._overviews.get(index)
        if known is not None and known[0] is names:  # asked at each step, so names are seldom compared
            return known[1]
        if known is None or known[0] != names:
            overview = Overview(
                names,
                [layout.parameters[i].numel() for i in layout.order],
                matrices=[i in layout.layer_indices for i in layout.order],
                group=tag_group(index),
                per_layer=self._per_layer,
                optimizer=index,
            )
            restored = self._restored.pop(str(index), None)
            try:
                if restored is not None:
                    check_form(restored, {"names": [str], "view": dict}, "the state")
                    if tuple(restored["names"]) == names:
                        overview.load_state_dict(restored["view"])
            except Exception as error:  # a picture that begins anew must not end a training
                problem = " ".join(f"{type(error).__name__}: {error}".split())[:160]
                warn(
                    trainer,
                    f"GradGuard: the heat map begins anew, since its saved state is damaged ({problem}).",
                )
                self._overviews.pop(index, None)
                return self._overview(trainer, guard, index)
            self._overviews[index] = (names, overview)
        return self._overviews[index][1]


def _of_record(guard: Guard) -> dict[str, float | None]:
    """Return what the newest full evaluation measured, None where it is not known."""
    if guard.record is None:
        return {}
    known = {"tilt": guard.record.tilt, "update_ratio": guard.record.update_ratio}
    return {name: None if math.isnan(x) else x for name, x in known.items()}


def progress_bar_values(guards: Mapping[int, Guard]) -> dict[str, float | str]:
    """Return the two values of the progress bar.

    - ``grad_norm``: L2 norm of all gradients before clipping, each optimizer's at its newest judged step.
    - ``clip_rate``: clipped steps by judged ones, in [0, 1], of all optimizers and the whole run.
    - ``skipped``: number of steps that were not taken.

    They are plain numbers that have been read already. ``LightningModule.log(prog_bar=True)`` would put them back on
    the device, to be read again after every batch, and add them to ``callback_metrics``.

    Args:
        guards: Guards by the index of their optimizer, at least one that has judged a step.
    """
    own = list(guards.values())
    norm = math.hypot(*(guard.report.total_norm for guard in own if guard.report is not None))
    if own[0].clipper is None:
        # As text, since the bar of rich gives each number three decimals.
        return {"grad_norm": norm, "skipped": str(sum(guard.counts["skipped"] for guard in own))}
    clipped, judged = (sum(guard.counts[name] for guard in own) for name in ("clipped", "judged"))
    return {"grad_norm": norm, "clip_rate": clipped / judged}
