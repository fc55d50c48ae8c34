"""Public reports of failing trainings, rebuilt small, each with a cured twin.

Each module is a family. To add a report: write a `Case` in its family (see `case`), run ``establish.py`` for it, then
``public_reports.py --keep-first benchmarks/reports/first_sight.json`` before any rule is changed for it.
"""

from benchmarks.reports import (
    agents,
    divergent,
    further,
    generative,
    losses,
    nonfinite,
    plumbing,
    second_blind,
    starved,
    third_blind,
)
from benchmarks.reports.case import Case

#: All reports: those written beside the rules, and tens that were written without a look at them.
SETS: dict[str, tuple[Case, ...]] = {
    "R01 to R50": (
        *nonfinite.CASES,
        *plumbing.CASES,
        *losses.CASES,
        *starved.CASES,
        *divergent.CASES,
        *generative.CASES,
        *agents.CASES,
    ),
    "R51 to R60": further.CASES,
    "R61 to R70": second_blind.CASES,
    "R71 to R80": third_blind.CASES,
}
CASES: tuple[Case, ...] = tuple(case for cases in SETS.values() for case in cases)
