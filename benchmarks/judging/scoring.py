"""Scores of alarms: from the alarms of a run to right or wrong, and from runs to totals."""

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
    """Score of one rule set on one run.

    Attributes:
        faulty: True if the case has a fault.
        alarmed: A warning of any fault at or after the onset. A spike counts only if the fault is a spike.
        right_first: The first warning is right and does not come before the onset. Of a rival's alarms at
            that step, any may be right; of ours, the first. Spikes are events and count only if the fault is
            a spike. An event must not have become critical.
        right: A right warning at any time.
        right_layer: One of the first three parameters of the first right warning is a culprit.
        delay: Steps from the onset to the first right warning.
        false_alarm: Any warning on a healthy run, a single spike included; INFO is not a warning.
        first: The first warning that counted, for the tables; on a healthy run the first of all.
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
    """Score one rule set's alarms on one run.

    Args:
        case: The case that was trained.
        alarms: Records as `benchmarks.judging.watching` keeps them, oldest first.
        ours: True for our guard, whose first alarm must be exactly right.
        names: Faults that count as right; those of the case when None.
        halted: The fault that halted training.
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
    """Totals of a rule set over all runs: counts, and the median delay in steps."""

    faulty: int
    healthy: int
    alarmed: int
    right_first: int
    right: int
    right_layer: int
    false_alarms: int
    delay: float | None


def total(scores: Iterable[Score]) -> Total:
    """Add up scores."""
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
    """Return the score of each rule set on a run of `watch`, by the truth in that file."""
    names = right_names(case, run["seed"], truth)
    return {
        name: score(case, alarms, ours=name == OURS, names=names, halted=run["halted"])
        for name, alarms in run["alarms"].items()
    }
