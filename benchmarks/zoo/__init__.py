"""Sick and healthy trainings whose truth is known; see ``case.py`` for what a case is."""

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

#: All cases, the sick ones first.
CASES: tuple[Case, ...] = tuple(case for file in _FILES for case in file.CASES)


def case(id: str) -> Case:
    """The case of this id.

    Raises:
        KeyError: If there is none.
    """
    return {case.id: case for case in CASES}[id]
