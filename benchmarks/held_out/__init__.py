"""A second collection, written by somebody who had seen neither the detectors nor their limits.

Its cases are like those of `benchmarks.zoo` in form only: nets, data and loops are their own. What was nearly the same
as a case of the zoo has been left out.
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

#: All cases, the sick ones first.
CASES: tuple[Case, ...] = tuple(case for file in _FILES for case in file.CASES)
#: Where their truth is kept.
TRUTH = Path(__file__).with_name("truth.json")


def case(id: str) -> Case:
    """The case of this id.

    Raises:
        KeyError: If there is none.
    """
    return {case.id: case for case in CASES}[id]
