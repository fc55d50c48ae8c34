"""Ordinary trainings of models that others wrote and maintain, and a few of them broken.

The packages are optional: ``requirements.txt`` beside this file lists them with versions.
"""

from benchmarks.real import (
    broken,
    cells,
    forecasting,
    generative,
    graphs,
    language,
    perception,
    rewards,
    tabular,
)
from benchmarks.real.case import Model, select

HEALTHY: tuple[Model, ...] = (
    *language.HEALTHY,
    *graphs.HEALTHY,
    *generative.HEALTHY,
    *perception.HEALTHY,
    *forecasting.HEALTHY,
    *cells.HEALTHY,
    *rewards.HEALTHY,
    *tabular.HEALTHY,
)
BROKEN: tuple[Model, ...] = broken.BROKEN
CASES = (*HEALTHY, *BROKEN)

__all__ = ["BROKEN", "CASES", "HEALTHY", "Model", "select"]
