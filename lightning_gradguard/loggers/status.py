"""Findings as they are logged, and the status that a verdict rests on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from lightning_gradguard.results import ClipSpan, Fault, Finding, Report, Severity

#: Faults that are events: none of them lasts.
EVENTS = (Fault.NONFINITE.value, Fault.SPIKE.value)
#: Courses that are kept; there are more only with many custom faults.
_COURSES = 32
_PRECEDENCE = {fault.value: fault.precedence for fault in Fault}

_TILT = (
    "Depth tilt: by how many decades (factors of ten) gradients are smaller at the input than at the output. "
    "It is negative if they are larger."
)
#: Fault to an explanation of the terms in its evidence, in Markdown.
TERMS = {
    Fault.VANISHING.value: _TILT,
    Fault.EXPLODING.value: _TILT,
    Fault.VANISHING_IN_TIME.value: "A decade is a factor of ten.",
}


class LoggedFinding(NamedTuple):
    """Finding as checkpoints and event files hold it.

    Attributes:
        step: Step at which the condition began.
        fault: Name of the fault. A plain string, since the process that reads the file may not know a custom fault.
        severity: How serious it is.
        parameters: Names of the tensors concerned, worst first; may be empty.
        value: The number that the finding rests on.
        limit: The value at which the finding begins, same unit.
        measure: What ``value`` is, in words with a unit.
    """

    step: int
    fault: str
    severity: Severity
    parameters: tuple[str, ...]
    value: float
    limit: float
    measure: str

    @classmethod
    def of(cls, finding: Finding) -> LoggedFinding:
        """Return what is logged of a finding."""
        return cls(
            finding.step,
            finding.fault.value,
            finding.severity,
            tuple(finding.parameters),
            finding.value,
            finding.limit,
            finding.measure or finding.detector,
        )

    @property
    def measured(self) -> str:
        """Value and limit."""
        measure = self.measure[:1].upper() + self.measure[1:]
        return f"{measure}: {self.value:.3g} (limit {self.limit:.3g})"

    @property
    def evidence(self) -> str:
        """Value, limit and three worst tensors, in Markdown."""
        names = [f"`{name}`" for name in self.parameters[:3]]
        more = f" and {len(self.parameters) - 3} more" if len(self.parameters) > 3 else ""
        where = f", worst in {', '.join(names)}{more}" if names else ""
        return f"{self.measured}{where}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain types; non-finite numbers become strings."""
        numbers = {"value": self.value, "limit": self.limit}
        return {
            **self._asdict(),
            **{name: x if math.isfinite(x) else str(x) for name, x in numbers.items()},
            "severity": self.severity.name.lower(),
            "parameters": list(self.parameters),
        }

    @classmethod
    def from_dict(cls, parts: dict[str, Any]) -> LoggedFinding:
        """Return the finding that `to_dict` gave."""
        return cls(
            step=int(parts["step"]),
            fault=str(parts["fault"]),
            severity=Severity[parts["severity"].upper()],
            parameters=tuple(parts["parameters"]),
            value=float(parts["value"]),
            limit=float(parts["limit"]),
            measure=str(parts["measure"]),
        )


class End(str, Enum):
    """Ways in which a run ends."""

    FINISHED = "finished"
    HALTED = "halted"
    STOPPED = "stopped"
    ERROR = "error"
    INTERRUPTED = "interrupted"


class RunEnd(NamedTuple):
    """How a run ended.

    Attributes:
        how: The way.
        step: Step that was not taken if it was halted or stopped, else the steps taken.
        fault: Value of the fault that it was halted or stopped for; else empty.
        error: Name of the exception's type for `End.ERROR`; else empty.
        optimizer: Index of the optimizer whose step was not taken.
    """

    how: End
    step: int
    fault: str = ""
    error: str = ""
    optimizer: int = 0

    @classmethod
    def from_dict(cls, parts: Mapping[str, Any]) -> RunEnd:
        """Return the end with these fields, as JSON holds them."""
        how, step, fault, error, optimizer = (parts[name] for name in cls._fields)
        return cls(End(how), int(step), str(fault), str(error), int(optimizer))


@dataclass(frozen=True)
class Course:
    """Course of one fault in a run.

    Attributes:
        worst: The newest of its most severe findings.
        first: Step of the first.
        count: Steps at which it was found.
        taken: How many of these were taken as they were, neither skipped nor clipped.
        lasts: True while it lasts, False once it is over, None if that is not known.
        until: Step at which it was over; None if it lasts, is an event, or this is not known.
    """

    worst: LoggedFinding
    first: int
    count: int = 1
    taken: int = 0
    lasts: bool | None = None
    until: int | None = None

    @property
    def is_left(self) -> bool:
        """True if the fault lasts at the newest step, as far as is known."""
        if self.lasts is not None:
            return self.lasts
        # In older files only a halt makes an event critical, and nothing says that another fault was over.
        return self.worst.fault not in EVENTS or self.worst.severity == Severity.CRITICAL

    @property
    def is_event(self) -> bool:
        """True if it happened at single steps."""
        return not self.is_left and (self.until is None or self.worst.fault in EVENTS)

    @property
    def rank(self) -> tuple[Any, ...]:
        """Order of importance, smallest first."""
        fault = _PRECEDENCE.get(self.worst.fault, len(_PRECEDENCE))
        return (-self.worst.severity, not self.is_left, self.first, fault)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return {**vars(self), "worst": self.worst.to_dict()}

    @classmethod
    def from_dict(cls, parts: Mapping[str, Any]) -> Course:
        """Return the course that `to_dict` gave."""
        lasts, until = parts["lasts"], parts["until"]
        return cls(
            LoggedFinding.from_dict(parts["worst"]),
            int(parts["first"]),
            int(parts["count"]),
            int(parts["taken"]),
            None if lasts is None else bool(lasts),
            None if until is None else int(until),
        )


#: Counts of a `Status` that a `Tally` keeps.
_COUNTS = ("step", "steps", "nonfinite", "skipped", "clipped", "rollbacks")


@dataclass(frozen=True)
class Status:
    """Everything that a verdict on one optimizer's steps rests on.

    Attributes:
        step: The newest step that was judged.
        steps: Steps judged so far; 0 if not known.
        nonfinite: How many had NaN or Inf in gradients or loss, and were skipped.
        skipped: How many were not taken.
        clipped: How many were clipped.
        rollbacks: Rollbacks so far.
        courses: Of each fault that was found.
        clipped_for: Faults that have gradients clipped at the newest step.
        mistaken: True if a mistake in the code was named.
        left_out: Layers without a row in the heat map.
        optimizer: Index of the optimizer.
        end: How the run ended; None while it goes on, and if it was killed.
        is_known: True if ``end`` is meant; False in the files of older versions, which did not record it.
    """

    step: int = 0
    steps: int = 0
    nonfinite: int = 0
    skipped: int = 0
    clipped: int = 0
    rollbacks: int = 0
    courses: tuple[Course, ...] = ()
    clipped_for: tuple[str, ...] = ()
    mistaken: bool = False
    left_out: int = 0
    optimizer: int = 0
    end: RunEnd | None = None
    is_known: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        own = {name: value for name, value in vars(self).items() if name != "is_known"}
        end = None if self.end is None else self.end._asdict() | {"how": self.end.how.value}
        courses = [course.to_dict() for course in self.courses]
        return own | {"courses": courses, "clipped_for": list(self.clipped_for), "end": end}

    @classmethod
    def from_dict(cls, parts: Mapping[str, Any]) -> Status:
        """Return the status that `to_dict` gave."""
        end = parts["end"]
        counts: dict[str, Any] = {name: int(parts[name]) for name in (*_COUNTS, "left_out", "optimizer")}
        return cls(
            **counts,
            courses=tuple(map(Course.from_dict, parts["courses"])),
            clipped_for=tuple(map(str, parts["clipped_for"])),
            mistaken=bool(parts["mistaken"]),
            end=None if end is None else RunEnd.from_dict(end),
        )


class Tally:
    """Count of what happened at the steps of one optimizer.

    Args:
        optimizer: Index of the optimizer.
        left_out: Layers without a row in the heat map.
    """

    def __init__(self, optimizer: int = 0, left_out: int = 0) -> None:
        self._optimizer, self._left_out = optimizer, left_out
        self._courses: dict[str, Course] = {}
        self._counts: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
        self._clipped_for: tuple[str, ...] = ()
        self._mistaken = False

    def observe(
        self, report: Report, lasting: Collection[str] | None = None, rollbacks: int | None = None
    ) -> bool:
        """Add one step.

        Args:
            report: Its report.
            lasting: Faults that were warned of and last; None if not known.
            rollbacks: Rollbacks so far; None if not known.

        Returns:
            True if a fault began or was over.
        """
        counts, is_clipped = self._counts, report.scale < 1 and not report.skip
        is_bad = not math.isfinite(report.total_norm) or not math.isfinite(report.loss or 0)
        counts["step"] = report.step
        counts["steps"] += 1
        counts["nonfinite"] += is_bad and report.skip
        counts["skipped"] += report.skip
        counts["clipped"] += is_clipped
        counts["rollbacks"] = counts["rollbacks"] if rollbacks is None else rollbacks
        if not self._courses and not report.findings:
            return False
        before = {name: course.lasts for name, course in self._courses.items()}
        for finding in report.findings:
            self._add(finding, taken=not is_clipped and not report.skip, lasting=lasting)
        if lasting is not None:
            for name, course in self._courses.items():
                if course.lasts and name not in lasting:
                    until = None if name in EVENTS else report.step
                    self._courses[name] = replace(course, lasts=False, until=until)
        return before != {name: course.lasts for name, course in self._courses.items()}

    def add_mistake(self) -> None:
        """Add that a mistake in the code was named."""
        self._mistaken = True

    def show_clipping(self, spans: Sequence[ClipSpan]) -> None:
        """Set from when to when a fault had gradients clipped, oldest first."""
        self._clipped_for = spans[-1].faults if spans and spans[-1].last is None else ()

    def status(self, end: RunEnd | None = None) -> Status:
        """Return the status at the newest step.

        Args:
            end: How the run ended; None while it goes on.
        """
        return Status(
            **self._counts,
            courses=tuple(self._courses.values()),
            clipped_for=self._clipped_for,
            mistaken=self._mistaken,
            left_out=self._left_out,
            optimizer=self._optimizer,
            end=end,
        )

    def restore(self, status: Status) -> None:
        """Continue from a status of the same optimizer."""
        self._counts = {name: getattr(status, name) for name in _COUNTS}
        self._courses = {course.worst.fault: course for course in status.courses}
        self._mistaken = status.mistaken

    def _add(self, finding: Finding, *, taken: bool, lasting: Collection[str] | None) -> None:
        name, logged = finding.fault.value, LoggedFinding.of(finding)
        lasts = None if lasting is None else name in lasting
        course = self._courses.get(name)
        if course is None:
            if len(self._courses) < _COURSES:
                self._courses[name] = Course(logged, finding.step, 1, int(taken), lasts)
            return
        # A fault that comes back is as severe as it is now.
        is_worse = logged.severity >= course.worst.severity or (course.lasts is False and lasts is True)
        if course.lasts and lasts is False:
            lasts = True  # until `observe` notes that it is over
        self._courses[name] = replace(
            course,
            worst=logged if is_worse else course.worst,
            count=course.count + 1,
            taken=course.taken + taken,
            lasts=lasts,
            until=None if lasts else course.until,
        )
