"""Turn detector results into findings.

Onset, patience, hysteresis, precedence, and silence between messages are decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lightning_gradguard.engine.clip_response import ClipResponse
from lightning_gradguard.engine.step_record import NONFINITE_STEP, DetectorResult, StepRecord
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import Fault, Finding, Report, Severity

#: Evaluated steps between two messages about the same fault and tensor.
SILENCE = 100

_UNREPORTED = -1


class Decision(NamedTuple):
    """Findings of a step, and what to do.

    Attributes:
        report: Report of the step.
        messages: Findings to warn of now.
        halt: The finding to halt on or to roll back for, or None.
        record: Numbers of the step, without a clip that is not in force.
    """

    report: Report
    messages: tuple[Finding, ...]
    halt: Finding | None
    record: StepRecord


@dataclass
class ActiveFault:
    """A lasting fault.

    Attributes:
        onset: Step at which it began.
        held: Further steps that it has lasted since its warning, at most the policy's patience.
        severity: Severity reported so far; -1 before the first report.
    """

    onset: int
    held: int = 0
    severity: int = _UNREPORTED


class FaultTracker:
    """Tracks the active faults of one optimizer.

    Args:
        policy: Responses, patience and the limit on skips.
        optimizer: Index written into findings.

    Attributes:
        judged: Steps judged so far that were finite.
        skipped_in_a_row: Steps skipped since the last one that was taken.
        active: Lasting faults by "fault/detector".
        clip_response: Where the policy responds with "clip".
    """

    def __init__(self, policy: Policy, optimizer: int = 0) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.judged = 0
        self.skipped_in_a_row = 0
        self.active: dict[str, ActiveFault] = {}
        self.clip_response = ClipResponse(policy.patience)
        self._last_message: dict[str, int] = {}

    @property
    def has_warned(self) -> bool:
        """True while a reported fault is active."""
        return any(fault.severity >= Severity.WARNING for fault in self.active.values())

    @property
    def lasting(self) -> frozenset[str]:
        """Values of the faults that were reported and last."""
        return frozenset(
            key.partition("/")[0]
            for key, fault in self.active.items()
            if fault.severity >= Severity.WARNING or key == Fault.NONFINITE.value
        )

    def decide(
        self, step: int, record: StepRecord, *, has_loss: bool, scaled: bool, clipping: bool | None
    ) -> Decision:
        """Decide on findings, skip and halt of a step.

        Args:
            step: Number of the step, for the report.
            record: Numbers of the step.
            has_loss: True if a loss was given.
            scaled: True if a gradient scaler is in use, so that an overflow under a finite loss is expected.
            clipping: True if a clipper is in force at this step, None if this decision says so.
        """
        if record.finite:
            results = [r for r in record.results if has_loss or not r.needs_loss]
            findings, skip, halt = self._decide_finite(step, results)
            if self.policy.clips:
                self.clip_response.follow(self._faults_to_clip(results))
        else:
            bad_loss = has_loss and not math.isfinite(record.loss)
            expected = scaled and not bad_loss and not record.loss_scale < 1
            findings, skip, halt = self._decide_nonfinite(step, record, expected)
        if halt is not None and halt not in findings:
            findings.append(halt)
        skip = skip or halt is not None
        if clipping is None:
            # A step that is not taken begins and ends no span.
            clipping = not skip and self.clip_response.act(step)
        if not clipping:
            record = record.unclipped()
        shortened = record.clipped and record.total_norm > 0
        scale = record.clipped_norm / record.total_norm if shortened else 1.0
        report = Report(
            step=step,
            loss=record.loss if has_loss else None,
            total_norm=record.total_norm,
            clipped_norm=0.0 if skip else record.clipped_norm,
            threshold=record.threshold if clipping else None,
            scale=0.0 if skip else scale,
            skip=skip,
            findings=tuple(findings),
            norms=record.norms,
        )
        messages = [f for f in findings if f.severity > Severity.INFO and self._may_report(f)]
        return Decision(report, tuple(messages), halt, record)

    def count_accepted(self, results: Iterable[DetectorResult], *, has_loss: bool) -> None:
        """Count a step that the fast path accepted, at which all results stand.

        Args:
            results: Those of the newest evaluated step.
            has_loss: True if the step came with a loss.
        """
        self.judged += 1
        if self.active:
            for active, result in self._held(results, has_loss):
                active.held = min(active.held + result.raised, self.policy.patience)

    def steps_until_change(self, results: Sequence[DetectorResult]) -> float:
        """Return how many further steps with these results change nothing; infinite if none ever does.

        Args:
            results: Those of the newest evaluated step.
        """
        most = math.inf
        for result in results:
            active = self.active.get(_key(result))
            if result.raised and (result.event or (active is None and self._is_followed(result))):
                return 0
        if self.active:
            for active, result in [*self._held(results, True), *self._held(results, False)]:
                if result.raised and active.severity < result.ceiling:
                    left = self.policy.patience - active.held - 1
                    most = min(most, max(0, left) if active.severity == Severity.WARNING else 0)
        return most

    @property
    def has_exploded(self) -> bool:
        """True while an explosion that was reported as critical is active."""
        return any(
            fault.severity == Severity.CRITICAL and key.startswith(f"{Fault.EXPLODING.value}/")
            for key, fault in self.active.items()
        )

    def _is_followed(self, result: DetectorResult) -> bool:
        return self.policy.response(result.fault) != "ignore" and result.fault != Fault.NONFINITE

    def _held(
        self, results: Iterable[DetectorResult], has_loss: bool
    ) -> Iterator[tuple[ActiveFault, DetectorResult]]:
        """Yield the active faults that no other explains, with their results."""
        explained = False
        for result in sorted(results, key=lambda r: r.fault.precedence):
            if result.event or not self._is_followed(result) or (result.needs_loss and not has_loss):
                continue
            active = self.active.get(_key(result))
            if active is not None and not (explained and not result.fault.is_custom):
                yield active, result
            explained |= _explains_others(result)

    def _faults_to_clip(self, results: Iterable[DetectorResult]) -> list[str]:
        """Return the faults present whose response is "clip".

        Args:
            results: Those that were decided on.
        """
        found = []
        for result in results:
            active = self.active.get(_key(result))
            # A lasting fault counts until it is cleared, also where it is not raised any more.
            is_found = active is not None and active.severity >= Severity.WARNING
            if (result.raised if result.event else is_found) and self.policy.response(result.fault) == "clip":
                found.append(result.fault.value)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types."""
        return {
            "judged": self.judged,
            "skipped_in_a_row": self.skipped_in_a_row,
            "episodes": {key: [f.onset, f.held, f.severity] for key, f in self.active.items()},
            "said": dict(self._last_message),
            "clip_response": self.clip_response.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.judged = state["judged"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.active = {key: ActiveFault(*values) for key, values in state["episodes"].items()}
        self._last_message = dict(state["said"])
        self.clip_response = ClipResponse(self.policy.patience)
        if self.policy.clips and "clip_response" in state:  # older versions did not save it
            self.clip_response.load_state_dict(state["clip_response"])

    def _decide_nonfinite(
        self, step: int, record: StepRecord, expected: bool
    ) -> tuple[list[Finding], bool, Finding | None]:
        """Decide on a non-finite step, which is always skipped."""
        response = self.policy.response(Fault.NONFINITE)
        result = next((r for r in record.results if r.fault == Fault.NONFINITE), NONFINITE_STEP)
        if expected:
            return [self._finding(result, step, Severity.INFO)], True, None
        if response == "ignore":
            return [], True, None
        active = self.active.setdefault(Fault.NONFINITE.value, ActiveFault(step))
        finding = self._finding(result, active.onset, Severity.WARNING)
        halt = None
        if response == "halt":
            halt = replace(finding, severity=Severity.CRITICAL)
        elif response in ("skip", "rollback"):
            halt = self._count_skip(finding)
        return [halt or finding], True, halt

    def _decide_finite(
        self, step: int, results: Sequence[DetectorResult]
    ) -> tuple[list[Finding], bool, Finding | None]:
        """Return findings by precedence, skip, and the halting finding."""
        self.judged += 1
        self.active.pop(Fault.NONFINITE.value, None)
        findings: list[Finding] = []
        skipped_for: Finding | None = None
        halt: Finding | None = None
        explained = False
        for result in sorted(results, key=lambda r: r.fault.precedence):
            if not self._is_followed(result):
                continue
            response = self.policy.response(result.fault)
            if result.event:
                severity = min(result.ceiling, Severity.WARNING)
                finding = self._finding(result, step, severity) if result.raised else None
            else:
                finding = self._follow(result, step, explained and not result.fault.is_custom)
                explained |= _explains_others(result)
            if finding is not None:
                findings.append(finding)
                if response in ("halt", "rollback") and finding.severity == Severity.CRITICAL:
                    halt = halt or finding
            if response == "skip" and result.raised:
                skipped_for = skipped_for or finding or self._finding(result, step, Severity.WARNING)
        if skipped_for is None:
            self.skipped_in_a_row = 0
        else:
            halt = halt or self._count_skip(skipped_for)
        return findings, skipped_for is not None, halt

    def _follow(self, result: DetectorResult, step: int, explained: bool) -> Finding | None:
        """Follow a lasting fault; report onset and critical state.

        Args:
            result: Of its detector.
            step: Number of the step.
            explained: True if an earlier fault explains this one, which is then followed but not reported.
        """
        key = _key(result)
        active = self.active.get(key)
        if active is None:
            if not result.raised:
                return None
            active = self.active[key] = ActiveFault(step)
        elif result.cleared:
            del self.active[key]
            return None
        if explained:
            return None
        if active.severity < Severity.WARNING <= result.ceiling or active.severity == _UNREPORTED:
            if not result.raised:
                return None
            severity = min(result.ceiling, Severity.WARNING if self.policy.patience else Severity.CRITICAL)
        else:
            # Capped, so that a fault which is as severe as it can be changes nothing from step to step.
            active.held = min(active.held + result.raised, self.policy.patience)
            if active.severity != Severity.WARNING or active.held < self.policy.patience:
                return None
            severity = result.ceiling
        if severity <= active.severity:
            return None
        active.severity = int(severity)
        return self._finding(result, active.onset, severity)

    def _count_skip(self, finding: Finding) -> Finding | None:
        """Count a skip; return the finding if too many in a row."""
        if self.skipped_in_a_row >= self.policy.max_consecutive_skips:
            return replace(finding, severity=Severity.CRITICAL)
        self.skipped_in_a_row += 1
        return None

    def _may_report(self, finding: Finding) -> bool:
        """Return True unless the same was reported shortly before."""
        key = f"{finding.fault.value}/{int(finding.severity)}/{finding.parameters[:1]}"
        last = self._last_message.get(key)
        if last is not None and self.judged - last < SILENCE:
            return False
        self._last_message = {k: at for k, at in self._last_message.items() if self.judged - at < SILENCE}
        self._last_message[key] = self.judged
        return True

    def _finding(self, result: DetectorResult, step: int, severity: Severity) -> Finding:
        return Finding(
            fault=result.fault,
            severity=severity,
            step=step,
            parameters=result.parameters,
            value=result.value,
            limit=result.limit,
            detector=result.detector,
            optimizer=self.optimizer,
            measure=result.measure,
        )


def has_warned(state: Mapping[str, Any]) -> bool:
    """Return `FaultTracker.has_warned` of a saved state.

    False for one that is damaged, which will not be restored.
    """
    try:
        saved = state.get("episodes", {}).values()
        return any(severity >= Severity.WARNING for _, _, severity in saved)
    except (AttributeError, TypeError, ValueError):
        return False


def _explains_others(result: DetectorResult) -> bool:
    """Return True if faults that come after this one are consequences of it.

    A missing path explains nothing else, and nothing is known of a custom fault.
    """
    return result.raised and result.fault != Fault.DISCONNECTED and not result.fault.is_custom


def _key(result: DetectorResult) -> str:
    return f"{result.fault.value}/{result.detector}"
