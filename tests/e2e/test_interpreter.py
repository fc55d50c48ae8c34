"""Python started in other ways gives the same results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "optimized_script.py"


def run(folder, *options):
    folder.mkdir()
    return subprocess.run(
        [sys.executable, *options, "-W", "ignore", str(SCRIPT), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_depends_on_asserts_or_docstrings(tmp_path):
    """Trainings that are healthy, skip and halt: the same findings, diagnoses, records and weights."""
    plain = run(tmp_path / "plain")
    assert '"nonfinite": 1' in plain
    assert run(tmp_path / "without asserts", "-O") == plain
    assert run(tmp_path / "without docstrings", "-OO") == plain
