"""Train nine tasks under every clipper, over a sweep of learning rates, and compare the results.

    python benchmarks/clipping.py                       # in full: overnight on two cores
    python benchmarks/clipping.py --sample --out a.md   # two seeds, every other rate, half the tasks: ten minutes
    python benchmarks/clipping.py --long                # 5,000 steps, fine-tuning, and what it costs
    python benchmarks/clipping.py --again               # write the page from the records

Writes ``benchmarks/clipping.md`` and ``benchmarks/clipping.png``; with ``--out`` both go beside that path.
The raw records go to ``runs/clipping.jsonl``, each run as it ends; a run that is recorded is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.clipping_tasks import cost, long_runs  # noqa: E402
from benchmarks.clipping_tasks.accidents import REGIMES  # noqa: E402
from benchmarks.clipping_tasks.page import picture, report  # noqa: E402
from benchmarks.clipping_tasks.tasks import TASKS  # noqa: E402
from benchmarks.clipping_tasks.training import ARMS, BARE, Work, train  # noqa: E402

#: Seeds that nothing was developed on. Development used 100 to 102.
SEEDS = (200, 201, 202, 203, 204)
#: Tasks of a sample: each kind of optimizer, each kind of model.
SAMPLE = ("gru-adam", "mixer-adamw", "heavy-adam", "cnn-sgd", "heavy-sgd")
#: Rates of the NaN regime, which differs from the clean one by skipped steps only.
NAN_RATES = slice(2, 5)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, one thread each")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="number of seeds")
    parser.add_argument("--sample", action="store_true", help="run a part that takes ten minutes")
    parser.add_argument(
        "--quick", action="store_true", help="run a few steps of one rate and seed, for a quick check"
    )
    parser.add_argument("--long", action="store_true", help="run 5,000 steps, fine-tuning, and the cost")
    parser.add_argument("--again", action="store_true", help="write the page from the records")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "clipping.md")
    parser.add_argument("--raw", type=Path, help="file for the records")
    options = parser.parse_args(arguments)
    part = "quick" if options.quick else "sample" if options.sample else ""
    raw = options.raw or ROOT / "runs" / "-".join(filter(None, ("clipping", part)))
    arms, extras = raw.with_suffix(".jsonl"), raw.with_name(f"{raw.stem}-long.jsonl")
    if not options.again:
        began = time.perf_counter()
        if options.long:
            count = run_all(long_work(options.seeds, options.quick), options.jobs, extras)
            # One after the other, with nothing beside it.
            count += run_all(cost_work(options.quick), 1, extras)
        else:
            steps = 12 if options.quick else None
            jobs = [partial(train, one, steps) for one in work(part, options.seeds)]
            count = run_all(jobs, options.jobs, arms)
        print(f"{count} runs in {time.perf_counter() - began:.0f} s")
    runs = records(arms)
    if runs:
        more = records(extras)
        page = report(runs, list(filter(None, (long_runs.section(more), cost.section(more)))))
        options.out.write_text(page)
        picture(runs, options.out.with_suffix(".png"))
        print(page)
    return 0


def work(part: str, seeds: int) -> list[Work]:
    """Return the runs, seed after seed, so that a part of them makes a page of fewer seeds.

    Args:
        part: "" for all, "sample" or "quick".
        seeds: Number of seeds.
    """
    tasks = SAMPLE if part == "sample" else tuple(TASKS)
    count = {"": seeds, "sample": 2, "quick": 1}[part]

    def rates(task: str, regime: str) -> Sequence[float]:
        chosen = TASKS[task].rates[NAN_RATES if regime == "nan" else slice(None)]
        return chosen[:1] if part == "quick" else chosen[::2] if part == "sample" else chosen

    runs = [
        (task, arm, regime, rate, seed)
        for seed in SEEDS[:count]
        for task in tasks
        for regime in REGIMES
        for rate in rates(task, regime)
        for arm in ARMS
    ]
    bare = [
        (task, arm, "nan", TASKS[task].rates[2], SEEDS[0])
        for task in ("lm-adamw", "gru-adam")
        if task in tasks
        for arm in BARE
    ]
    return runs + bare


def long_work(seeds: int, quick: bool) -> list[Callable[[], dict[str, Any]]]:
    """Return the long runs and those of fine-tuning."""
    count, steps = (1, 2 * long_runs.PARTS) if quick else (min(seeds, 3), long_runs.STEPS)
    chosen = SEEDS[:count]
    jobs: list[Callable[[], dict[str, Any]]] = [
        partial(long_runs.fine_tuning, task, arm, seed, kept=kept)
        for task in long_runs.TUNED
        for kept in (True, False)
        for arm in long_runs.COMPARED
        for seed in chosen
    ]
    jobs += [
        partial(long_runs.long_run, task, arm, seed, steps)
        for seed in chosen
        for task in long_runs.LONG
        for arm in long_runs.COMPARED
    ]
    return jobs


def cost_work(quick: bool) -> list[Callable[[], dict[str, Any]]]:
    """Return the trainings in which arms take turns."""
    torch.set_num_threads(1)
    return [partial(cost.turns, title, 1 if quick else 12, quick=quick) for title in cost.SIZES]


def run_all(jobs: Sequence[Callable[[], dict[str, Any]]], processes: int, file: Path) -> int:
    """Run what is not recorded yet; record each run as it ends, and return their number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {run["job"] for run in records(file)}
    left = {name: job for job in jobs if (name := _name(job)) not in done}
    with file.open("a") as out:
        for name, run in zip(left, _results(list(left.values()), processes), strict=True):
            out.write(json.dumps({"job": name, **run}) + "\n")
            out.flush()
    return len(left)


def records(file: Path) -> list[dict[str, Any]]:
    """Return the recorded runs of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _results(jobs: list[Callable[[], dict[str, Any]]], processes: int) -> Iterator[dict[str, Any]]:
    if processes == 1:
        yield from (job() for job in jobs)
        return
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield from pool.map(_call, jobs)


def _call(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return job()


def _name(job: Any) -> str:
    return f"{job.func.__name__} {job.args} {sorted(job.keywords.items())}"


if __name__ == "__main__":
    raise SystemExit(main())
