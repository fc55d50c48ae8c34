"""Establish the truth of each case by runs without any detector, and write it to ``truth.json``.

    python benchmarks/zoo/establish.py --seeds 3 --jobs 2
    python benchmarks/zoo/establish.py --held-out --seeds 2

A healthy case holds if it reaches its level, or its twin on learnable labels does. A faulty case holds if it
stays below the level (an event need not), its fixed twin reaches it, and the facts of the run support its
fault. The facts of a run also decide which of the case's other names are accepted for it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import held_out, zoo
from benchmarks.zoo.case import Case, select
from benchmarks.zoo.facts import Facts, is_right_name, time_tilt
from benchmarks.zoo.running import fit
from benchmarks.zoo.truth import TRUTH
from lightning_gradguard import Fault


def establish(subject: Case, seed: int) -> dict[str, Any]:
    """Return the truth of one case and seed: its quality, its twin's quality, and the facts."""
    training, facts = subject.make(seed), Facts(subject)
    tilt = time_tilt(training) if Fault.VANISHING_IN_TIME in subject.names else None
    fit(subject, training, [facts])
    quality, summary = training.quality(), facts.summary()
    if tilt is not None:
        summary["time_tilt"] = tilt
    twin = None
    if subject.fixed is not None:
        other = subject.make(seed, fixed=True)
        fit(subject, other, fixed=True)
        twin = other.quality()
    names = {name.value: is_right_name(name, subject, summary) for name in subject.names}
    return {
        "quality": _plain(quality),
        "mended_quality": _plain(twin),
        "borne_out": names,
        "holds": holds(subject, quality, twin, not subject.faulty or names[subject.fault.value]),
        "facts": {name: _plain(value) for name, value in summary.items() if value is not None},
    }


def holds(subject: Case, quality: float, twin: float | None, borne_out: bool) -> bool:
    """Return True if the measurements confirm what the case claims."""
    reaches = quality >= subject.level
    twin_reaches = twin is not None and twin >= subject.level
    if not subject.faulty:
        return reaches or twin_reaches
    return (subject.kind == "event" or not reaches) and twin_reaches and borne_out


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return 1 if a case does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--held-out", action="store_true", help="run the held-out collection instead of the zoo"
    )
    parser.add_argument("--cases", default=None, help="comma-separated patterns of ids, titles or kin")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(arguments)
    cases, path = (held_out.CASES, held_out.TRUTH) if options.held_out else (zoo.CASES, TRUTH)
    by_id = {c.id: c for c in cases}
    chosen = select(cases, options.cases)
    work = [(c.id, seed) for c in chosen for seed in range(options.seeds)]
    began = time.perf_counter()
    truth: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        for (name, seed), result in zip(work, pool.map(_job, work), strict=True):
            entry = truth.setdefault(name, {})
            subject = by_id[name]
            entry.update(
                title=subject.title,
                names=[fault.value for fault in subject.names],
                level=subject.level,
                onset=subject.onset,
            )
            entry.setdefault("seeds", {})[str(seed)] = result
            if not result["holds"]:
                print(f"does not hold: {name} seed {seed}: {result}", flush=True)
    truth = {name: truth[name] for name in sorted(truth) if name in by_id}
    lines = [f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}" for name, entry in truth.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    bad = sum(not seed["holds"] for entry in truth.values() for seed in entry["seeds"].values())
    print(
        f"{len(chosen)} cases, {len(work)} runs in {time.perf_counter() - began:.0f} s; {bad} in the file do not hold"
    )
    return int(bad > 0)


def _job(work: tuple[str, int]) -> dict[str, Any]:
    cases = {c.id: c for c in (*zoo.CASES, *held_out.CASES)}
    return establish(cases[work[0]], work[1])


def _one_thread() -> None:
    torch.set_num_threads(1)


def _plain(value: float | int | None) -> float | int | str | None:
    """Return four significant digits, and text for a non-finite value, which JSON cannot represent."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
