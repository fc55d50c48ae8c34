"""Comparison of `SpikeClip` variants: where they are run, and the table of results."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.lm.variants import Variant
from benchmarks.lm.words import TRIED
from lightning_gradguard import SpikeClip

#: Seeds that the rest of the page does not use, at a reasonable and at a high rate.
SEEDS, RATES, REGIMES = (10, 11), (3e-3, 1e-2), ("clean", "corrupt")

VARIANTS: dict[str, Any] = {
    "each tensor by itself; limit and learning by ZClip's rule": Variant(4.0, math.inf, "reciprocal", None),
    "learns 2.5 sigmas at most": Variant(4.0, math.inf, "reciprocal"),
    "... and judges all tensors jointly": Variant(response="reciprocal"),
    "... and cuts to the typical norm": Variant(),
    "... or below it, the more the further out": Variant(response="redescending"),
    "typical; level of the last 10 steps": Variant(level_decay=0.9),
    "the same at 6 and 4 sigmas": Variant(6.0, 4.0, level_decay=0.9),
    "sigma of the changes between steps; 7 and 4.5": Variant(7.0, 4.5, level_decay=0.9, differences=True),
    "... and outliers leave the sigmas alone": SpikeClip(7.0, 4.5),
    "... at 8 and 5": SpikeClip(8.0, 5.0),
    "... at 9 and 5: `SpikeClip()`": SpikeClip(),
}


def section(runs: list[dict[str, Any]]) -> str:
    """Return the section in Markdown."""
    columns = [(regime, rate) for regime in REGIMES for rate in RATES]
    lines = [
        ["form", *(f"{regime}, {rate:g}" for regime, rate in columns), "clean steps clipped"],
        ["---"] * (len(columns) + 2),
    ]
    for name in [name for name in VARIANTS if any(run["arm"] == name for run in runs)]:
        mine = [run for run in runs if run["arm"] == name]
        cells = []
        for regime, rate in columns:
            losses = [run["loss"] for run in mine if (run["regime"], run["rate"]) == (regime, rate)]
            cells.append(f"{statistics.fmean(losses):.3f} ± {statistics.stdev(losses):.3f}")
        clipped = statistics.fmean(run["clipped"] for run in mine if run["regime"] == "clean")
        lines.append([name, *cells, f"{clipped:.1%}"])
    return TRIED.format(table="\n".join("| " + " | ".join(line) + " |" for line in lines))
