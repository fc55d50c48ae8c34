"""Train models of packages that others maintain, healthy and broken, and record what the guard says.

    pip install -r benchmarks/real/requirements.txt
    python benchmarks/real_models.py --seeds 2 --jobs 2
    python benchmarks/real_models.py --cases "forecasting,scvi-tools" --seeds 1

Each training runs under ``GradGuard(policy=Policy.strict(), trials=True)`` and, with its first seed, once without a
guard. Writes ``benchmarks/real.md``; a run of selected cases writes a page only to ``--out``. The raw records go to
``runs/real.json`` after each run; records of other runs stay there. Cases whose package is not installed are skipped
with a message.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import real  # noqa: E402
from benchmarks.real.page import page  # noqa: E402
from benchmarks.real.watching import one_thread, watch  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=None, help="comma-separated patterns of ids, packages or families")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, one thread each")
    parser.add_argument("--arms", choices=("both", "guarded", "bare"), default="both")
    parser.add_argument("--out", type=Path, default=None, help="file to write the page to")
    parser.add_argument(
        "--raw", type=Path, default=ROOT / "runs" / "real.json", help="file for the raw records"
    )
    parser.add_argument("--again", action="store_true", help="write the page from existing raw records")
    options = parser.parse_args(arguments)
    chosen = real.select(real.CASES, options.cases)
    present = [case for case in chosen if case.missing() is None]
    for case in chosen:
        if reason := case.missing():
            print(f"skipped: {reason}")
    began = time.perf_counter()
    work = []
    if not options.again and options.arms != "bare":
        work += [(case.id, seed, True) for case in present for seed in range(options.seeds)]
    if not options.again and options.arms != "guarded":
        work += [(case.id, 0, False) for case in present]
    store = Store(options.raw)
    for run in run_all(work, options.jobs):
        store.add(run)
        print(f"{run['case']}, seed {run['seed']}", file=sys.stderr, flush=True)
    ids = {case.id for case in chosen}
    runs = [run for run in store.runs if run["case"] in ids]
    text = page(chosen, runs)
    out = options.out or (ROOT / "benchmarks" / "real.md" if options.cases is None and present else None)
    if out is not None:
        out.write_text(text)
    print(text)
    print(f"{len(work)} runs in {time.perf_counter() - began:.0f} s; raw records in {options.raw}")
    return 0


class Store:
    """Raw records in a file, which is written after each run; a new record replaces the one of the same run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def add(self, run: dict[str, Any]) -> None:
        key = [run[name] for name in ("case", "seed", "strict")]
        self.runs = [r for r in self.runs if [r[name] for name in ("case", "seed", "strict")] != key]
        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.runs))


def run_all(work: Sequence[tuple[str, int, bool]], jobs: int) -> Iterator[dict[str, Any]]:
    """Run each (case id, seed, with a guard) and yield the records in that order."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        yield from pool.map(_job, work)


def _job(work: tuple[str, int, bool]) -> dict[str, Any]:
    cases = {case.id: case for case in real.CASES}
    return watch(cases[work[0]], work[1], strict=work[2])


if __name__ == "__main__":
    raise SystemExit(main())
