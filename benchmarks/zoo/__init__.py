"""Faulty and healthy trainings whose truth is known; see ``case.py`` for the definition of a case."""

from __future__ import annotations

from benchmarks.zoo import (
    dead,
    disconnected,
    exploding,
    healthy_losses,
    healthy_nets,
    healthy_practice,
    healthy_schedules,
    healthy_sequences,
    in_time,
    nonfinite,
    saturation,
    stalled,
    updates,
    vanishing,
)
from benchmarks.zoo.case import Case

_FILES = (
    vanishing,
    saturation,
    in_time,
    dead,
    disconnected,
    exploding,
    nonfinite,
    updates,
    stalled,
    healthy_nets,
    healthy_practice,
    healthy_schedules,
    healthy_sequences,
    healthy_losses,
)

#: All cases, the faulty ones first.
CASES: tuple[Case, ...] = tuple(case for file in _FILES for case in file.CASES)


def case(id: str) -> Case:
    """Return the case with this id.

    Raises:
        KeyError: If no case has this id.
    """
    return {case.id: case for case in CASES}[id]
