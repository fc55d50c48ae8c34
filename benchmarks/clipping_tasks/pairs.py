"""Comparisons of two arms that met the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

#: 97.5 % quantile of Student's t by degrees of freedom, from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Difference(NamedTuple):
    """Mean of a relative difference over seeds, with its 95 % confidence interval.

    Attributes:
        mean: (mine - other) / mean of other.
        half: Half the width of the interval, by Student's t over the paired seeds; inf with a single seed.
    """

    mean: float
    half: float

    @property
    def is_noise(self) -> bool:
        """True if the interval holds 0."""
        return abs(self.mean) <= self.half

    def __str__(self) -> str:
        half = "" if math.isinf(self.half) else f" ± {self.half:.1%}"
        return f"{self.mean:+.1%}{half}"


def difference(mine: Sequence[float], other: Sequence[float]) -> Difference:
    """Compare losses of the same seeds, in the same order."""
    base = statistics.fmean(other)
    each = [(a - b) / base for a, b in zip(mine, other, strict=True)]
    if len(each) < 2:
        return Difference(statistics.fmean(each), math.inf)
    t = _T[min(len(each) - 2, len(_T) - 1)]
    return Difference(statistics.fmean(each), t * statistics.stdev(each) / math.sqrt(len(each)))
