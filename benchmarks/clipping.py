"""Train a small language model under every clipper and compare the results.

    python benchmarks/clipping.py --jobs 2
    python benchmarks/clipping.py --variants          # earlier variants of SpikeClip, on seeds of their own
    python benchmarks/clipping.py --quick --out page.md

Writes ``benchmarks/clipping.md`` and ``benchmarks/clipping.png``; with ``--out`` both go beside that path.
The raw records go to ``runs/clipping.json``.
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

import torch  # noqa: E402

from benchmarks.lm import tried  # noqa: E402
from benchmarks.lm.page import TRIED, picture, report  # noqa: E402
from benchmarks.lm.regimes import REGIMES  # noqa: E402
from benchmarks.lm.training import ARMS, BARE, RATES, STEPS, train  # noqa: E402

Work = tuple[str, str, float, int, int]
EVERY = {**ARMS, **BARE, **tried.VARIANTS}


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, one thread each")
    parser.add_argument(
        "--quick", action="store_true", help="run a few steps of one rate and seed, for a quick check"
    )
    parser.add_argument("--variants", action="store_true", help="run the earlier variants of SpikeClip")
    parser.add_argument("--again", action="store_true", help="write the page from existing raw records")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "clipping.md")
    parser.add_argument(
        "--raw", type=Path, default=ROOT / "runs" / "clipping.json", help="file for the raw records"
    )
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    kept = json.loads(options.raw.read_text()) if options.raw.exists() and not options.quick else {}
    part = "variants" if options.variants else "arms"
    if not options.again:
        runs = run_all(
            variants_work() if options.variants else work(options.seeds, options.quick), options.jobs
        )
        kept[part] = runs
        if not options.quick:
            options.raw.parent.mkdir(parents=True, exist_ok=True)
            options.raw.write_text(json.dumps(kept))
        print(f"{len(runs)} runs in {time.perf_counter() - began:.0f} s")
    if kept.get("variants"):
        TRIED.write_text(tried.section(kept["variants"]))
    if kept.get("arms"):
        page = report(kept["arms"])
        options.out.write_text(page)
        picture(kept["arms"], options.out.with_suffix(".png"))
        print(page)
    return 0


def work(seeds: int, quick: bool) -> list[Work]:
    """Return the runs: arm, regime, learning rate, seed, steps."""
    rates, steps = (RATES[:1], 12) if quick else (RATES, STEPS)
    runs = [
        (arm, regime, rate, seed, steps)
        for regime in REGIMES
        for rate in rates
        for arm in ARMS
        for seed in range(1 if quick else seeds)
    ]
    return runs + [(arm, "nan", RATES[0], 0, steps) for arm in BARE]


def variants_work() -> list[Work]:
    """Return the runs for the earlier variants of SpikeClip."""
    return [
        (name, regime, rate, seed, STEPS)
        for regime in tried.REGIMES
        for rate in tried.RATES
        for name in tried.VARIANTS
        for seed in tried.SEEDS
    ]


def run_all(runs: list[Work], jobs: int) -> list[dict[str, Any]]:
    """Execute the runs and return their records in that order."""
    if jobs == 1:
        return [_job(run) for run in runs]
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return list(pool.map(_job, runs))


def _job(run: Work) -> dict[str, Any]:
    arm, *rest = run
    return {"arm": arm, **train(EVERY[arm], *rest)}


if __name__ == "__main__":
    raise SystemExit(main())
