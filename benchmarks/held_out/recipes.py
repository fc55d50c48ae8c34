"""What the files of cases share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.zoo.training import Training
from lightning_gradguard import Fault

#: Other names of what begins too large, and of what becomes too large.
OVERFLOWS = (Fault.NONFINITE, Fault.OVERSIZED_UPDATE, Fault.DEAD)
DIVERGES = (Fault.EXPLODING, Fault.DEAD, Fault.NONFINITE)
#: Why.
SHOWS_ALL = "a diverging run shows them all"


def twins(make: Callable[..., Training]) -> dict[str, Any]:
    """A build and its mended twin, of a recipe that is told which of them it is to make."""
    return {"build": partial(make, faulty=True), "fixed": partial(make, faulty=False)}
