"""From readings to findings: onset, patience, hysteresis, precedence, and silence between messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lightning_gradguard.engine.readback import UNSEEN, DetectorResult, StepRecord
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import Fault, Finding, Report, Severity

#: Judged steps between two messages of the same fault and tensor.
SILENCE = 100

_UNSAID = -1


class Decision(NamedTuple):
    """What is found and what is to be done.

    Attributes:
        report: The step's report.
        messages: Those of its findings that are to be said now.
        halt: The finding to halt on, or to go back for, or None.
    """

    report: Report
    messages: tuple[Finding, ...]
    halt: Finding | None


@dataclass
class ActiveFault:
    """A condition that lasts: where it began, for how many steps it has been held, and what was said of it."""

    onset: int
    held: int = 0
    severity: int = _UNSAID


class FaultTracker:
    """Remembers, for one optimizer, which conditions are on.

    Args:
        policy: What is done about a finding.
        optimizer: Index written into the findings.
    """

    def __init__(self, policy: Policy, optimizer: int = 0) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.judged = 0
        self.skipped_in_a_row = 0
        self.episodes: dict[str, ActiveFault] = {}
        self._said: dict[str, int] = {}

    def judge(
        self, step: int, letter: StepRecord, *, has_loss: bool, scaled: bool, clipping: bool
    ) -> Decision:
        """Judges one step.

        Args:
            step: The step, as it is to be reported.
            letter: Its numbers.
            has_loss: The loss was given.
            scaled: A gradient scaler is in use, so that an overflow is its everyday business.
            clipping: A clipper is in use.
        """
        if letter.finite:
            sights = [s for s in letter.sights if has_loss or not s.needs_loss]
            findings, skip, halt = self._conditions(step, sights)
        else:
            lossy = has_loss and not math.isfinite(letter.loss)
            routine = scaled and not lossy and not letter.loss_scale < 1
            findings, skip, halt = self._nonfinite(step, letter, routine)
        if halt is not None and halt not in findings:
            findings.append(halt)
        skip = skip or halt is not None
        shortened = letter.clipped and letter.total_norm > 0
        scale = letter.clipped_norm / letter.total_norm if shortened else 1.0
        report = Report(
            step=step,
            loss=letter.loss if has_loss else None,
            total_norm=letter.total_norm,
            clipped_norm=0.0 if skip else letter.clipped_norm,
            threshold=letter.threshold if clipping else None,
            scale=0.0 if skip else scale,
            skip=skip,
            findings=tuple(findings),
            norms=letter.norms,
        )
        said = [f for f in findings if f.severity > Severity.INFO and self._may_say(f)]
        return Decision(report, tuple(said), halt)

    @property
    def is_raised(self) -> bool:
        """Whether a condition is on that was warned of."""
        return any(episode.severity >= Severity.WARNING for episode in self.episodes.values())

    def is_still(self, sights: Sequence[DetectorResult]) -> bool:
        """Whether judging the same sights again would find nothing, and change nothing.

        Not while one is raised whose response is "ignore", or that another explains: it may become the first.

        Args:
            sights: Of the newest judged step.
        """
        return all(self._is_still(sight) for sight in sights)

    def state_dict(self) -> dict[str, object]:
        """Plain types only."""
        return {
            "judged": self.judged,
            "skipped_in_a_row": self.skipped_in_a_row,
            "episodes": {name: [e.onset, e.held, e.severity] for name, e in self.episodes.items()},
            "said": dict(self._said),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restores what `state_dict` gave."""
        self.judged = state["judged"]  # type: ignore[assignment]
        self.skipped_in_a_row = state["skipped_in_a_row"]  # type: ignore[assignment]
        self.episodes = {name: ActiveFault(*values) for name, values in state["episodes"].items()}  # type: ignore[attr-defined]
        self._said = dict(state["said"])  # type: ignore[call-overload]

    def _nonfinite(
        self, step: int, letter: StepRecord, routine: bool
    ) -> tuple[list[Finding], bool, Finding | None]:
        """A step that is skipped in any case, and of which nothing else can be said."""
        response = self.policy.response(Fault.NONFINITE)
        sight = next((s for s in letter.sights if s.fault == Fault.NONFINITE), UNSEEN)
        if routine:
            return [self._finding(sight, step, Severity.INFO)], True, None
        if response == "ignore":
            return [], True, None
        episode = self.episodes.setdefault(Fault.NONFINITE.value, ActiveFault(step))
        finding = self._finding(sight, episode.onset, Severity.WARNING)
        halt = None
        if response == "halt":
            halt = _critical(finding)
        elif response in ("skip", "rollback"):
            halt = self._count_skip(finding)
        return [halt or finding], True, halt

    def _conditions(
        self, step: int, sights: list[DetectorResult]
    ) -> tuple[list[Finding], bool, Finding | None]:
        """New findings by precedence, whether the step is to be skipped, and the finding that halts."""
        self.judged += 1
        self.episodes.pop(Fault.NONFINITE.value, None)
        findings: list[Finding] = []
        wanted: Finding | None = None
        halt: Finding | None = None
        explained = False
        for sight in sorted(sights, key=lambda s: s.fault.precedence):
            response = self.policy.response(sight.fault)
            if response == "ignore" or sight.fault == Fault.NONFINITE:
                continue
            finding = self._event(sight, step) if sight.event else self._episode(sight, step, explained)
            if sight.raised and not sight.event and sight.fault != Fault.DISCONNECTED:
                # Of two conditions at once the later one is a consequence; a missing path explains nothing else.
                explained = True
            if finding is not None:
                findings.append(finding)
                if response in ("halt", "rollback") and finding.severity == Severity.CRITICAL:
                    halt = halt or finding
            if response == "skip" and sight.raised:
                wanted = wanted or finding or self._finding(sight, step, Severity.WARNING)
        if wanted is None:
            self.skipped_in_a_row = 0
        else:
            halt = halt or self._count_skip(wanted)
        return findings, wanted is not None, halt

    def _event(self, sight: DetectorResult, step: int) -> Finding | None:
        return self._finding(sight, step, min(sight.ceiling, Severity.WARNING)) if sight.raised else None

    def _episode(self, sight: DetectorResult, step: int, explained: bool) -> Finding | None:
        """Follows a condition that lasts; a finding when it begins and when it becomes critical."""
        key = _key(sight)
        episode = self.episodes.get(key)
        if episode is None:
            if not sight.raised:
                return None
            episode = self.episodes[key] = ActiveFault(step)
        elif sight.cleared:
            del self.episodes[key]
            return None
        if explained:
            return None
        if episode.severity < Severity.WARNING <= sight.ceiling or episode.severity == _UNSAID:
            if not sight.raised:
                return None
            severity = min(sight.ceiling, Severity.WARNING if self.policy.patience else Severity.CRITICAL)
        else:
            # Capped, so that no step changes anything once it is as grave as it may be.
            episode.held = min(episode.held + sight.raised, self.policy.patience)
            if episode.severity != Severity.WARNING or episode.held < self.policy.patience:
                return None
            severity = sight.ceiling
        if severity <= episode.severity:
            return None
        episode.severity = int(severity)
        return self._finding(sight, episode.onset, severity)

    def _is_still(self, sight: DetectorResult) -> bool:
        episode = self.episodes.get(_key(sight))
        if not sight.raised or episode is None:
            return not sight.raised and episode is None
        lasted = episode.held >= self.policy.patience
        return not sight.event and lasted and episode.severity >= sight.ceiling

    def _count_skip(self, finding: Finding) -> Finding | None:
        """Counts a skipped step; the finding to halt on when there were too many in a row."""
        if self.skipped_in_a_row >= self.policy.max_consecutive_skips:
            return _critical(finding)
        self.skipped_in_a_row += 1
        return None

    def _may_say(self, finding: Finding) -> bool:
        """Whether silence since the last message of the same fault, severity and tensor is over."""
        key = f"{finding.fault.value}/{int(finding.severity)}/{finding.parameters[:1]}"
        last = self._said.get(key)
        if last is not None and self.judged - last < SILENCE:
            return False
        self._said = {k: at for k, at in self._said.items() if self.judged - at < SILENCE}
        self._said[key] = self.judged
        return True

    def _finding(self, sight: DetectorResult, step: int, severity: Severity) -> Finding:
        return Finding(
            fault=sight.fault,
            severity=severity,
            step=step,
            parameters=sight.parameters,
            value=sight.value,
            limit=sight.limit,
            detector=sight.detector,
            optimizer=self.optimizer,
            measure=sight.measure,
        )


def _key(sight: DetectorResult) -> str:
    return f"{sight.fault.value}/{sight.detector}"


def _critical(finding: Finding) -> Finding:
    return replace(finding, severity=Severity.CRITICAL)
