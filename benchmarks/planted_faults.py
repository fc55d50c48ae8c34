"""Measure which small faults the tests notice: ``python benchmarks/planted_faults.py`` plants them one by one.

Each fault is one change to one file of the package: a comparison, a dropped reset, a wrong sign. It is planted in a
temporary copy, and the tests beside that file have to fail there. Takes about 20 minutes on one core. The exit status
is 1 if fewer than `AIM` faults are noticed. ``--only clippers`` plants those of one folder or file alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_gradguard"
#: Fewest faults that have to be noticed.
AIM = 90
#: Seconds after which tests count as hanging, which notices the fault.
LIMIT = 300


class Planted(NamedTuple):
    """A fault to plant.

    Attributes:
        file: File of the package.
        old: Text that occurs in it once.
        new: Text that takes its place.
        tests: Test files beside it, separated by a space; a name below ``tests/`` without ``test_`` and ``.py``.
    """

    file: str
    old: str
    new: str
    tests: str


FAULTS: list[Planted] = []


def test_files(fault: Planted) -> list[str]:
    """Return the paths of a fault's test files, relative to the root."""
    paths = [Path("tests", name) for name in fault.tests.split()]
    return [str(path.with_name(f"test_{path.name}.py")) for path in paths]


def occurrences(fault: Planted, root: Path = ROOT) -> int:
    """Return how often the text that the fault replaces occurs in its file."""
    return (root / PACKAGE / fault.file).read_text().count(fault.old)


def main() -> int:
    """Plant all faults; print which of them are noticed."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--only", default="", help="plant the faults in files whose path begins so")
    faults = [fault for fault in FAULTS if fault.file.startswith(parser.parse_args().only)]
    for name in ("torch", "lightning.pytorch", "torchmetrics", "tensorboard"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)  # once here, and not again in each process
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist"))
        every = sorted({path for fault in faults for path in test_files(fault)})
        if fails(copy, every):
            print((copy / "output.txt").read_text()[-3000:])
            print("Without any fault the tests fail already.")
            return 2
        unnoticed = [fault for fault in faults if not is_noticed(copy, fault)]
    noticed = len(faults) - len(unnoticed)
    print(f"{noticed} of {len(faults)} planted faults are noticed.")
    return int(100 * noticed < AIM * len(faults))


def is_noticed(copy: Path, fault: Planted) -> bool:
    """Plant a fault, run the tests beside it, and remove it again."""
    if (count := occurrences(fault, copy)) != 1:
        raise ValueError(f"the text must occur once in {fault.file}, got {count} times: {fault.old!r}")
    path = copy / PACKAGE / fault.file
    before = path.read_text()
    path.write_text(before.replace(fault.old, fault.new))
    forget(path)
    noticed = fails(copy, test_files(fault))
    path.write_text(before)
    forget(path)
    print(f"{'noticed' if noticed else 'UNNOTICED':9} {fault.file}: {fault.old!r} -> {fault.new!r}", flush=True)
    return noticed


def forget(path: Path) -> None:
    """Remove the compiled form of a file, which Python tells from a new one by its second and size alone."""
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()


def fails(copy: Path, tests: list[str]) -> bool:
    """Run tests in a process of their own; return True if one fails or hangs.

    Raises:
        RuntimeError: If there is no such test, or pytest cannot be used so.
    """
    process = multiprocessing.get_context("fork").Process(target=run, args=(copy, tests))
    process.start()
    process.join(LIMIT if len(tests) < 5 else None)
    if process.exitcode is None:
        process.kill()
        process.join()
        return True
    if process.exitcode in (3, 4, 5):
        raise RuntimeError(f"pytest ended with status {process.exitcode} for {' '.join(tests)}")
    return process.exitcode != 0


def run(copy: Path, tests: list[str]) -> None:
    """Run tests in a copy, up to the first that fails."""
    import pytest

    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    with open(copy / "output.txt", "w") as output, contextlib.redirect_stdout(output):
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        status = pytest.main(["-x", "-m", "not slow", "-p", "no:cacheprovider", *tests])
        output.flush()
    os._exit(int(status))


if __name__ == "__main__":
    sys.exit(main())
