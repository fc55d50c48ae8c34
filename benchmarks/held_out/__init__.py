"""A second collection, written by somebody who had seen neither the detectors nor their limits.

Its cases are like those of `benchmarks.zoo` in form only: nets, data and loops are their own. What was nearly the same
as a case of the zoo has been left out.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.held_out import (
    healthy_codes,
    healthy_generative,
    healthy_losses,
    healthy_nets,
    healthy_practice,
    healthy_rewards,
    healthy_sequences,
    healthy_tuning,
    healthy_vision,
    sick_exploding,
    sick_in_time,
    sick_nonfinite,
    sick_unfed,
    sick_updates,
    sick_vanishing,
)
from benchmarks.zoo.case import Case

_FILES = (
    sick_nonfinite,
    sick_unfed,
    sick_vanishing,
    sick_in_time,
    sick_exploding,
    sick_updates,
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
