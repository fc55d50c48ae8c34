"""Shared parts of the files of cases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.zoo.training import Training
from lightning_gradguard import Fault

#: Other right names for gradients that start or become too large.
OVERFLOWS = (Fault.NONFINITE, Fault.OVERSIZED_UPDATE, Fault.DEAD)
DIVERGES = (Fault.EXPLODING, Fault.DEAD, Fault.NONFINITE)
#: Reason why they are right too.
SHOWS_ALL = "a diverging run shows them all"


def twins(make: Callable[..., Training]) -> dict[str, Any]:
    """Return a build and its fixed twin, from a recipe with a ``faulty`` switch."""
    return {"build": partial(make, faulty=True), "fixed": partial(make, faulty=False)}
