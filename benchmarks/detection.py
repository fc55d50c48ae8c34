"""Run all cases under our guard and under the rules of four rivals, and score their warnings.

    python benchmarks/detection.py --seeds 3 --jobs 2
    python benchmarks/detection.py --cases "V*,convolutional" --seeds 1
    python benchmarks/detection.py --held-out --seeds 2

Writes ``benchmarks/detection.md``, or ``held_out.md`` with ``--held-out``. A run of selected cases writes a
page only to ``--out``. The raw records go to ``runs/`` under the same name, for further work on the
detectors.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import held_out, zoo  # noqa: E402
from benchmarks.judging.tables import HELD_OUT, ZOO, report  # noqa: E402
from benchmarks.judging.watching import one_thread, watch  # noqa: E402
from benchmarks.zoo.case import select  # noqa: E402
from benchmarks.zoo.truth import TRUTH  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--held-out", action="store_true", help="run the held-out collection instead of the zoo"
    )
    parser.add_argument("--cases", default=None, help="comma-separated patterns of ids, titles or kin")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, one thread each")
    parser.add_argument("--out", type=Path, default=None, help="file to write the page to")
    parser.add_argument("--raw", type=Path, default=None, help="file for the raw records")
    parser.add_argument("--again", action="store_true", help="score existing raw records without new runs")
    options = parser.parse_args(arguments)
    collection, name = (held_out, "held_out") if options.held_out else (zoo, "detection")
    opening, truth = (HELD_OUT, held_out.TRUTH) if options.held_out else (ZOO, TRUTH)
    raw = options.raw or ROOT / "runs" / f"{name}.json"
    chosen = select(collection.CASES, options.cases)
    work = [(c.id, seed) for c in chosen for seed in range(options.seeds)]
    began = time.perf_counter()
    if options.again:
        ids = {c.id for c in chosen}
        runs = [run for run in json.loads(raw.read_text()) if run["case"] in ids]
    else:
        runs = run_all(work, options.jobs)
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(runs))
    page = report(chosen, runs, opening=opening, truth=truth)
    out = options.out or (ROOT / "benchmarks" / f"{name}.md" if options.cases is None else None)
    if out is not None:
        out.write_text(page)
    print(page)
    print(f"{len(runs)} runs in {time.perf_counter() - began:.0f} s; raw records in {raw}")
    return 0


def run_all(work: list[tuple[str, int]], jobs: int) -> list[dict[str, Any]]:
    """Run each (case id, seed) and return the records in that order."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        return list(pool.map(_job, work))


def _job(work: tuple[str, int]) -> dict[str, Any]:
    cases = {c.id: c for c in (*zoo.CASES, *held_out.CASES)}
    return watch(cases[work[0]], work[1])


if __name__ == "__main__":
    raise SystemExit(main())
