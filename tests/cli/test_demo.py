"""The demo's three acts, with fewer epochs, and the command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gradguard import __version__
from lightning_gradguard.cli import main


def test_the_three_acts(capsys):
    Path("logs/mine").mkdir(parents=True)
    Path("logs/mine/precious").write_text("x")
    Path("logs/demo/1_sigmoid_halted").mkdir(parents=True)
    Path("logs/demo/1_sigmoid_halted/events.old").write_text("x")
    assert main(["demo", "--folder", "logs", "--epochs", "6"]) == 0
    printed = capsys.readouterr().out
    assert "GradGuard halted training before step 79" in printed
    assert "linears.0.weight" in printed
    assert "Fixes, best first" in printed
    act_two = re.search(
        r"([\d.]+) % of the validation images are classified\s+correctly.*made\s+(\d+)\s+findings",
        printed,
        re.DOTALL,
    )
    assert float(act_two[1]) >= 95
    assert act_two[2] == "0"
    bare, safe = (float(x) for x in re.findall(r"([\d.]+) % correct", printed)[-2:])
    assert bare < 20
    assert safe > 90
    assert re.search(r"[1-9]\d* were clipped\s+and [1-9]\d* skipped", printed)
    assert printed.rstrip().endswith("tensorboard --logdir logs/demo")
    runs = {path.parent.name for path in Path("logs/demo").rglob("events.*")}
    assert runs == {"1_sigmoid_halted", "2_first_remedy", "3_corrupt_protected", "3_corrupt_unprotected"}
    # What an earlier demo wrote is removed, and nothing else.
    assert not Path("logs/demo/1_sigmoid_halted/events.old").exists()
    assert Path("logs/mine/precious").exists()


def test_without_epochs_there_is_no_demo(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--folder", "logs", "--epochs", "0"])
    assert "must be 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_the_module_runs_as_a_command(option):
    command = [sys.executable, "-m", "lightning_gradguard.cli", option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert (__version__ if option == "--version" else "demo") in done.stdout
