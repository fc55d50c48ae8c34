"""Established truth of each case: ``truth.json`` beside each collection, written by ``establish.py``."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.zoo.case import Case
from lightning_gradguard import Fault

#: Path of the zoo's truth.
TRUTH = Path(__file__).with_name("truth.json")


@lru_cache
def truth(path: Path = TRUTH) -> dict[str, Any]:
    """Return a whole file: id of a case to its title, names, level, onset, and the results per seed."""
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def right_names(case: Case, seed: int, path: Path = TRUTH) -> tuple[Fault, ...]:
    """Return the faults that are right for a run.

    These are the case's own fault, and of its other names those that the run's facts support.

    Without an established truth, all names of the case are right.
    """
    entry = truth(path).get(case.id, {}).get("seeds", {}).get(str(seed))
    if entry is None:
        return case.names
    return tuple(
        name for name in case.names if name == case.fault or entry["borne_out"].get(name.value, False)
    )
