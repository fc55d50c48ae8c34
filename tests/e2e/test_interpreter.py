"""Python started in other ways gives the same results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "optimized_script.py"


@pytest.mark.slow
@pytest.mark.parametrize("option", ["-O", "-OO"])
def test_nothing_depends_on_asserts_or_docstrings(option, tmp_path):
    """Trainings that are healthy, skip and halt: the same findings, diagnoses, records and weights."""

    def run(*options):
        folder = tmp_path / "".join(["run", *options])
        folder.mkdir()
        return subprocess.run(
            [sys.executable, *options, "-W", "ignore", str(SCRIPT), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=folder, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    plain = run()
    assert '"nonfinite": 1' in plain
    assert run(option) == plain
