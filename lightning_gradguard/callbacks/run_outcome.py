"""What comes of a training: what its guards have found, how it was halted, and who is told of a judged step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gradguard.callbacks.flight_recording import FlightRecording
from lightning_gradguard.callbacks.guard_registry import GuardRegistry
from lightning_gradguard.callbacks.rollback import Rollback
from lightning_gradguard.callbacks.run_logging import RunLogging
from lightning_gradguard.callbacks.run_summary import RunSummary
from lightning_gradguard.guard import KEPT_FINDINGS, Guard
from lightning_gradguard.results import Finding, GradientHalt, Report

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_gradguard.diagnosis.diagnosis import Diagnosis


class RunOutcome:
    """Makes what the guards of a training find, and a halt, the training's own.

    Args:
        recovery: Decides what becomes of a halt.
        recording: Leaves a flight record of it.
        display: Shows each judged step.

    Attributes:
        report: Of the newest judged step, or None.
        diagnosis: The newest, or None.
        stop_reason: After a halt, the fault's value.
        bundle: The flight record's file, or None.
        findings: What was found, oldest first; the newest 1,000.
    """

    def __init__(self, recovery: Rollback, recording: FlightRecording, display: RunLogging) -> None:
        self._recovery, self._recording, self._display = recovery, recording, display
        self._summary = RunSummary()
        self.start()

    def start(self) -> None:
        """A training begins."""
        self.report: Report | None = None
        self.diagnosis: Diagnosis | None = None
        self.stop_reason: str | None = None
        self.bundle: Path | None = None
        self.findings: deque[Finding] = deque(maxlen=KEPT_FINDINGS)
        self._summary.start()

    @contextmanager
    def following(self, guard: Guard, index: int) -> Iterator[None]:
        """Takes in what a guard judges meanwhile, and lets a halt pass that nothing is to be made of.

        Args:
            guard: What judges.
            index: Of its optimizer.

        Raises:
            GradientHalt: If training cannot go on.
        """
        before = guard.report
        try:
            yield
        except GradientHalt as halt:
            if not self._recovery.went_back(halt):
                self.stop_reason = halt.diagnosis.fault.value
                self.bundle = self._recording.halted(halt, index)
                if not self._recovery.ended(halt):
                    raise
        finally:
            if guard.report is not before and guard.report is not None:
                self._take(guard, guard.report, index)

    def stopped(self, error: BaseException) -> None:
        """Training ends with an error."""
        self.bundle = self._recording.stopped(error) or self.bundle

    def say(self, trainer: Trainer, guards: GuardRegistry) -> None:
        """Says at the end what came of the training."""
        self._summary.say(
            trainer,
            guards.made,
            rollbacks=self._recovery.count,
            stop_reason=self.stop_reason,
            bundle=self.bundle,
        )

    def state_dict(self) -> dict[str, Any]:
        """Rollbacks and pictures so far; plain types."""
        return {"recovery": self._recovery.state_dict(), "display": self._display.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave out of a larger state."""
        self._recovery.load_state_dict(state.pop("recovery", {}))
        self._display.load_state_dict(state.pop("display", {}))

    def _take(self, guard: Guard, report: Report, index: int) -> None:
        self.report = report
        self._recovery.heal(report)
        self.findings.extend(report.findings)
        news = guard.diagnosis if guard.diagnosis is not self.diagnosis else None
        self.diagnosis = news or self.diagnosis
        self._summary.add(report)
        self._display.observe(guard, index, news)
