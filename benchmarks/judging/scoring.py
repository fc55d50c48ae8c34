"""From what was said in a run to whether it was right, and from runs to totals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.judging.peers import STANDS_FOR
from benchmarks.judging.watching import OURS
from benchmarks.zoo.case import Case
from benchmarks.zoo.truth import TRUTH, right_names
from lightning_gradguard import Fault

WARNING, CRITICAL = 1, 2


@dataclass(frozen=True)
class Score:
    """One rule set on one run.

    Attributes:
        sick: Whether the case is.
        alarmed: A warning of any fault at or after the onset. A spike does not count here, unless a spike is what is
            wrong.
        right_first: The first warning is right, and does not come before the onset. Of a rival's alarms at that step,
            any may be right; of ours, the first. Spikes are events and are passed over, unless a spike is what is
            wrong; an event must not have become critical.
        right: A right warning at some time.
        right_layer: One of the first three parameters of the first right warning is a culprit.
        delay: Steps from the onset to the first right warning.
        false_alarm: On a healthy run: a warning of anything, a single spike included; INFO is not a warning.
        first: The first warning that was counted, for tables; on a healthy run the first of all.
    """

    faulty: bool
    alarmed: bool = False
    right_first: bool = False
    right: bool = False
    right_layer: bool = False
    delay: int | None = None
    false_alarm: bool = False
    first: Mapping[str, Any] | None = None


def score(
    case: Case,
    alarms: list[dict[str, Any]],
    *,
    ours: bool,
    names: tuple[Fault, ...] | None = None,
    halted: str | None = None,
) -> Score:
    """Scores one rule set's alarms on one run, oldest first.

    Args:
        case: What was trained.
        alarms: Records as `benchmarks.judging.watching` keeps them.
        ours: They are our guard's, which is held to the letter.
        names: Faults that are a right answer; the case's when None.
        halted: The fault that training was halted for.
    """
    names = case.names if names is None else names
    warnings = [a for a in alarms if a["severity"] >= WARNING]
    if not case.faulty:
        return Score(False, false_alarm=bool(warnings), first=warnings[0] if warnings else None)
    if Fault.SPIKE not in names:
        warnings = [a for a in warnings if a["fault"] != Fault.SPIKE.value]
    right = [a for a in warnings if a["step"] >= case.onset and _is_right(names, a["fault"], ours)]
    first = warnings[0] if warnings else None
    at_first = (
        [] if first is None else [a for a in warnings if a["step"] == first["step"]][: 1 if ours else None]
    )
    right_first = any(a in right for a in at_first)
    if ours and case.kind == "event":
        right_first &= halted is None and all(a["severity"] < CRITICAL for a in right)
    return Score(
        True,
        alarmed=any(a["step"] >= case.onset for a in warnings),
        right_first=right_first,
        right=bool(right),
        right_layer=bool(right) and any(case.is_culprit(name) for name in right[0]["parameters"][:3]),
        delay=right[0]["step"] - case.onset if right else None,
        first=next((a for a in at_first if a in right), first),
    )


def _is_right(names: tuple[Fault, ...], fault: str, ours: bool) -> bool:
    named = Fault(fault)
    meant = (named,) if ours else STANDS_FOR.get(named, (named,))
    return any(name in names for name in meant)


@dataclass(frozen=True)
class Total:
    """A rule set over all runs; counts, and the median delay in steps."""

    faulty: int
    healthy: int
    alarmed: int
    right_first: int
    right: int
    right_layer: int
    false_alarms: int
    delay: float | None


def total(scores: Iterable[Score]) -> Total:
    """Adds up."""
    listed = list(scores)
    faulty, healthy = [s for s in listed if s.faulty], [s for s in listed if not s.faulty]
    delays = [s.delay for s in faulty if s.delay is not None]
    return Total(
        faulty=len(faulty),
        healthy=len(healthy),
        alarmed=sum(s.alarmed for s in faulty),
        right_first=sum(s.right_first for s in faulty),
        right=sum(s.right for s in faulty),
        right_layer=sum(s.right_layer for s in faulty),
        false_alarms=sum(s.false_alarm for s in healthy),
        delay=median(delays) if delays else None,
    )


def score_run(case: Case, run: Mapping[str, Any], truth: Path = TRUTH) -> dict[str, Score]:
    """Name of each rule set to its score on a run of `benchmarks.judging.watching.watch`, by the truth of that file."""
    names = right_names(case, run["seed"], truth)
    return {
        name: score(case, alarms, ours=name == OURS, names=names, halted=run["halted"])
        for name, alarms in run["alarms"].items()
    }
