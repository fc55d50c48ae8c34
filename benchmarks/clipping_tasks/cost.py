"""Cost of clipping in a training, beside ``gradient_clip_val``, which writes the gradients at every step as well."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.clipping_tasks.page import table
from benchmarks.cost.measuring import Rounds
from benchmarks.cost.plan import LARGE, QUICK, SMALL
from benchmarks.cost.trainer_arms import BARE, CLIP, OURS, STEADY
from benchmarks.cost.turns import TURN, take_turns

#: Title to the size of a training.
SIZES = {"0.86 million parameters": SMALL, "3.4 million parameters": LARGE}


def turns(title: str, rounds: int, *, quick: bool) -> dict[str, Any]:
    """Time all arms in one training.

    Returns:
        ``seconds``: name of an arm to the mean seconds of a step in each of its turns.
    """
    size = next(iter(QUICK.turns.values()))[0] if quick else SIZES[title]
    with tempfile.TemporaryDirectory() as folder:
        found = take_turns((BARE, CLIP, OURS, STEADY), size, rounds, Path(folder), time.process_time)
    return {"kind": "cost", "title": title, "seconds": found.rounds.seconds, "findings": found.findings}


def section(runs: list[dict[str, Any]]) -> str:
    """Return the page's section on these runs; empty without any."""
    rows = []
    for run in (run for run in runs if run["kind"] == "cost"):
        rounds = Rounds(run["seconds"])
        rows += [
            [
                run["title"],
                arm,
                f"{1e3 * rounds.step(arm).median:.1f}",
                *(str(f"{rounds.ratio(arm, base).median:.3f}") for base in (CLIP, BARE)),
            ]
            for arm in run["seconds"]
        ]
    if not rows:
        return ""
    head = ["model", "arm", "ms a step", f"over `{CLIP}`", "over bare"]
    return (
        f"## What it costs\n\nOne `Trainer.fit` of a small transformer with AdamW, in which arms take turns of {TURN} "
        "steps, after each guard is past its first steps. Guards have their default detectors, histograms and "
        "pictures. Milliseconds are of the CPU; ratios are medians over rounds of one turn each.\n\n"
        + table(head, rows)
    )
