"""Held-out collection, written by an author who had seen neither the detectors nor their limits.

Its cases share only the form of `benchmarks.zoo`: nets, data and loops are separate. Cases close to one of the zoo
were left out.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.held_out import (
    faulty_exploding,
    faulty_in_time,
    faulty_nonfinite,
    faulty_unfed,
    faulty_updates,
    faulty_vanishing,
    healthy_codes,
    healthy_generative,
    healthy_losses,
    healthy_nets,
    healthy_practice,
    healthy_rewards,
    healthy_sequences,
    healthy_tuning,
    healthy_vision,
)
from benchmarks.zoo.case import Case

_FILES = (
    faulty_nonfinite,
    faulty_unfed,
    faulty_vanishing,
    faulty_in_time,
    faulty_exploding,
    faulty_updates,
    healthy_nets,
    healthy_vision,
    healthy_sequences,
    healthy_practice,
    healthy_tuning,
    healthy_losses,
    healthy_codes,
    healthy_generative,
    healthy_rewards,
)

#: All cases, the faulty ones first.
CASES: tuple[Case, ...] = tuple(case for file in _FILES for case in file.CASES)
#: Path of their truth.
TRUTH = Path(__file__).with_name("truth.json")


def case(id: str) -> Case:
    """Return the case with this id.

    Raises:
        KeyError: If no case has this id.
    """
    return {case.id: case for case in CASES}[id]
