"""The truth as it was established: ``truth.json`` beside each collection of cases, which ``establish.py`` writes."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.zoo.case import Case
from lightning_gradguard import Fault

#: Where the truth of the zoo is kept.
TRUTH = Path(__file__).with_name("truth.json")


@lru_cache
def truth(path: Path = TRUTH) -> dict[str, Any]:
    """A whole file: id of a case to its title, names, level, onset, and what was found for each seed."""
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def right_names(case: Case, seed: int, path: Path = TRUTH) -> tuple[Fault, ...]:
    """Faults that are a right answer for a run: the case's own, and of its others those that the run's facts bear out.

    Where nothing has been established, all of them.
    """
    entry = truth(path).get(case.id, {}).get("seeds", {}).get(str(seed))
    if entry is None:
        return case.names
    return tuple(
        name for name in case.names if name == case.fault or entry["borne_out"].get(name.value, False)
    )
