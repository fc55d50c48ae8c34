"""Runs the zoo under our guard and under the rules of four rivals, and writes what each of them saw.

    python benchmarks/detection.py --seeds 3 --jobs 2
    python benchmarks/detection.py --cases "V*,convolutional" --seeds 1

Writes ``benchmarks/detection.md`` (only when all cases were run, or to ``--out``) and, for further work on the
detectors, the raw records to ``runs/detection.json``.
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

from benchmarks.judging.tables import report  # noqa: E402
from benchmarks.judging.watching import one_thread, watch  # noqa: E402
from benchmarks.zoo import CASES, case  # noqa: E402
from benchmarks.zoo.case import select  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", default=None, help="patterns of ids, titles or kin, with commas between")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=None, help="where the page is written")
    parser.add_argument("--raw", type=Path, default=ROOT / "runs" / "detection.json", help="raw records")
    parser.add_argument("--again", action="store_true", help="score the raw records again, without a run")
    options = parser.parse_args(arguments)
    chosen = select(CASES, options.cases)
    work = [(c.id, seed) for c in chosen for seed in range(options.seeds)]
    began = time.perf_counter()
    if options.again:
        ids = {c.id for c in chosen}
        runs = [run for run in json.loads(options.raw.read_text()) if run["case"] in ids]
    else:
        runs = run_all(work, options.jobs)
        options.raw.parent.mkdir(parents=True, exist_ok=True)
        options.raw.write_text(json.dumps(runs))
    page = report(chosen, runs)
    out = options.out or (ROOT / "benchmarks" / "detection.md" if options.cases is None else None)
    if out is not None:
        out.write_text(page)
    print(page)
    print(f"{len(runs)} runs in {time.perf_counter() - began:.0f} s; raw records in {options.raw}")
    return 0


def run_all(work: list[tuple[str, int]], jobs: int) -> list[dict[str, Any]]:
    """Runs of (case id, seed), in the order given."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        return list(pool.map(_job, work))


def _job(work: tuple[str, int]) -> dict[str, Any]:
    return watch(case(work[0]), work[1])


if __name__ == "__main__":
    raise SystemExit(main())
