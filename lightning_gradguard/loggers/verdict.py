"""The verdict on a run: how it ended, and what happened.

Only this module words a verdict. The heat map, the HTML page and the command line show it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gradguard.charts import elide
from lightning_gradguard.loggers.status import TERMS, Course, End, LoggedFinding, Status
from lightning_gradguard.results import Fault, Severity

#: Level to its mark, from bad to good. Plain characters that matplotlib's font has and that no system shows as emoji.
MARKS = {
    "critical": "\u2717",
    "warning": "\u25b2",
    "protected": "\u25c6",
    "healthy": "\u2713",
    "unjudged": "?",
}

#: Faults in a few words, while they last and when they are over.
_WORDS = {
    Fault.NONFINITE.value: ("gradients or loss are NaN or Inf", "gradients or loss were NaN or Inf"),
    Fault.UNDERFLOW.value: ("gradients underflow", "gradients underflowed"),
    Fault.DISCONNECTED.value: ("layers are not trained", "layers were not trained"),
    Fault.DEAD.value: ("units are dead", "units were dead"),
    Fault.VANISHING.value: ("gradients vanish", "gradients vanished"),
    Fault.VANISHING_IN_TIME.value: ("gradients vanish in time", "gradients vanished in time"),
    Fault.EXPLODING.value: ("gradients explode", "gradients exploded"),
    Fault.SPIKE.value: ("gradients spiked", "gradients spiked"),
    Fault.OVERSIZED_UPDATE.value: ("updates are too large", "updates were too large"),
    Fault.STALLED.value: ("weights hardly change", "weights hardly changed"),
}
#: Faults beside the main one that are named.
_OTHERS = 3


@dataclass(frozen=True)
class Verdict:
    """Verdict on the steps of one optimizer.

    The level is

    - ``critical`` if the run was halted, or a critical fault lasts that is not being clipped,
    - ``warning`` if a fault lasts, an event was neither skipped nor clipped, an error ended the run, a mistake in the
      code was named, or most steps were skipped,
    - ``protected`` if faults were found, and each was skipped, clipped, rolled back, or is over,
    - ``healthy`` if there was no warning,
    - ``unjudged`` if no `GradGuard` judged the run.

    Attributes:
        level: The level.
        ended: How the run ended, such as "Halted before step 75".
        state: What is the matter, or that nothing is, such as "gradients vanish".
        since: Since when, such as "since step 29"; may be empty.
        where: Names of the worst tensors; may be empty.
        notes: What else happened, in clauses.
        finding: The finding that ``state`` rests on, or None.
    """

    level: str
    ended: str
    state: str = ""
    since: str = ""
    where: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    finding: LoggedFinding | None = None

    @property
    def title(self) -> str:
        """Ending and state."""
        return f"{self.ended}: {self.state}" if self.state else self.ended

    @property
    def terms(self) -> str:
        """Explanation of the terms in the finding's evidence; may be empty."""
        return "" if self.finding is None else TERMS.get(self.finding.fault, "")

    def detail(self, room: int = 0) -> str:
        """Return since when, where, and what else.

        Args:
            room: Characters for the name of the worst tensor, which is shortened to them; 0 for all of it.
        """
        name = self.where[0] if self.where else ""
        worst = f"worst in {elide(name, room) if room else name}" if name else ""
        main = ", ".join(filter(None, [self.since, worst]))
        return "; ".join(filter(None, [main, *self.notes]))

    def __str__(self) -> str:
        """Return all in one sentence."""
        rest = self.detail()
        return f"{self.title}{', ' if self.since else '; ' if rest else ''}{rest}."


#: Verdict on a run without a `GradGuard`.
UNJUDGED = Verdict("unjudged", "Not judged", notes=("no GradGuard watched this run",))


def verdict_of(status: Status, *, live: bool = False) -> Verdict:
    """Return the verdict.

    Args:
        status: What it rests on.
        live: The run itself asks, so that one without an end goes on.
    """
    found = sorted((c for c in status.courses if c.worst.severity >= Severity.WARNING), key=lambda c: c.rank)
    left = [course for course in found if course.is_left]
    taken = [course for course in found if course.is_event and _was_taken(course)]
    end, main = status.end, next(iter([*left, *taken]), None)
    is_halted = end is not None and end.how in (End.HALTED, End.STOPPED)
    if end is not None and is_halted and end.optimizer == status.optimizer:
        main = next((course for course in found if course.worst.fault == end.fault), None)
        state = _words(end.fault)
        level = "critical"
    elif main is not None:
        state = _words(main.worst.fault)
        unclipped = (c.worst.severity for c in left if c.worst.fault not in status.clipped_for)
        level = "critical" if max(unclipped, default=Severity.INFO) == Severity.CRITICAL else "warning"
    else:
        state, level = _peaceful(status, found)
        if is_halted:  # for another optimizer
            state = f"optimizer {status.optimizer} was {state}"
    if end is not None and end.how == End.ERROR and level != "critical":
        level = "warning"
    others = [_other(course) for course in found if course is not main][:_OTHERS]
    counts = _counts(status)
    # What was done is the point where nothing is left, else what is left.
    notes = [*_halt_of_another(status), *(others + counts if main is not None else counts + others)]
    return Verdict(
        level,
        _ended(status, live),
        state,
        "" if main is None else _when(main, status),
        () if main is None else tuple(filter(None, main.worst.parameters)),
        tuple(filter(None, notes)),
        None if main is None else main.worst,
    )


def _words(fault: str, *, over: bool = False) -> str:
    words = _WORDS.get(fault)
    return words[over] if words else f"custom fault {fault.replace('_', ' ')}"


def _peaceful(status: Status, found: list[Course]) -> tuple[str, str]:
    """Return state and level where no fault is left."""
    if status.mistaken:
        return "a mistake in the code", "warning"
    if 2 * status.skipped > status.steps > 0 and not _is_scaling(status):
        return "most steps were skipped", "warning"
    if (status.skipped and not _is_scaling(status)) or status.rollbacks or any(c.is_event for c in found):
        return "protected", "protected"
    return ("recovered", "protected") if found else ("healthy", "healthy")


def _is_scaling(status: Status) -> bool:
    """Return True if only a gradient scaler had steps skipped."""
    of = [c.worst.severity for c in status.courses if c.worst.fault == Fault.NONFINITE]
    return of == [Severity.INFO] and status.skipped == status.nonfinite


def _ended(status: Status, live: bool) -> str:
    end = status.end
    if end is None:
        if live:
            return f"Step {status.step:,} so far"
        if status.is_known:
            return f"No end recorded at step {status.step:,} (still running, or killed)"
        return f"Up to step {status.step:,}"
    return {
        End.FINISHED: "Finished",
        End.HALTED: f"Halted before step {end.step:,}",
        End.STOPPED: f"Stopped before step {end.step:,}",
        End.ERROR: f"Ended by an error ({end.error}) at step {end.step:,}",
        End.INTERRUPTED: f"Interrupted at step {end.step:,}",
    }[end.how]


def _when(course: Course, status: Status) -> str:
    """Return when the main fault occurred, and what was done."""
    if course.is_left or not course.is_event:
        clipped = ", and clipped" if course.worst.fault in status.clipped_for else ""
        return f"since step {course.worst.step:,}{clipped}"
    return ", ".join(filter(None, [_times(course), _taken(course)]))


def _other(course: Course) -> str:
    """Return a fault beside the main one as a clause."""
    fault, since = course.worst.fault, course.worst.step
    if course.is_left:
        return f"{_words(fault)} since step {since:,}"
    if course.is_event:
        # The steps that were not finite are counted anyway.
        past = _words(fault, over=True)
        when = ", ".join(filter(None, [_times(course), _taken(course)]))
        return "" if fault == Fault.NONFINITE else f"{past} {when}"
    until = "" if course.until is None else f" to {max(since, course.until - 1):,}"
    return f"{_words(fault, over=True)} from step {since:,}{until}"


def _times(course: Course) -> str:
    if course.count == 1:
        return f"at step {course.first:,}"
    return f"at {course.count:,} steps"


def _was_taken(course: Course) -> bool:
    """Return True unless every step of an event was dealt with; older files do not tell."""
    # A step that is not finite is never taken.
    return course.worst.fault != Fault.NONFINITE and (course.lasts is None or course.taken > 0)


def _taken(course: Course) -> str:
    if course.lasts is None:
        return ""
    if not course.taken:
        return "clipped or skipped" if course.count == 1 else "all clipped or skipped"
    return "not clipped" if course.taken == course.count else f"{course.taken:,} of them not clipped"


def _halt_of_another(status: Status) -> list[str]:
    end = status.end
    if end is None or not end.fault or end.optimizer == status.optimizer:
        return []
    return [f"the reason is optimizer {end.optimizer}: {_words(end.fault)}"]


def _counts(status: Status) -> list[str]:
    """Return what was skipped, clipped and rolled back, in one clause."""
    others = status.skipped - status.nonfinite
    end = status.end
    if end is not None and end.how in (End.HALTED, End.STOPPED) and end.fault != Fault.NONFINITE:
        others -= end.optimizer == status.optimizer  # the step that was not taken
    parts: list[str] = []
    of = f" of {status.steps:,}" if status.steps else ""
    for count, what in (
        (status.nonfinite, "had NaN or Inf and {was} skipped"),
        (others, "{was} skipped"),
        (status.clipped, "{was} clipped"),
    ):
        if count > 0:
            steps = f"{of} steps" if of else " step" if count == 1 else " steps"
            verb = "was" if count == 1 else "were"
            full = f"{count:,}{steps} {what.format(was=verb)}"
            parts.append(full if not parts else f"{count:,} {what.format(was='').split()[-1]}")
    if status.rollbacks:
        parts.append(f"{status.rollbacks:,} rollback{'s' if status.rollbacks > 1 else ''}")
    if parts and status.nonfinite and _is_scaling(status):
        parts[0] += " by the gradient scaler"
    if not parts and status.steps and not status.courses:
        parts = [f"{status.steps:,} step{'' if status.steps == 1 else 's'}, none skipped"]
    return [", ".join(parts)] if parts else []
