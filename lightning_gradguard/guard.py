"""`Guard`: one optimizer step from gradients to report.

It serves any training loop, and owns all state.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.clippers import recommended_clipper
from lightning_gradguard.clippers.base import Clip, Clipper, apply_
from lightning_gradguard.detectors import default_detectors
from lightning_gradguard.detectors.base import Detector
from lightning_gradguard.engine import device_skip
from lightning_gradguard.engine.arguments import (
    as_context,
    as_scalar,
    message_without_loss,
    short_repr,
    validate_parts,
)
from lightning_gradguard.engine.evaluate import (
    Evaluation,
    GuardParts,
    GuardState,
    choose_state,
    evaluate,
    from_plain,
    init_state,
    to_plain,
)
from lightning_gradguard.engine.fast_path import Accepted, FastPath
from lightning_gradguard.engine.fault_tracker import Decision, FaultTracker
from lightning_gradguard.engine.history import History, history_of
from lightning_gradguard.engine.ownership import add_ownership, disconnected_index, name_idle
from lightning_gradguard.engine.parameter_tracker import ParameterTracker, StateError
from lightning_gradguard.engine.readback import (
    PendingStep,
    Readback,
    pack,
    read,
    restore_under_way,
    save_under_way,
    unpack,
)
from lightning_gradguard.engine.sampling_schedule import Shown
from lightning_gradguard.engine.state_form import check_names, check_state, upgrade
from lightning_gradguard.engine.step_context import StepContext
from lightning_gradguard.engine.step_record import DetectorResult, StepRecord
from lightning_gradguard.engine.warn import warn
from lightning_gradguard.forms import short
from lightning_gradguard.introspection.graph_problems import OWNERSHIP, GraphProblem, Problem
from lightning_gradguard.introspection.probes import ForwardUsage
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import ClipSpan, Fault, Finding, GradientHalt, Report, Severity
from lightning_gradguard.stats.grad_stats import GradStats, stats_of
from lightning_gradguard.stats.trends import WARM_UP

if TYPE_CHECKING:
    from lightning_gradguard.diagnosis.diagnosis import Diagnosis
    from lightning_gradguard.diagnosis.nan_origin import Origin

#: Findings that are kept.
KEPT_FINDINGS = 1000
#: Version of the saved state, raised when an older one can no longer be read.
STATE_VERSION = 6


class Guard:
    """Judges, clips, skips and halts optimizer steps.

    Call `step` after backward and before ``optimizer.step()``.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> guard = Guard(model.named_parameters(), optimizer=optimizer)
        >>> loss = model(torch.ones(4, 2)).square().mean()
        >>> loss.backward()
        >>> report = guard.step(loss=loss)
        >>> if not report.skip:
        ...     optimizer.step()

    Args:
        named_parameters: Pairs of name and parameter, from ``model.named_parameters()``.
        optimizer: Optimizer whose parameters are judged; all named parameters when None.
        detectors: What is judged; `default_detectors` when None.
        clipper: How gradients are clipped; not at all when None. If the policy responds to a fault with "clip", only
            while that is in force, and None stands for `recommended_clipper`.
        policy: Response to each fault; ``Policy.watch()`` when None.
        lag: 0 to read each step at once; 1 to read it one step later, so that nothing waits for the device; None for
            the cheapest that still skips exactly.
        index: Index of the optimizer, for findings.
        usage: Record of the first forward passes so far; None to begin one now.
        title: What a warning calls the optimizer, such as "optimizer 0 (generator)"; empty if there is only one.

    Attributes:
        clipper: The clipper that is used, or None.
        tracker: Names, order and measurements of the tensors.
        fault_tracker: Active faults.
        fast_path: Steps accepted without asking detectors.
        report: Report of the newest step, or None.
        record: Numbers of the newest step that was not accepted by the fast path, or None.
        diagnosis: Diagnosis of the newest critical finding, else of the newest warning, or None.
        counts: Number of steps that were "judged", "clipped", "skipped" and "nonfinite".
        steps: Number of calls of `step`.
        lag: 0 or 1.
        title: What warnings call the optimizer, such as "optimizer 1 (critic)". Empty if there is only one.

    Raises:
        ValueError: If there is no parameter, or ``lag`` is none of the three.
        TypeError: If a detector or the clipper lacks ``init`` or ``update``, or the policy is not a `Policy`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        detectors: Sequence[Detector] | None = None,
        clipper: Clipper | None = None,
        policy: Policy | None = None,
        lag: int | None = None,
        index: int = 0,
        usage: ForwardUsage | None = None,
        title: str = "",
    ) -> None:
        validate_parts(detectors, clipper, policy)
        self.detectors = default_detectors() if detectors is None else tuple(detectors)
        self.policy = Policy.watch() if policy is None else policy
        self.clipper = recommended_clipper() if clipper is None and self.policy.clips else clipper
        self._parts = GuardParts.of(self.detectors, self.clipper)
        skips_lasting_faults = any(
            self.policy.response(f) == "skip"
            for f in Fault.known()
            if f not in (Fault.NONFINITE, Fault.SPIKE)
        )
        self.tracker = ParameterTracker(named_parameters, optimizer, usage, skips_lasting_faults)
        self.fault_tracker = FaultTracker(self.policy, index)
        self.fast_path = FastPath(self._parts, clipping=not self.policy.clips)
        self.lag = device_skip.choose_lag(lag, optimizer, self.tracker.layout.numel.device, self.policy)
        self._readback = Readback(self.lag)
        self._state: GuardState | None = None
        self._results: list[DetectorResult] = []

        self.report: Report | None = None
        self.record: StepRecord | None = None
        self.diagnosis: Diagnosis | None = None
        self.counts = {"judged": 0, "clipped": 0, "skipped": 0, "nonfinite": 0}
        self.steps, self.title = 0, title
        self._last_finite: StepRecord | None = None
        self._history = history_of(self.tracker.layout)
        self._findings: deque[Finding] = deque(maxlen=KEPT_FINDINGS)
        self._halt: Finding | None = None
        self._origin: Origin | None = None
        self._diagnosed = 0
        self._warned_of_no_loss = False
        self._warned_of: dict[Problem, GraphProblem] = {}

    def __repr__(self) -> str:
        return short_repr(
            self,
            optimizer=(self.optimizer and type(self.optimizer).__name__, None),
            detectors=(self.detectors, default_detectors()),
            clipper=(self.clipper, None),
            policy=(self.policy, Policy.watch()),
            lag=(self.lag, 0),
            index=(self.fault_tracker.optimizer, 0),
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer whose steps are judged."""
        return self.tracker.optimizer

    @property
    def diagnosed_rank(self) -> int:
        """Gravity of what `diagnosis` is of; 0 without one."""
        return self._diagnosed

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings so far, oldest first; the newest 1,000."""
        return tuple(self._findings)

    @property
    def clip_spans(self) -> tuple[ClipSpan, ...]:
        """Steps at which the response "clip" was in force, oldest first; the newest 100 spans."""
        return self.fault_tracker.clip_response.spans

    @property
    def history(self) -> History:
        """The newest judged steps.

        It begins anew when the parameters change, and is not saved.
        """
        self.flush()
        return self._history

    @property
    def state(self) -> GuardState | None:
        """State after the newest good step; None before the first."""
        self.flush()
        return self._state

    def step(
        self,
        loss: Tensor | float | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        graph: Tensor | None = None,
        step: int | None = None,
        batch: object = None,
        context: StepContext | None = None,
    ) -> Report:
        """Judge the gradients; clip or remove them.

        In a distributed program every rank has to call it.

        Args:
            loss: Scalar loss of this step, not scaled. Without it, rules that need progress are off.
            scaler: Gradient scaler in use; gradients are unscaled if that has not been done.
            graph: Tensor whose autograd graph shows the order of layers; ``loss`` when None.
            step: Number of this step in reports; steps judged so far when None.
            batch: Input of the loss; looked at only if something critical is found.
            context: Further facts for a diagnosis; ``batch`` is added to it.

        Returns:
            The report of this step. If ``skip`` is true, ``optimizer.step()`` must not be called; the gradients have
            been removed, so that even a call would change nothing. With ``lag=1`` the report is of the step before, and
            ``skip`` is false, since bad steps are skipped on the device.

        Raises:
            GradientHalt: If training cannot go on.
            ValueError: If the loss is not a scalar.
            TypeError: If ``context`` is not a `StepContext`.
        """
        loss, context = as_scalar(loss), as_context(context, batch)
        if self.tracker.follow_groups():
            self.flush()
            self._state = None
            self.fast_path.close()
        if scaler is not None and self.lag:
            # Both would set found_inf, and the scaler's own skip is exact.
            self.close()
            self.lag, self._readback = 0, Readback(0)
        number = self.steps if step is None else step
        self.steps += 1
        if graph is None and loss is not None and loss.grad_fn is not None:
            graph = loss
        if graph is None and not self.tracker.has_gradient:
            return Report(number, None, 0.0, 0.0, None, 1.0, skip=False)
        self.tracker.unscale(scaler)
        if loss is None and not self._warned_of_no_loss:
            self._warned_of_no_loss = True
            needs_none = not (message := message_without_loss(self.detectors))
            message = message if needs_none or context.without_loss is None else context.without_loss
            if message:
                warn(message)

        scale = None if scaler is None else scaler._scale
        stats = self.tracker.measure(
            loss, graph, scaled=scaler is not None, loss_scale=scale, comparison=context.comparison
        )
        asked = None
        if not self.lag and not stats.elapsed:
            if self.fast_path.is_window_over:
                _, self._state = self.fast_path.fold_in(self._state)
                assert self._state is not None
                self.fast_path.renew(stats, self._state)
            accepted = self.fast_path.accept(stats, number, self._state, self.flush)
            if accepted is not None:
                self.report = accepted.report
                self.counts["judged"] += 1
                self._clip_accepted(stats, accepted)
                self._add_to_history(accepted.completed)
                self.fault_tracker.count_accepted(self._results, has_loss=stats.has_loss)
                self.tracker.schedule.commit(taken=True, accepted=True)
                self._probe_sequence_if_stuck()
                return accepted.report
            asked = self.fast_path.asked
        stats = stats.replace(noise=self.tracker.noise_of(graph))
        return self._evaluate(stats, number, scaler, context, asked)

    def flush(self) -> None:
        """Fold in deferred steps and complete their reports."""
        thresholds, self._state = self.fast_path.fold_in(self._state)
        if thresholds:
            self._finalize(read(torch.stack(thresholds)))

    def keep_history(self, steps: int) -> None:
        """Keep that many of the newest steps in `history`.

        Args:
            steps: Most steps to keep.

        Raises:
            ValueError: If ``steps`` is not a positive whole number.
        """
        if not self._history.keeps(steps):  # asked before `history`, which folds in deferred steps
            self.history.resize(steps)

    def close(self) -> None:
        """Judge what is still under way; remove all hooks.

        Call it when training ends.

        Raises:
            GradientHalt: If the last step was one to halt on.
        """
        self.tracker.close()
        self.flush()
        while (arrived := self._readback.take()) is not None:
            self._conclude(*arrived)
            self._raise_if_halted(arrived[1].step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types and tensors.

        A run resumed with it judges and clips as this one would.
        """
        self.flush()
        return {
            "version": STATE_VERSION,
            "kinds": self._kinds(),
            "steps": self.steps,
            "counts": dict(self.counts),
            "watch": self.tracker.state_dict(),
            "judge": self.fault_tracker.state_dict(),
            "sights": [result.to_plain() for result in self._results],
            "quiet": self.fast_path.state_dict(),
            "states": None if self._state is None else to_plain(self._state),
            # With lag=1: steps that were posted and not yet judged.
            "under_way": save_under_way(self._readback),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Args:
            state: State of a guard with the same parameters, detectors and clipper.

        Raises:
            StateError: If it is of another version, other parameters, or other detectors or clipper. Nothing is changed
                then. It is a ValueError.
        """
        if not isinstance(state, Mapping):
            raise StateError(f"state must be what Guard.state_dict gave, got a {type(state).__name__}")
        if type(state.get("version")) is int and state["version"] == 5:
            state = upgrade(state, self.state_dict(), self._kinds())
        version, kinds = state.get("version"), state.get("kinds")
        if not isinstance(version, int) or version != STATE_VERSION:
            raise StateError(
                f"state must be of version {STATE_VERSION}, got {short(version)}; start the guard afresh"
            )
        if not isinstance(kinds, list) or list(map(str, kinds)) != self._kinds():
            raise StateError(
                f"state must be of the same detectors and clipper, {self._kinds()}, got {short(kinds)}; "
                "construct the guard as in the run that saved it"
            )
        before = copy.deepcopy(self.state_dict())
        check_names(state, self.tracker)
        check_state(state, before)
        try:
            self._restore(state)
        except StateError:
            self._restore(before)
            raise
        except Exception as error:  # whatever is wrong with it, the guard stays as it was
            self._restore(before)
            raise StateError(
                f"state must be what Guard.state_dict gave, but {type(error).__name__}: {error}"
            ) from error

    def roll_back(self, state: Mapping[str, Any] | None) -> None:
        """Continue from an earlier state of this guard.

        The steps since then stay counted.

        Args:
            state: State from `state_dict`; None for the beginning.
        """
        self.flush()
        steps, counts, clip_response = self.steps, self.counts, self.fault_tracker.clip_response
        if state is None:
            self._state, self._results = None, []
            self.fault_tracker = FaultTracker(self.policy, self.fault_tracker.optimizer)
            self.fast_path.close()
            self.tracker.restart_schedule()
        else:
            self.load_state_dict(state)
        self.fault_tracker.clip_response.keep_spans(clip_response.spans, clip_response.newest)
        self.steps, self.counts = steps, counts
        self._readback = Readback(self.lag)  # steps under way belong to the part that is undone

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not share deferred steps with this guard.
        self.flush()
        return self.__dict__

    def _clip_accepted(self, stats: GradStats, accepted: Accepted) -> None:
        """Clip an accepted step, and keep what its clipper learnt."""
        if accepted.clipper_state is not None and self._state is not None:
            self._state = self._state._replace(clipper=accepted.clipper_state)
        if accepted.multipliers is not None:
            self.counts["clipped"] += 1
            apply_(stats.gradients, accepted.multipliers)

    def _evaluate(
        self,
        stats: GradStats,
        number: int,
        scaler: torch.amp.GradScaler | None,
        context: StepContext,
        asked: tuple[Clip, Any] | None,
    ) -> Report:
        """Evaluate a step, and act on it; ``asked`` is as in `evaluate`."""
        thresholds, self._state = self.fast_path.fold_in(self._state)
        accepted = self.fast_path.accepted
        before = self._state
        if before is None:
            first = stats if self.clipper is None else stats.replace(moments=self.tracker.moment_norms())
            before = init_state(first, self._parts)
        evaluation, after = evaluate(stats, before, self._parts, accepted, asked)
        pending = PendingStep(
            step=number,
            has_loss=stats.has_loss,
            scaled=scaler is not None,
            evaluation=evaluation,
            asked=tuple([reading is not None for reading in evaluation.readings]),
            # With lag=1 the batch and the weights of a step are gone when it is judged.
            context=dataclasses.replace(context, batch=None, sandboxed_step=None) if self.lag else context,
        )
        packed = pack(evaluation, None if scaler is None else scaler._scale, thresholds)
        arrived = self._readback.exchange(packed, pending)
        if self.lag:
            self.fast_path.close()
            return self._act_on_device(evaluation, before, after, arrived, number)

        assert arrived is not None
        numbers, _ = arrived
        self._finalize(numbers[len(numbers) - len(thresholds) :])
        self.fast_path.close(accepted)  # detectors have not seen those steps until this one is taken
        report = self._conclude(numbers, pending)
        record = self.record
        assert record is not None
        if report.skip:
            self.tracker.drop_gradients()
        else:
            self._state = after
            most = self.fault_tracker.steps_until_change(record.results)
            if self.policy.clips and self._is_clipping:
                most = 0  # the response ends after a number of steps, so each of them counts
            self.fast_path.open(record, stats, after.clipper, most)
            if evaluation.clip is not None and record.clipped:
                apply_(stats.gradients, evaluation.clip.multipliers)
            self.tracker.observe_zeroing()
        if any(f.fault == Fault.SPIKE for f in report.findings) and self.tracker.schedule.may_sample:
            self.tracker.sample_now()
        self.tracker.schedule.commit(taken=not report.skip)
        self._probe_sequence_if_stuck()
        self._raise_if_halted(number)
        return report

    def _act_on_device(
        self,
        evaluation: Evaluation,
        before: GuardState,
        after: GuardState,
        arrived: tuple[list[float], PendingStep] | None,
        number: int,
    ) -> Report:
        """Act on the device; report on the step before.

        Args:
            evaluation: Results of this step on the device.
            before: State before it.
            after: State after it, if it is good.
            arrived: Numbers of the step before, if they have arrived.
            number: Number of this step.

        Raises:
            GradientHalt: If the step before was one to halt on.
        """
        optimizer = self.tracker.optimizer
        self._state = choose_state(evaluation.stats.finite, after, before)
        self.tracker.schedule.commit(taken=True)
        if arrived is not None:
            self._conclude_late(*arrived)  # first, since it may say that this step is to be clipped
        if self.policy.clips:
            self.fault_tracker.clip_response.act(number)
        device_skip.apply_on_device(evaluation, optimizer, clipping=self._is_clipping)
        # Waiting for this step is unavoidable if there is no report yet, or if a fused optimizer has no state yet:
        # it cannot skip on the device then.
        must_wait = self.report is None or device_skip.has_new_momentum(optimizer)
        if (
            must_wait
            and (arrived := self._readback.take()) is not None
            and self._conclude_late(*arrived).skip
        ):
            self.tracker.drop_gradients()
        self.tracker.observe_zeroing()
        assert self.report is not None
        self._probe_sequence_if_stuck()
        return dataclasses.replace(self.report, skip=False)

    def _conclude_late(self, numbers: list[float], pending: PendingStep) -> Report:
        """Conclude a step that was taken already."""
        report = self._conclude(numbers, pending)
        if self._halt is not None:
            # The coming step is not taken, even if the halt is not an error and the optimizer is called.
            self.tracker.drop_gradients()
            device_skip.clear_found_inf(self.tracker.optimizer)
        self._raise_if_halted(pending.step)
        return report

    def _conclude(self, numbers: list[float], pending: PendingStep) -> Report:
        """Turn a step's numbers into its report."""
        record = unpack(numbers, pending, self._parts, self._results)
        if (summary := self.tracker.graph_summary) is not None and summary.problems:
            record = add_ownership(record, summary.problems)
        # With lag=1 the newest decision so far, on the step before, said whether it is in force at this one.
        clipping = self._is_clipping if self.lag or not self.policy.clips else None
        decision = self.fault_tracker.decide(
            pending.step,
            record,
            has_loss=pending.has_loss,
            scaled=pending.scaled,
            clipping=clipping,
        )
        self.record = record = decision.record
        decision = decision._replace(report=name_idle(decision.report, summary, self.tracker.reached))
        report = self.report = decision.report
        self.tracker.probe_inputs(record.norms)
        self._halt = decision.halt
        layout = pending.evaluation.stats.layout
        if layout.names != self._history.names:
            self._history = history_of(layout, self._history.steps)
        self._history.add(report)
        if record.finite:
            self._last_finite, self._results = record, record.results
        self.counts["judged"] += 1
        self.counts["clipped"] += record.clipped and not report.skip
        self.counts["skipped"] += report.skip
        self.counts["nonfinite"] += not record.finite
        self.tracker.count_carried(record.carried)
        if record.finite:
            self.tracker.schedule.observe(self._shown(record, report, pending))
        self._findings.extend(report.findings)
        self._warn_of_problems(record, pending.context)
        if report.findings:
            self._explain(decision, record, pending)
        return report

    def _shown(self, record: StepRecord, report: Report, pending: PendingStep) -> Shown:
        """Return what a step shows to the sampling schedule."""
        lasting = [result for result in record.results if not result.event]
        tracker = self.fault_tracker
        return Shown(
            full=pending.evaluation.stats.elapsed > 0,
            norm=record.total_norm,
            baseline=record.baseline_norm,
            update=record.update_ratio,
            tilt=record.tilt,
            loss_start=record.loss_start,
            loss=record.loss_mean,
            flags=tuple([flag for result in lasting for flag in (result.raised, result.near)]),
            is_pending=any(r.near for r in lasting) or tracker.steps_until_change(lasting) < math.inf,
            is_present=bool(tracker.active),
            has_exploded=tracker.has_exploded,
            has_news=any(finding.fault != Fault.SPIKE for finding in report.findings),
            silent=len(pending.evaluation.stats.layout.names) - sum(map(bool, record.norms.values())),
        )

    @property
    def _is_clipping(self) -> bool:
        """True if the clipper is in force, as far as is known."""
        return self.clipper is not None and (
            not self.policy.clips or self.fault_tracker.clip_response.in_force
        )

    @property
    def problems(self) -> tuple[GraphProblem, ...]:
        """Mistakes in the autograd graph that were warned of."""
        return tuple(self._warned_of.values())

    def _warn_of_problems(self, record: StepRecord, context: StepContext) -> None:
        """Warn once of each mistake that the autograd graph shows.

        A mistake that is not certain is reported only while the loss makes no progress.
        """
        summary = self.tracker.graph_summary
        for problem in () if summary is None else summary.problems:
            no_progress = (
                self.fault_tracker.judged >= WARM_UP + 5 and record.loss_mean > 0.9 * record.loss_start
            )
            if (
                problem.kind in OWNERSHIP
                and problem.certain
                and disconnected_index(record.results) is not None
            ):
                continue  # a finding says it
            if problem.kind not in self._warned_of and (problem.certain or no_progress):
                from lightning_gradguard.diagnosis.diagnose import describe_problem

                self._warned_of[problem.kind] = problem
                if problem not in context.problems:
                    warn(describe_problem(problem, context.batch))

    def _explain(self, decision: Decision, record: StepRecord, pending: PendingStep) -> None:
        """Warn of new findings, and diagnose the gravest."""
        # Imported only when something is found: most runs never need it.
        from lightning_gradguard.diagnosis.diagnose import describe

        critical = [f for f in decision.report.findings if f.severity == Severity.CRITICAL]
        to_diagnose = decision.halt or (critical[0] if critical else None)
        gravest: Diagnosis | None = None
        for finding in decision.messages:
            if finding is decision.halt:
                continue
            origin, diagnosis = None, None
            first = self._origin is None
            if finding.fault == Fault.NONFINITE:
                # The first one of a run is replayed; of later ones only the batch is searched.
                origin = self._trace(record, pending.context, replay=first)
            if first or finding.fault != Fault.NONFINITE:
                run_trials = finding is to_diagnose and pending.context.run_trials
                diagnosis = self._diagnose(finding, record, pending, origin, run_trials=run_trials)
                self._keep(diagnosis, finding)
                gravest = diagnosis if finding is to_diagnose else gravest
            try:
                since = self.fault_tracker.clip_response.since
                message = describe(
                    finding, origin, self.policy, decision.report, diagnosis, clipped_since=since
                )
            except Exception:  # a warning must never end a training
                message = str(finding)
            warn(f"{message}\nThese are gradients of {self.title}." if self.title else message)
        if to_diagnose is not None:
            context = pending.context
            origin = None
            if to_diagnose.fault == Fault.NONFINITE:
                origin = self._trace(record, context, replay=True)
            if gravest is None:
                gravest = self._diagnose(to_diagnose, record, pending, origin, run_trials=context.run_trials)
            # Last, so that of several critical findings this one's is kept.
            self._keep(gravest, to_diagnose, halts=decision.halt is not None)

    def _keep(self, diagnosis: Diagnosis, finding: Finding, *, halts: bool = False) -> None:
        """Keep a diagnosis, unless one of something graver is there.

        A spike is over with its step, so any other fault is graver. Of two warnings the fault that explains the other
        one away is kept. The diagnosis of a halt is always kept, since the halt carries it.
        """
        rank = 2 * finding.severity - (finding.fault == Fault.SPIKE)
        kept = self.diagnosis
        explained = (
            kept is not None
            and finding.severity == Severity.WARNING
            and rank == self._diagnosed
            and kept.fault.precedence < finding.fault.precedence
        )
        if halts or (rank >= self._diagnosed and not explained):
            self.diagnosis, self._diagnosed = diagnosis, rank

    def _trace(self, record: StepRecord, context: StepContext, *, replay: bool) -> Origin | None:
        """Find the source of a non-finite value, or None."""
        from lightning_gradguard.diagnosis.diagnose import trace_nonfinite

        try:
            origin = trace_nonfinite(context, record.loss_scale, replay=replay)
        except Exception:  # a warning must never end a training
            return None
        self._origin = origin or self._origin
        return origin

    def _diagnose(
        self,
        finding: Finding,
        record: StepRecord,
        pending: PendingStep,
        origin: Origin | None,
        run_trials: bool = False,
    ) -> Diagnosis:
        """Diagnose a finding; minimally if that fails.

        Diagnosing must never end a training.
        """
        from lightning_gradguard.diagnosis.diagnose import GuardFacts, diagnose, undiagnosed

        context, graph = pending.context, self.tracker.graph_summary
        if graph is not None and context.problems:
            graph = dataclasses.replace(graph, problems=(*graph.problems, *context.problems))
        try:
            facts = GuardFacts(
                stats=pending.evaluation.stats,
                record=record,
                last_finite=self._last_finite or record,
                findings=self.findings,
                history=self.history,
                layout=self.tracker.layout,
                initial_weights=self.tracker.initial_weights,
                graph_summary=graph,
                optimizer=self.tracker.optimizer,
                judged=self.counts["judged"],
                clipper=repr(self.clipper) if self._is_clipping else "",
                policy=repr(self.policy),
                rates=self.tracker.rates,
            )
            return diagnose(facts, finding, dataclasses.replace(context, run_trials=run_trials), origin)
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            problem = f"the causes could not be examined ({type(error).__name__}: {reason})"
            warn(problem)
            return undiagnosed(finding, problem, context.notes)

    def _finalize(self, thresholds: Sequence[float]) -> None:
        """Complete deferred steps, whose thresholds have been read."""
        self._add_to_history(self.fast_path.finalize(thresholds))

    def _add_to_history(self, steps: Iterable[tuple[Report, array[float]]]) -> None:
        for report, norms in steps:
            self._history.add(report, norms)

    def _raise_if_halted(self, step: int) -> None:
        if self._halt is not None:
            assert self.diagnosis is not None
            raise GradientHalt(self.diagnosis, self.findings, step)

    def _probe_sequence_if_stuck(self) -> None:
        """Probe gradients over time if the loss makes no progress."""
        schedule = self.tracker.schedule
        if schedule.good > WARM_UP and schedule.is_stuck:
            self.tracker.probe_sequence()

    def _restore(self, state: Mapping[str, Any]) -> None:
        tracker = self.tracker
        tracker.load_state_dict(state["watch"])
        self.fault_tracker.load_state_dict(state["judge"])
        self.steps, self.counts = state["steps"], dict(state["counts"])
        self._results = [DetectorResult.from_plain(result) for result in state["sights"]]
        self.fast_path.load_state_dict(state["quiet"], tracker.layout.numel.device)
        self._state = None
        if state["states"] is not None:
            # Only shapes matter here: nothing is read, and with sharded tensors no rank waits for another.
            nothing = tracker.weights.new_zeros(len(tracker.weights))
            gradients = (None,) * len(nothing)
            stats = stats_of(tracker.layout, gradients, nothing, tracker.weights, tracker.updates, None)
            self._state = from_plain(state["states"], init_state(stats, self._parts))
        self._readback = Readback(self.lag)
        if self.lag:
            saved = state.get("under_way", ())
            restore_under_way(self._readback, saved, tracker.layout, tracker.weights, tracker.updates)
            for packed, pending in self._readback.under_way():
                unpack(read(packed), pending, self._parts, self._results)  # raises if it does not fit

    def _kinds(self) -> list[str]:
        """Return class names that a saved state must share."""
        parts = [*self.detectors, *([] if self.clipper is None else [self.clipper])]
        return [type(part).__name__ for part in parts]
