"""Train all variants of each report without our product, and write their scores to ``truth.json``.

    python benchmarks/reports/establish.py --jobs 2
    python benchmarks/reports/establish.py --cases "R07,R12"

A case holds if its reported variant stays below its level (or ends in NaN) and its cured one reaches it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.judging.watching import one_thread
from benchmarks.reports import CASES
from benchmarks.reports.case import CURED, REPORTED
from benchmarks.reports.playing import TRUTH, read, score_of, write
from benchmarks.zoo.case import select


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return 1 if a case does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=None, help="comma-separated patterns of ids, titles or kin")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, one thread each")
    options = parser.parse_args(arguments)
    chosen = select(CASES, options.cases)
    work = [(c.id, variant, seed) for c in chosen for seed in range(options.seeds) for variant in c.variants]
    truth: dict[str, Any] = read(TRUTH)
    by_id = {case.id: case for case in CASES}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        for (id, variant, seed), (score, seconds) in zip(work, pool.map(_job, work), strict=True):
            case = by_id[id]
            entry = truth.setdefault(id, {})
            entry.update(title=case.title, level=case.level)
            own = entry.setdefault("seeds", {}).setdefault(str(seed), {})
            own[variant] = score if isinstance(score, str) else float(f"{score:.4g}")
            print(f"{id} {variant:12s} seed {seed}: {own[variant]} ({seconds:.0f} s)", flush=True)
    truth = {
        id: {
            **entry,
            "seeds": {
                seed: {variant: own[variant] for variant in by_id[id].variants if variant in own}
                for seed, own in entry["seeds"].items()
            },
        }
        for id, entry in truth.items()
        if id in by_id
    }
    write(TRUTH, truth)
    bad = [
        (id, own)
        for id in sorted({c.id for c in chosen})
        for own in truth[id]["seeds"].values()
        if not holds(own, truth[id]["level"])
    ]
    for id, own in bad:
        print(f"does not hold: {id}, level {truth[id]['level']}: {own}")
    return int(bool(bad))


def holds(scores: dict[str, Any], level: float) -> bool:
    """Return True if the reported variant stays below the level and the cured one reaches it."""
    return not float(scores[REPORTED]) >= level and float(scores[CURED]) >= level


def _job(work: tuple[str, str, int]) -> tuple[float | str, float]:
    id, variant, seed = work
    began = time.perf_counter()
    score = score_of(next(c for c in CASES if c.id == id), variant, seed)
    return score if math.isfinite(score) else str(score), time.perf_counter() - began


if __name__ == "__main__":
    raise SystemExit(main())
