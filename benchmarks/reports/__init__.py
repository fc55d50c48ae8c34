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

#: All reports, by family.
CASES: tuple[Case, ...] = (
    *nonfinite.CASES,
    *plumbing.CASES,
    *losses.CASES,
    *starved.CASES,
    *divergent.CASES,
    *generative.CASES,
    *agents.CASES,
    *further.CASES,
    *second_blind.CASES,
    *third_blind.CASES,
)
