"""`GradGuard`: judge every optimizer step of a Trainer."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.callbacks.compatibility import (
    refuse_double_clipping,
    refuse_hidden_gradients,
    warn_if_no_step_was_seen,
    warn_if_nothing_trains,
)
from lightning_gradguard.callbacks.exact_skip import ExactSkip
from lightning_gradguard.callbacks.flight_recording import FlightRecording
from lightning_gradguard.callbacks.guard_registry import GuardRegistry
from lightning_gradguard.callbacks.rollback import Rollback
from lightning_gradguard.callbacks.run_logging import RunLogging
from lightning_gradguard.callbacks.run_summary import RunSummary
from lightning_gradguard.callbacks.running_buffers import RunningBuffers
from lightning_gradguard.callbacks.trainer_adapter import (
    Callback,
    MonitoredMetric,
    OmittedClipping,
    StepLosses,
    check_first_batch,
    drop_gradients,
    is_placeholder,
    is_step_without_loss,
    optimizer_index,
    sandboxed_step_of,
    scaler_of,
    stop_training,
    warn,
    warn_of_problem,
)
from lightning_gradguard.clippers.base import Clipper
from lightning_gradguard.detectors.base import Detector
from lightning_gradguard.engine.arguments import short_repr, validate_parts
from lightning_gradguard.engine.device_skip import validate_lag
from lightning_gradguard.engine.step_context import StepContext
from lightning_gradguard.flight_recorder.recorder import Recorder
from lightning_gradguard.forms import short
from lightning_gradguard.guard import KEPT_FINDINGS
from lightning_gradguard.loggers.status import End, RunEnd
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import ClipSpan, Fault, Finding, GradientHalt, Report, Severity

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_gradguard.diagnosis.checkup import Checkup
    from lightning_gradguard.diagnosis.diagnosis import Diagnosis

#: Key of a guard's state: the index of its optimizer.
_INDEX = re.compile("[0-9]{1,6}")


@dataclass
class _Results:
    """Public results of one training."""

    findings: deque[Finding] = field(default_factory=lambda: deque(maxlen=KEPT_FINDINGS))
    report: Report | None = None
    diagnosis: Diagnosis | None = None
    diagnosed_rank: int = 0
    mistakes: dict[str, str] = field(default_factory=dict)
    stop_reason: str | None = None
    end: RunEnd | None = None
    bundle: Path | None = None


class GradGuard(Callback):
    """Callback that judges, clips, skips and halts optimizer steps.

    Without arguments it only watches: it warns of faults, skips a step whose gradients, norm or loss are not finite,
    halts if such steps persist, and never changes a gradient whose norm is finite.

    Example:
        >>> from lightning_gradguard import GradGuard, Policy, SteadyClip
        >>> guard = GradGuard(clipper=SteadyClip(), policy=Policy.protect())

    Args:
        detectors: Detectors to judge with; all of them with their defaults when None.
        clipper: Clipper such as ``SteadyClip()``; gradients are not clipped when None. If the policy responds to a
            fault with "clip", only while that is in force, and None stands for `recommended_clipper`.
        policy: Response to each fault; ``Policy.watch()`` when None.
        monitor: Name of a logged metric, such as "val_acc", whose course a diagnosis cites.
        trials: Check the model on the first batch, and try fixes on a critical finding, in 30 passes over the newest
            batch. Neither changes the training.
        recorder: ``Recorder()`` writes a flight record when training is halted, for ``gradguard replay``; None writes
            none.
        per_layer: Also log a scalar for each tensor, ``gradguard_rms_log10/name``.
        progress_bar: Show two values in the progress bar: ``grad_norm``, the norm of the gradients before clipping, and
            ``clip_rate``, the share of the run's steps that were clipped, or ``skipped`` without a clipper.
        lag: 0 to read each step at once, 1 to read it one step later, or None for the cheapest that still skips
            exactly; see `Guard`.

    Attributes:
        checkup: Check-up of the first batch, with ``trials``; None if there was none.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a detector, clipper or policy is of the wrong type.
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
        self.clipper, self.policy, self.lag = clipper, policy, lag
        self.monitor, self.trials, self.recorder = monitor, trials, recorder
        self.per_layer, self.progress_bar = per_layer, progress_bar
        self.checkup: Checkup | None = None

        self._results = _Results()
        self._registry = GuardRegistry(self._judging)
        self._losses, self._metric = StepLosses(), MonitoredMetric(monitor)
        self._buffers, self._rollback = RunningBuffers(), Rollback(policy or Policy.watch())
        self._recording = FlightRecording(recorder)
        self._logging = RunLogging(per_layer=per_layer, progress_bar=progress_bar)
        self._summary = RunSummary()
        self._clipping, self._exact_skip = OmittedClipping(), ExactSkip()
        self._batch: tuple[Any, int] = (None, 0)  # the newest batch and its index, until it is done
        self._batches = 0
        self._least_rows = math.inf
        self._ended_gracefully = self._is_loaded = False

    def __repr__(self) -> str:
        return short_repr(
            self,
            detectors=(self.detectors, None),
            clipper=(self.clipper, None),
            policy=(self.policy, None),
            monitor=(self.monitor, None),
            trials=(self.trials, False),
            recorder=(self.recorder, None),
            per_layer=(self.per_layer, False),
            lag=(self.lag, None),
            progress_bar=(self.progress_bar, False),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without batch, graph, weights, files."""
        released = {
            "_losses": StepLosses(),
            "_clipping": OmittedClipping(),
            "_exact_skip": ExactSkip(),
            "_buffers": RunningBuffers(),
            "_recording": FlightRecording(self.recorder),
            "_batch": (None, 0),
        }
        return self.__dict__ | released

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings so far, oldest first; the newest 1,000."""
        return tuple(self._results.findings)

    @property
    def clip_spans(self) -> tuple[ClipSpan, ...]:
        """From when to when the policy's response "clip" was in force, of all optimizers by first step."""
        spans = [span for guard in self._registry.guards.values() for span in guard.clip_spans]
        return tuple(sorted(spans, key=lambda span: span.first))

    @property
    def report(self) -> Report | None:
        """Report of the newest judged step, or None."""
        return self._results.report

    @property
    def diagnosis(self) -> Diagnosis | None:
        """Diagnosis of the newest critical finding, or None.

        That of the newest warning while nothing is critical; fixes are tried only for something critical.
        """
        return self._results.diagnosis

    @property
    def stop_reason(self) -> str | None:
        """Fault that halted training, such as "nonfinite", or None."""
        return self._results.stop_reason

    @property
    def bundle(self) -> Path | None:
        """File of the flight record, or None."""
        return self._results.bundle

    @property
    def summary(self) -> dict[str, int]:
        """Counts of judged, clipped, skipped, non-finite steps and rollbacks."""
        return self._registry.summary() | self._rollback.state_dict()

    @cached_property
    def state_key(self) -> str:
        """Checkpoint key, equal for equal configuration."""
        # Cached, since Lightning asks for it at each hook.
        return self._generate_state_key(**self._judging)

    @property
    def _judging(self) -> dict[str, Any]:
        """Arguments that decide how a step is judged."""
        return {name: getattr(self, name) for name in ("detectors", "clipper", "policy", "lag")}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work together.

        Raises:
            MisconfigurationException: Lightning's own, under a strategy that hides gradients, or if both would clip.
        """
        if stage == "fit":
            refuse_hidden_gradients(trainer, "GradGuard", "judge")
            if self.clipper is not None:
                refuse_double_clipping(trainer, pl_module, f"clipper={self.clipper!r}")
            elif self.policy is not None and self.policy.clips:
                clipped = {f: "clip" for f, response in self.policy.respond.items() if response == "clip"}
                refuse_double_clipping(trainer, pl_module, f"policy=Policy(respond={clipped})")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin afresh, or with the state of a checkpoint."""
        # A state that was loaded for an earlier fit, which took no step, belongs to that one.
        restored = self._registry.restored if self._is_loaded else {}
        self._registry, self._is_loaded = GuardRegistry(self._judging, restored), False
        self._results, self._summary = _Results(), RunSummary()
        self._losses, self._metric = StepLosses(), MonitoredMetric(self.monitor)
        self._batch, self._batches, self._ended_gracefully = (None, 0), 0, False
        self._least_rows = math.inf
        self._logging.start(trainer)
        self._recording.start(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to observe the module."""
        self._registry.observe_usage(pl_module)
        self._rollback.start(trainer)
        self._buffers.start(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copy the state that a bad batch could ruin."""
        self._losses.start_batch()
        self._batch, self._batches = (batch, batch_idx), self._batches + 1
        self._least_rows = min(self._least_rows, _rows(batch))
        if self._batches == 1:  # by now every callback may have unfrozen something
            warn_if_nothing_trains(trainer, pl_module)
        if self.trials and self._batches == 1:
            self.checkup = check_first_batch(trainer, pl_module, batch, batch_idx)
        self._buffers.save()
        self._rollback.save_if_due(trainer, self._registry)
        self._recording.start_batch(trainer, batch, batch_idx)
        self._registry.begin_pass()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss for the judgement; look for mistakes in the first one."""
        if self._batches == 1:
            for problem in self._registry.find_problems(loss):
                if self.checkup is None:  # else it has said so
                    warn_of_problem(trainer, problem, self._batch[0])
        due = any(guard.tracker.compares_loss for guard in self._registry.guards.values())
        self._losses.add(trainer, pl_module, loss, compare=due)
        self._registry.end_pass(loss, leave=pl_module.automatic_optimization)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judge the coming step.

        Raises:
            GradientHalt: If training cannot go on; the step is not taken.
        """
        self._clipping.restore()
        if self._ended_gracefully:
            drop_gradients(trainer, optimizer)
            self._clipping.omit(pl_module)
            return
        if is_placeholder(optimizer):
            return
        index, step = optimizer_index(trainer, optimizer), trainer.global_step
        guard = self._registry.guard_of(trainer, pl_module, optimizer, index)
        self._recording.start_step(guard, step)
        loss, graph, scaler = self._losses.take(), self._losses.graph, scaler_of(trainer)
        if is_step_without_loss(pl_module, scaler, graph):
            return
        self._exact_skip.observe(trainer, optimizer)
        batch, batch_idx = self._batch
        context = StepContext(
            # Of several micro-batches any may be the culprit, and only the last is at hand.
            batch=batch if trainer.accumulate_grad_batches == 1 else None,
            sandboxed_step=partial(sandboxed_step_of, trainer, pl_module, optimizer, batch, batch_idx),
            run_trials=self.trials,
            notes=self._metric.notes,
            problems=self._registry.problems_for(guard),
            without_loss="" if pl_module.automatic_optimization else _WITHOUT_LOSS,
            comparison=self._losses.comparison,
        )
        rollbacks = self._rollback.count
        try:
            self._judge(
                trainer,
                index,
                lambda: guard.step(loss, scaler=scaler, graph=graph, step=step, context=context),
            )
        except GradientHalt:
            self._exact_skip.undo(optimizer)
            raise
        if not guard.tracker.has_gradient:
            self._clipping.omit(pl_module)
            self._exact_skip.skip(optimizer, renew=self._rollback.count > rollbacks)

    def _judge(self, trainer: Trainer, index: int, judge: Callable[[], object]) -> None:
        """Judge, publish the report, act on a halt.

        A halt rolls back, ends ``fit`` gracefully, or is raised, as the policy says.

        Args:
            trainer: Trainer of the run.
            index: Index of the optimizer.
            judge: Calls the guard.

        Raises:
            GradientHalt: If training cannot go on.
        """
        results, guards = self._results, self._registry.guards
        guard = guards[index]
        report, diagnosis, rollbacks = guard.report, guard.diagnosis, self._rollback.count
        try:
            judge()
        except GradientHalt as halt:
            if self._rollback.try_restore(trainer, guards, halt):
                return
            results.stop_reason, results.diagnosis = halt.diagnosis.fault.value, halt.diagnosis
            results.bundle = self._recording.record_halt(trainer, guards, halt, index)
            results.end = RunEnd(End.HALTED, halt.step, results.stop_reason, optimizer=index)
            if self.policy is None or self.policy.stop != "graceful":
                raise
            self._ended_gracefully = True
            results.end = results.end._replace(how=End.STOPPED)
            stop_training(trainer)
            warn(
                trainer,
                f"GradGuard: {results.stop_reason} ends the training before step {halt.step}, without an error, since "
                f'the policy has stop="graceful".\n{halt}',
            )
        finally:
            if guard.report is not None and guard.report is not report:
                results.report = guard.report
                results.findings.extend(guard.report.findings)
                if self._rollback.count == rollbacks:  # else the state is one from before the warning
                    self._rollback.observe(guard.report)
                news = guard.diagnosis if guard.diagnosis is not diagnosis else None
                if news is not None and guard.diagnosed_rank >= results.diagnosed_rank:
                    results.diagnosis, results.diagnosed_rank = news, guard.diagnosed_rank
                if guard.report.skip:
                    self._buffers.restore_nonfinite(skipped=True)
                self._summary.add(guard.report)
                self._logging.observe(
                    trainer, guards, index, news, self._take_mistakes(), self._rollback.count
                )

    def _take_mistakes(self) -> list[str]:
        """Return the mistakes that were named since the last call, in Markdown."""
        known = self._results.mistakes
        fresh = [p for p in self._registry.problems if p.kind not in known]
        if not fresh:
            return []
        from lightning_gradguard.diagnosis.diagnose import problem_as_markdown

        known.update((problem.kind, problem.text) for problem in fresh)
        return [problem_as_markdown(problem, self._batch[0]) for problem in fresh]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Release the batch; repair running statistics."""
        self._clipping.restore()
        self._registry.leave_pass()
        self._batch, self._losses.graph = (None, 0), None
        self._logging.end_batch(trainer, self._registry.guards)
        self._buffers.end_batch()
        self._recording.end_batch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which running statistics became NaN or Inf while every step was finite."""
        self._report_ruined(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the newest numbers, for callbacks that look at them after the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._logging.publish(trainer, self._registry.guards)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the monitored metric."""
        self._metric.update(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge pending steps; finish the logs.

        Raises:
            GradientHalt: If the last step was one to halt on.
        """
        try:
            for index, guard in self._registry.guards.items():
                self._judge(trainer, index, guard.close)
        finally:
            self._finish(trainer, RunEnd(End.FINISHED, trainer.global_step))
        self._report_ruined(trainer)
        self._metric.end(trainer)
        if self._batches and not self._registry.guards:
            warn_if_no_step_was_seen(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish the logs.

        Lightning calls no other hook after an exception.
        """
        self._clipping.restore()
        self._registry.leave_pass()
        self._registry.close_hooks()
        self._buffers.restore_nonfinite()
        bundle = self._recording.record_error(trainer, self._registry.guards, exception)
        self._results.bundle = bundle or self._results.bundle
        self._finish(trainer, _end_by(exception, trainer.global_step))
        self._log_summary(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the summary, or drop unused state."""
        if stage == "fit":
            self._log_summary(trainer)
        else:
            self._registry.restored = {}

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors.

        They load under ``weights_only=True``.
        """
        return self._registry.state_dict() | {
            "recovery": self._rollback.state_dict(),
            "display": self._logging.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold the state until the optimizers are known.

        Raises:
            ValueError: If it is no dict. What is damaged inside is warned of, and begins afresh, when it is used.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state must be what GradGuard.state_dict gave, got {short(state_dict)}")
        restored = dict(state_dict)
        self._rollback.load_state_dict(restored.pop("recovery", {}))
        display = restored.pop("display", {})
        self._logging.load_state_dict(display if isinstance(display, dict) else {})
        guards = {k: state for k, state in restored.items() if isinstance(k, str) and _INDEX.fullmatch(k)}
        self._registry.restored, self._is_loaded = guards, True

    def _report_ruined(self, trainer: Trainer) -> None:
        """Warn once of tensors that a step made NaN or Inf, though its loss and gradients were finite.

        They have been restored, so that nothing else would show it here; without the guard they stay.
        """
        names, results = self._buffers.take_ruined(), self._results
        if not names or any(finding.fault == Fault.NONFINITE for finding in results.findings):
            return
        from lightning_gradguard.diagnosis.diagnose import diagnose_ruined

        finding = Finding(
            Fault.NONFINITE,
            Severity.WARNING,
            trainer.global_step,
            tuple(names[:8]),
            float(len(names)),
            0.0,
            "RunningBuffers",
            measure="running statistics that became NaN or Inf, while loss and gradients were finite",
        )
        diagnosis, message = diagnose_ruined(finding, self._least_rows)
        if trainer.world_size == 1:  # each process has statistics of its own, and findings must agree
            results.findings.append(finding)
            if results.diagnosis is None or results.diagnosis.fault == Fault.SPIKE:
                results.diagnosis = diagnosis
        warn(trainer, f"GradGuard: {message}")

    def _finish(self, trainer: Trainer, end: RunEnd) -> None:
        """Release everything; write the last heat maps.

        Args:
            trainer: Trainer of the run.
            end: How the run ended, if no halt ended it.
        """
        self._exact_skip.close()
        self._batch = (None, 0)
        self._recording.close()
        self._registry.close_hooks()
        self._logging.finish(trainer, self._registry.guards, self._results.end or end)

    def _log_summary(self, trainer: Trainer) -> None:
        self._summary.log(
            trainer,
            self._registry.guards,
            rollbacks=self._rollback.count,
            stop_reason=self.stop_reason,
            bundle=self.bundle,
            mistakes=list(self._results.mistakes.values()),
        )


#: Warning for steps of manual optimization whose loss is not known.
_WITHOUT_LOSS = (
    "the loss is not known, since backward was not called through self.manual_backward(loss), so rules that need "
    "progress are off."
)


class AutoGuard(Callback):
    """Callback that becomes a `GradGuard`, unless there is one.

    A guard of the user or of the module takes precedence over it; it does nothing then.

    When a Trainer loads callbacks from entry points, it does not tell which callbacks it has. When it sets up, all are
    there, and no state has been restored yet. So this callback decides then, and gets the state of a checkpoint. It
    becomes a guard itself: the list of callbacks belongs to the user, and stays as it is.

    Args:
        policy: "watch", "protect" or "strict".
    """

    def __init__(self, policy: str) -> None:
        self.policy: Policy = getattr(Policy, policy)()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Become a guard, unless there is one."""
        if any(isinstance(callback, GradGuard) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            return
        guard = GradGuard(policy=self.policy)
        self.__class__ = GradGuard  # type: ignore[assignment]
        self.__dict__ = guard.__dict__
        guard.setup(trainer, pl_module, stage)


def _end_by(exception: BaseException, step: int) -> RunEnd:
    """Return how an exception that is no halt of this guard ends a run."""
    name = type(exception).__name__
    is_signal = isinstance(exception, KeyboardInterrupt) or name == "SIGTERMException"
    return RunEnd(End.INTERRUPTED, step) if is_signal else RunEnd(End.ERROR, step, error=name)


def _rows(batch: object) -> float:
    """Return the number of samples in a batch of a usual form; infinite for any other."""
    first = next(iter(batch), None) if isinstance(batch, (list, tuple)) else batch
    return len(first) if isinstance(first, Tensor) and first.ndim else math.inf


def _validate_options(monitor: object, recorder: object, **switches: object) -> None:
    if monitor is not None and (not isinstance(monitor, str) or not monitor):
        raise ValueError(f"monitor must be the name of a logged metric such as 'val_acc', got {monitor!r}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if recorder is not None and not isinstance(recorder, Recorder):
        raise ValueError(f"recorder must be a Recorder, such as Recorder(), got {recorder!r}")
