"""What `make` would do: the demo waits for no more than it needs, and the tests complete the same environment."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def commands(target, venv):
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", target, f"VENV={venv}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def touch(*paths):
    """Create files that are newer than all of the project's."""
    newest = max((ROOT / name).stat().st_mtime for name in ("pyproject.toml", "constraints.txt"))
    for i, path in enumerate(paths, 1):
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (newest + i, newest + i))


def test_a_first_demo_installs_only_what_it_needs_and_in_the_open(tmp_path):
    planned = commands("demo", tmp_path / "venv")
    assert "venv --clear" in planned
    assert '".[demo]"' in planned
    assert '".[test]"' not in planned
    assert "--quiet" not in planned
    assert planned.rstrip().endswith("gradguard demo")


def test_tests_complete_the_environment_of_the_demo(tmp_path):
    venv = tmp_path / "venv"
    touch(venv / ".created", venv / ".installed-demo")
    assert "pip" not in commands("demo", venv)
    planned = commands("test", venv)
    assert "venv --clear" not in planned
    assert '".[test]"' in planned


def test_the_demo_runs_in_the_environment_of_the_tests(tmp_path):
    venv = tmp_path / "venv"
    touch(venv / ".created", venv / ".installed")
    for target in ("demo", "test"):
        assert "pip" not in commands(target, venv)
