"""`GradGuard`: judges every optimizer step of a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.callbacks.base import Callback
from lightning_gradguard.callbacks.flight_recording import FlightRecording
from lightning_gradguard.callbacks.guard_registry import GuardRegistry
from lightning_gradguard.callbacks.rollback import Rollback
from lightning_gradguard.callbacks.run_logging import RunLogging
from lightning_gradguard.callbacks.run_outcome import RunOutcome
from lightning_gradguard.callbacks.trainer_adapter import (
    Losses,
    Metric,
    check_up,
    is_stand_in,
    judge,
    optimizer_index,
    refuse_what_clashes,
    say_if_nothing_trains,
    say_that_no_step_was_seen,
)
from lightning_gradguard.clippers.base import Clipper
from lightning_gradguard.detectors.base import Detector
from lightning_gradguard.engine.arguments import validate_parts
from lightning_gradguard.engine.device_skip import validate_lag
from lightning_gradguard.flight_recorder.recorder import Recorder
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import Finding, Report

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gradguard.diagnosis.checkup import Checkup
    from lightning_gradguard.diagnosis.diagnosis import Diagnosis


class GradGuard(Callback):
    """Judges every optimizer step, clips, skips what is not finite, and halts what cannot be saved.

    With no argument it watches: it warns, skips a step whose gradients, norm or loss are not finite, halts when that
    goes on, and never changes a gradient whose norm is finite.

    Example:
        >>> from lightning_gradguard import GradGuard, Policy, SpikeClip
        >>> guard = GradGuard(clipper=SpikeClip(), policy=Policy.protect())

    Args:
        detectors: What is judged; all with their defaults when None.
        clipper: How gradients are clipped, such as ``SpikeClip()``; not at all when None.
        policy: What is done about a fault; ``Policy.watch()`` when None.
        monitor: Name of a logged metric, such as "val_acc", whose course the diagnosis cites.
        trials: Try remedies when something critical is found, in 30 passes over the newest batch; changes nothing.
        recorder: A ``Recorder()`` leaves a bundle when training is halted, for ``gradguard replay``; None leaves none.
        per_layer: Also log a scalar for each tensor, ``gradguard_rms_log10/NNN_name``.
        progress_bar: Show two values in the progress bar: ``grad_norm``, the gradients' norm before clipping, and
            ``clip_rate``, the share of the run's steps that were clipped, or ``skipped`` where there is no clipper.
        lag: 0, 1, or None for the cheapest that still skips exactly; see `Guard`.

    Attributes:
        checkup: With ``trials``, what the check-up of the first batch found; None if there was none.

    Raises:
        ValueError: For a wrong value.
        TypeError: For a detector, clipper or policy of the wrong kind.
    """

    def __init__(
        self,
        *,
        detectors: Sequence[Detector] | None = None,
        clipper: Clipper | None = None,
        policy: Policy | None = None,
        monitor: str | None = None,
        trials: bool = False,
        recorder: Recorder | None = None,
        per_layer: bool = False,
        lag: int | None = None,
        progress_bar: bool = False,
    ) -> None:
        validate_parts(detectors, clipper, policy)
        validate_lag(lag)
        _validate_options(monitor, recorder, trials=trials, per_layer=per_layer, progress_bar=progress_bar)
        self.detectors = None if detectors is None else tuple(detectors)
        self.clipper, self.policy, self.recorder = clipper, policy, recorder
        self.monitor, self.lag, self.trials = monitor, lag, trials
        self.per_layer, self.progress_bar = per_layer, progress_bar
        self.checkup: Checkup | None = None
        self._guards, self._batches = GuardRegistry(self._judging, {}), 0
        self._losses, self._metric, self._newest = Losses(), Metric(monitor), (None, 0)
        self._recording, self._recovery = FlightRecording(recorder), Rollback(policy)
        self._display = RunLogging(per_layer, progress_bar)
        self._outcome = RunOutcome(self._recovery, self._recording, self._display)

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows what was found and how to judge on, and holds no trainer, batch, graph or file."""
        return {**self.__dict__, "_losses": Losses(), "_newest": (None, 0)}

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found, oldest first; the newest 1,000."""
        return tuple(self._outcome.findings)

    @property
    def report(self) -> Report | None:
        """Report of the newest judged step, or None."""
        return self._outcome.report

    @property
    def diagnosis(self) -> Diagnosis | None:
        """After a critical finding: what, where, why, and what to do."""
        return self._outcome.diagnosis

    @property
    def stop_reason(self) -> str | None:
        """After a halt, the fault's value, such as "nonfinite"."""
        return self._outcome.stop_reason

    @property
    def bundle(self) -> Path | None:
        """File that the recorder left, or None."""
        return self._outcome.bundle

    @cached_property
    def state_key(self) -> str:
        """Equal for equal configuration, so that a resumed run finds its state; asked for at each hook."""
        return self._generate_state_key(**self._judging)

    @property
    def summary(self) -> dict[str, int]:
        """Steps so far: how many were judged, clipped, skipped, and not finite; and rollbacks, if there may be."""
        return self._guards.summary() | self._recovery.state_dict()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work together."""
        if stage == "fit":
            refuse_what_clashes(trainer, pl_module, self.clipper)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Says what came of the training, or forgets what a checkpoint brought that was only validated or tested."""
        if stage == "fit":
            self._outcome.say(trainer, self._guards)
        else:
            self._guards.restored = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts afresh."""
        self._guards, self._losses = GuardRegistry(self._judging, self._guards.restored), Losses()
        self._newest, self._batches = (None, 0), 0
        self._outcome.start()
        self._metric = Metric(self.monitor)
        self._display.start(trainer)
        self._recording.start(trainer, pl_module, self._guards)
        say_if_nothing_trains(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to look at which parameters are used, after the sanity check of the validation."""
        self._guards.look(pl_module)
        self._recovery.start(trainer, pl_module, self._guards)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forgets the last batch."""
        self._losses.forget_last()
        self._newest = batch, batch_idx
        self._batches += 1
        if self.trials and self._batches == 1:
            self.checkup = check_up(trainer, pl_module, batch, batch_idx)
        self._recovery.begin()
        self._recording.begin(batch, batch_idx)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Lets go of the batch and its graph."""
        self._newest, self._losses.graph = (None, 0), None
        self._recovery.end()
        self._recording.end()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follows the monitored metric."""
        self._metric.look(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keeps the loss for the judgement."""
        self._losses.add(trainer, pl_module, loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judges the step that is about to be taken.

        Raises:
            GradientHalt: If training cannot go on; the step is not taken.
        """
        if self._recovery.has_ended(optimizer) or is_stand_in(optimizer):
            return
        index = optimizer_index(trainer, optimizer)
        guard = self._guards.of(trainer, pl_module, optimizer, index)
        self._recording.step(guard, trainer.global_step)
        with self._outcome.following(guard, index):
            judge(
                guard,
                trainer,
                pl_module,
                optimizer,
                self._losses,
                self._newest,
                run_trials=self.trials,
                notes=self._metric.notes,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judges what is still under way, and finishes the pictures."""
        try:
            for index, guard in self._guards.items():
                with self._outcome.following(guard, index):
                    guard.close()
        finally:
            self._finish()
        self._metric.close(trainer)
        if self._batches and not self._guards:
            say_that_no_step_was_seen(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finishes the pictures, and says what came of it: after an exception Lightning calls no other hook."""
        self._guards.rest()
        self._recovery.end()
        self._outcome.stopped(exception)
        self._finish()
        self._outcome.say(trainer, self._guards)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, so that it loads under ``weights_only=True``."""
        return self._guards.state_dict() | self._outcome.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the optimizers are known."""
        self._guards.restored = dict(state_dict)
        self._outcome.load_state_dict(self._guards.restored)

    @property
    def _judging(self) -> dict[str, Any]:
        """What decides how a step is judged; what is shown or recorded does not."""
        return {name: getattr(self, name) for name in ("detectors", "clipper", "policy", "lag")}

    def _finish(self) -> None:
        """Writes the last pictures and lets the sinks go."""
        self._newest = (None, 0)
        self._recording.close()
        self._guards.look_away()
        self._display.finish(self._guards.items())


def _validate_options(monitor: object, recorder: object, **switches: object) -> None:
    """Raise ValueError for options that `GradGuard` cannot use."""
    if monitor is not None and (not isinstance(monitor, str) or not monitor):
        raise ValueError(f"monitor must be the name of a logged metric such as 'val_acc', got {monitor!r}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if recorder is not None and not isinstance(recorder, Recorder):
        raise ValueError(f"recorder must be a Recorder, such as Recorder(), got {recorder!r}")
