"""Measure which failures a guarded training survives: ``python benchmarks/chaos.py`` writes ``benchmarks/chaos.md``.

This is the long form of tests/e2e/test_chaos.py, with the same scripts. It covers random faults in one and
two processes, killed processes that resume, unwritable log files, and memory over 20,000 steps. The seed
fully determines a training and is printed when something fails. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SCRIPTS = Path(__file__).parents[1] / "tests" / "e2e"
#: Seconds after which a process counts as hanging.
LIMIT = 1800
ALONE, TOGETHER = range(0, 400), range(10_000, 10_100)
KILLED, KILLS = range(6), 8
WARM, STEPS, TRAINED = 1000, 20_000, 5000


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a script in its own process; all output goes to standard output."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(SCRIPTS / script), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip


def finish(processes: Sequence[subprocess.Popen[str]]) -> tuple[list[str], int]:
    """Return the output of each process and the number that did not end in time."""
    outputs, hanging = [], 0
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=LIMIT)[0])
        except subprocess.TimeoutExpired:
            hanging += 1
            process.kill()
            outputs.append(process.communicate()[0])
    return outputs, hanging


def runs(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Return the result of each training."""
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]


def random_faults(folder: Path) -> list[tuple[str, int, int]]:
    """Return rows for random faults: description, runs, failures."""
    for name in ("first", "second", "together"):
        (folder / name).mkdir()
    half = len(ALONE) // 2
    parts = [("first", ALONE[:half]), ("second", ALONE[half:])]
    hanging = finish([start("chaos_script.py", folder / n, s.start, len(s)) for n, s in parts])[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [(folder / "together", TOGETHER.start, len(TOGETHER), rank, 2, port) for rank in (0, 1)]
    hanging += finish([start("chaos_script.py", *arguments) for arguments in ranks])[1]
    alone = [run for name, _ in parts for run in runs(folder / name)]
    pairs = list(zip(runs(folder / "together"), runs(folder / "together", 1), strict=True))
    every = alone + [run for pair in pairs for run in pair]
    disagreeing = [a for a, b in pairs if a["agreed"] != b["agreed"]]
    ends = {"problem": "other errors than a halt", "ruined": "weights or moments not finite"}
    ends |= {"nan": "buffers NaN", "infinite": "buffers infinite"}
    rows = [("faults that struck", sum(run["struck"] for run in every), 0)]
    rows += [
        (f"trainings: {what}", len(every), print_failures(what, [r for r in every if r[key]]))
        for key, what in ends.items()
    ]
    rows += [
        ("trainings of two processes: ranks disagree", len(pairs), print_failures("disagree", disagreeing))
    ]
    done = len(alone) == len(ALONE) and len(pairs) == len(TOGETHER)
    rows += [("processes that hang, or end before their last training", 4, hanging + (not done))]
    halted = sum(run["agreed"]["stop_reason"] is not None for run in every)
    return [*rows, ("of these trainings, halted or ended gracefully", halted, 0)]


def print_failures(what: str, failed: Sequence[dict[str, Any]]) -> int:
    """Print which trainings failed and return their number."""
    for run in failed:
        print(f"{what}: {run['problem']} {run['ruined']} {run['nan']} {run['infinite']} {run['said']}")
    return len(failed)


def killed(folder: Path) -> list[tuple[str, int, int]]:
    """Return rows for processes that are killed, stopped, or lose a worker, and resume."""
    kills = failures = hanging = 0
    for seed in KILLED:
        own = folder / f"killed{seed}"
        own.mkdir()
        hanging += finish([start("kill_script.py", own, seed, KILLS)])[1]
        statuses = torch.load(own / "statuses.pt")
        kills += sum(status != 0 for way in statuses.values() for status in way)
        whole = torch.load(own / "whole.pt")
        for way in ("killed", "terminated", "bereft"):
            other = torch.load(own / f"{way}.pt")
            pairs = zip(whole["weights"].values(), other["weights"].values(), strict=True)
            same = all(torch.equal(a, b) for a, b in pairs)
            if not same or any(whole[key] != other[key] for key in ("state", "summary")):
                print(f"{way}, seed {seed}: differs from the uninterrupted run")
                failures += 1
    return [
        ("kill -9, SIGTERM, or the death of a worker", kills, hanging),
        ("resumed runs that are not the uninterrupted one, bit for bit", 3 * len(KILLED), failures),
    ]


def unwritable(folder: Path) -> list[tuple[str, int, int]]:
    """Return rows for log files that cannot be written."""
    own = folder / "writers"
    own.mkdir()
    finish([start("writers_script.py", own)])
    bare = torch.load(own / "none-nothing.pt")["weights"]
    files = [torch.load(path) for path in own.glob("[bc]*.pt")]
    ended = [seen for seen in files if seen["ended"]]
    changed = [seen for seen in ended if any(not torch.equal(bare[k], t) for k, t in seen["weights"].items())]
    hidden = [seen for seen in files if not seen["ended"] and seen["errors"][-1:] != ["halt before 46"]]
    what = "trainings whose log files cannot be written: changed, or a halt hidden"
    return [(what, len(files), len(changed + hidden))]


def grown(folder: Path) -> list[str]:
    """Return lines on memory growth."""
    (outputs,), _ = finish([start("growth_script.py", folder, WARM, STEPS, TRAINED)])
    counts = {"Guard": STEPS, "Guard, lag=1": STEPS}
    return [
        f"| {what} | {counts.get(what, TRAINED):,} | {megabytes:.2f} |"
        for what, megabytes in json.loads(outputs.splitlines()[-1]).items()
    ]


def main() -> None:
    """Run everything and write the page."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [*random_faults(folder), *killed(folder), *unwritable(folder)]
        memory = grown(folder)
    table = [f"| {what} | {count:,} | {failed} |" for what, count, failed in rows]
    lines = [
        "# What a guarded training survives",
        "",
        f"Made by `python benchmarks/chaos.py` with torch {torch.__version__} on a CPU. NaN, infinity and values up to",
        "3e38 appear in gradients, activations, losses and batches, at random layers, steps and ranks, under random",
        "policies, clippers, detectors, optimizers, precisions and accumulations, by Lightning and by hand. A training",
        "of two processes counts twice. `kill -9` comes at random moments, also while a checkpoint is written.",
        "",
        "| what | how many | failures |",
        "|---|---|---|",
        *table,
        "",
        "Growth of the resident memory, with findings that come and go, after warm-up:",
        "",
        "| what | steps | MB |",
        "|---|---|---|",
        *memory,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
