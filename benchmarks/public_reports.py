"""Play public reports of failing trainings, and score what our guard and four rivals say of them.

    python benchmarks/public_reports.py --jobs 2
    python benchmarks/public_reports.py --cases "R07,recurrent" --text
    python benchmarks/public_reports.py --first-sight benchmarks/reports/first_sight.json

Writes ``benchmarks/reports.md``. A run of selected cases writes a page only to ``--out``. The raw records go to
``runs/reports.json``. The trainings are in ``benchmarks/reports/``; see `benchmarks.reports.case` for their form.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import reports  # noqa: E402
from benchmarks.judging.watching import OURS, one_thread  # noqa: E402
from benchmarks.reports.case import Case  # noqa: E402
from benchmarks.reports.playing import (  # noqa: E402
    FIRST_SIGHT,
    POINTS,
    TRUTH,
    Record,
    play,
    read,
    write,
)
from benchmarks.zoo.case import select  # noqa: E402

_TERMS = """\
# Public reports

Written by `python benchmarks/public_reports.py`; the trainings are in `benchmarks/reports/`, their scores without our
product in `reports/truth.json`, what was said at first sight in `reports/first_sight.json`.

{cases} failing trainings that people reported in public, each rebuilt small in our own code, seen to fail as reported,
and to learn with the fix that the thread arrived at (its *cured twin*). {seeds}. What an expert would say of each was
written down before the product was asked.

- **fault**: the first warning of `GradGuard()` names an acceptable fault; where no fault fits, a warning says it in
  words.
- **cause**: the first cause of the diagnosis of `GradGuard(policy=Policy.strict(), trials=True)` is acceptable; without
  a diagnosis, that of a warning or of the check-up.
- **fix**: the first fix is applied to the reported training, which then learns without a guard.
- **quiet**: on the cured twin, `Policy.strict()` with trials has no warning, no halt, and no word from the check-up.

The four rival rule sets see the same steps. They are right if one of their first alarms stands for an acceptable fault
(their classes are mapped as in `detection.md`), and quiet if they raise no alarm on the cured twin. They name no cause
and offer no fix.

*First sight* is the result on the rules as they were before any was changed for these reports. Since then rules have
been changed with these cases at hand, so that what they show *now* flatters. R01 to R50 were written beside the rules.
Each ten from R51 on were chosen and rebuilt by somebody who did not look at the rules, and were played for the first
time when the rules were finished for those before: their first sight is the figure to trust.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=None, help="comma-separated patterns of ids, titles or kin")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, one thread each")
    parser.add_argument("--out", type=Path, default=None, help="file to write the page to")
    parser.add_argument("--raw", type=Path, default=None, help="file for the raw records")
    parser.add_argument("--again", action="store_true", help="score existing raw records without new runs")
    parser.add_argument("--text", action="store_true", help="print what the guard says of each case")
    parser.add_argument(
        "--first-sight", type=Path, default=None, metavar="FILE", help="show stored first results and stop"
    )
    parser.add_argument(
        "--keep-first",
        type=Path,
        default=None,
        metavar="FILE",
        help="store the results of cases that the file lacks",
    )
    options = parser.parse_args(arguments)
    chosen = select(reports.CASES, options.cases)
    if options.first_sight is not None:
        print(first_sight_table(chosen, read(options.first_sight)))
        return 0
    raw = options.raw or ROOT / "runs" / "reports.json"
    began = time.perf_counter()
    if options.again:
        ids = {c.id for c in chosen}
        runs = [run for run in json.loads(raw.read_text()) if run["case"] in ids]
    else:
        runs = run_all([(c.id, seed) for c in chosen for seed in range(options.seeds)], options.jobs)
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.write_text(json.dumps(runs))
    if options.text:
        for run in runs:
            print(text_of(run))
    if options.keep_first is not None:
        kept = read(options.keep_first)
        write(options.keep_first, {**first_results(runs), **kept})
    page = report(chosen, runs, read(FIRST_SIGHT))
    out = options.out or (ROOT / "benchmarks" / "reports.md" if options.cases is None else None)
    if out is not None:
        out.write_text(page)
    print(page)
    print(f"{len(runs)} runs in {time.perf_counter() - began:.0f} s; raw records in {raw}")
    return 0


def run_all(work: list[tuple[str, int]], jobs: int) -> list[Record]:
    """Run each (case id, seed) and return the records in that order."""
    runs = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=one_thread) as pool:
        for run in pool.map(_job, work):
            points = " ".join(f"{k} {'yes' if v else 'NO':3s}" for k, v in run["points"].items())
            print(
                f"{run['case']} seed {run['seed']}: {points} | {(run['first'] or ['-'])[0]} | {run['cause'] or '-'}"
                f" | {run['remedy'] or '-'} -> {run['applied'] or '-'} {run['quality']}",
                flush=True,
            )
            runs.append(run)
    return runs


def _job(work: tuple[str, int]) -> Record:
    cases = {c.id: c for c in reports.CASES}
    return play(cases[work[0]], work[1], truth=read(TRUTH))


def first_results(runs: Sequence[Record]) -> dict[str, Any]:
    """Return what is kept of a first sight: by case, its points, what was said first, and the rivals' points."""
    kept: dict[str, Any] = {}
    for run in runs:
        if run["seed"] == 0:
            first = run["first"]
            kept[run["case"]] = {
                **run["points"],
                "said": {
                    "fault": None if first is None else first[0],
                    "step": None if first is None else first[1],
                    "cause": run["cause"] or None,
                    "fix": run["remedy"],
                    "applied": run["applied"] or None,
                },
            }
    return kept


def report(cases: Sequence[Case], runs: Sequence[Record], first_sight: Mapping[str, Any]) -> str:
    """Return the whole page."""
    seeds = len({run["seed"] for run in runs})
    return "\n".join(
        [
            _TERMS.format(cases=len(cases), seeds=f"{seeds} seed{'s' if seeds > 1 else ''} each"),
            "## All rule sets\n",
            _summary(cases, runs, first_sight),
            "## Case by case\n",
            _table(cases, runs, first_sight),
        ]
    )


def _summary(cases: Sequence[Case], runs: Sequence[Record], first_sight: Mapping[str, Any]) -> str:
    lines = [
        "| rules | fault | cause | first fix cures | twin quiet | all four |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in reports.SETS.items():
        ids = {case.id for case in group}
        seen = [first_sight[c.id] for c in cases if c.id in ids and c.id in first_sight]
        now = [run["points"] for run in runs if run["case"] in ids]
        if seen:
            lines.append(_total(f"**{OURS}**, {name}: first sight", seen))
        if now:
            lines.append(_total(f"{OURS}, {name}: now", now))
    for name in runs[0]["rivals"] if runs else ():
        points = [run["rivals"][name] for run in runs]
        fault, quiet = (_share(points, lambda p, key=key: p[key]) for key in ("fault", "quiet"))
        lines.append(f"| {name}, all | {fault} | - | - | {quiet} | - |")
    return "\n".join(lines) + "\n"


def _total(name: str, points: Sequence[Mapping[str, bool]]) -> str:
    each = [_share(points, lambda p, key=key: p[key]) for key in POINTS]
    return f"| {name} | {' | '.join(each)} | {_share(points, lambda p: all(p[k] for k in POINTS))} |"


def _share(points: Sequence[Any], test: Callable[[Any], bool]) -> str:
    count = sum(bool(test(p)) for p in points)
    return f"{count} / {len(points)}"


def _table(cases: Sequence[Case], runs: Sequence[Record], first_sight: Mapping[str, Any]) -> str:
    """One row a case. A point is the number of seeds where it was made."""
    lines = [
        "| | what is wrong | reported at | first warning | first cause | first fix "
        "| fault | cause | fix | quiet | first sight |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        own = [run for run in runs if run["case"] == case.id]
        if not own:
            continue
        first, cause, fix = (
            " · ".join(dict.fromkeys(str(get(run) or "-").replace("|", "/") for run in own))
            for get in (lambda r: (r["first"] or [None])[0], lambda r: r["cause"], lambda r: r["remedy"])
        )
        points = " | ".join(_point([run["points"][key] for run in own]) for key in POINTS)
        sight = first_sight.get(case.id)
        seen = "-" if sight is None else "".join(_mark(sight[key]) for key in POINTS)
        lines.append(
            f"| {case.id} | {case.title} | {case.address} | {first} | {cause} | {fix} | {points} | {seen} |"
        )
    return "\n".join(lines) + "\n"


def _point(values: Sequence[bool]) -> str:
    return _mark(values[0]) if len(values) == 1 else f"{sum(values)}/{len(values)}"


def _mark(value: bool) -> str:
    return "+" if value else "−"


def first_sight_table(cases: Sequence[Case], kept: Mapping[str, Any]) -> str:
    """Return the stored first results as a table."""
    lines = [
        "| | reported at | first warning | first cause | first fix | fault | cause | fix | quiet |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        if case.id in kept:
            said, points = kept[case.id]["said"], kept[case.id]
            marks = " | ".join(_mark(points[key]) for key in POINTS)
            lines.append(
                f"| {case.id} | {case.address} | {said['fault'] or '-'} | {said['cause'] or '-'} "
                f"| {said['fix'] or '-'} | {marks} |"
            )
    seen = [kept[c.id] for c in cases if c.id in kept]
    totals = " | ".join(_share(seen, lambda p, key=key: p[key]) for key in POINTS)
    return "\n".join([*lines, f"| | all {len(seen)} | | | | {totals} |"])


def text_of(run: Record) -> str:
    """Return everything that was said of a run."""
    texts, twin = run["texts"], run["twin"]
    parts = [f"===== {run['case']}, seed {run['seed']}: {run['points']}", "--- GradGuard():", *texts["watch"]]
    parts += ["--- strict, with trials:", *texts["strict"], "--- its diagnosis:", texts["diagnosis"]]
    parts += ["--- the cured twin:", str(twin["findings"]), *twin["said"], twin["checkup"]]
    return "\n".join([*parts, *(f"--- ended by {error}" for error in run["errors"])])


if __name__ == "__main__":
    raise SystemExit(main())
