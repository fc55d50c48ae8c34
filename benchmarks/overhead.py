"""Measure the cost of a guard: per step, per training, in memory, and beside its peers.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 10        # trainings repeated more often, for narrower quartiles
    python benchmarks/overhead.py --quick --out page.md

Writes ``benchmarks/overhead.md`` and ``benchmarks/overhead.png``; with ``--out`` both go beside that path.
Peers that are installed are measured; the others are listed as absent. Install them with ``pip install
--no-deps``, which keeps the installed torch.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.cost.page import report  # noqa: E402
from benchmarks.cost.plan import FULL, QUICK, run  # noqa: E402
from benchmarks.cost.plot import picture  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="use tiny shapes and few steps, for a quick check"
    )
    parser.add_argument("--rounds", type=int, default=None, help="number of repetitions of each training")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds; use it on a shared machine"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "overhead.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    began = time.perf_counter()
    clock = time.process_time if options.cpu_time else time.perf_counter

    def report_progress(what: str) -> None:
        print(f"{time.perf_counter() - began:4.0f} s  {what}", file=sys.stderr, flush=True)

    found = run(QUICK if options.quick else FULL, clock, options.rounds, report_progress)
    drawn = options.out.with_suffix(".png")
    page = report(found, f"seconds of the {'CPU' if options.cpu_time else 'wall clock'}", drawn.name)
    options.out.write_text(page)
    picture(found, drawn)
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
