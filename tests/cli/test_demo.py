"""The demo's three acts, with fewer epochs, and the command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_gradguard import __version__
from lightning_gradguard.cli import main
from lightning_gradguard.cli.demo import Digits


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
    last = " ".join(printed[printed.index("Look at the runs in TensorBoard:") :].split())
    assert "tensorboard --logdir logs/demo Open http://localhost:6006" in last
    assert "Type `gradguard/` into" in last
    assert "such as `linears.0.weight`" in last
    runs = {path.parent.name for path in Path("logs/demo").rglob("events.*")}
    assert runs == {"1_sigmoid_halted", "2_first_remedy", "3_corrupt_protected", "3_corrupt_unprotected"}
    # What an earlier demo wrote is removed, and nothing else.
    assert not Path("logs/demo/1_sigmoid_halted/events.old").exists()
    assert Path("logs/mine/precious").exists()


def test_without_epochs_there_is_no_demo(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--folder", "logs", "--epochs", "0"])
    assert "must be 1 or more, got 0" in capsys.readouterr().err


HIDE = """
import importlib.util, sys
find, hidden = importlib.util.find_spec, set(sys.argv.pop(1).split(","))
importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] in hidden else find(name, *a)
for name in hidden:
    sys.modules[name] = None
from lightning_gradguard.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("hidden", "needed"),
    [
        ("lightning,pytorch_lightning", "lightning"),
        ("sklearn", "sklearn"),
        ("tensorboard", "tensorboard"),
        ("rich", "rich"),
        ("lightning,pytorch_lightning,sklearn,tensorboard", "lightning"),  # the extra has all of them
    ],
)
def test_a_missing_package_is_named_with_its_command(hidden, needed):
    command = [sys.executable, "-c", HIDE, hidden, "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'gradguard demo needs {needed}: pip install "lightning-gradguard[demo]"\n'


def test_the_network_changes_as_a_fix_says():
    torch.manual_seed(0)
    plain, drawn = Digits(), Digits("relu", initialization="he", layers=6, rate=0.01)
    assert len(drawn.linears) * 2 == len(plain.linears)
    assert drawn.configure_optimizers().param_groups[0]["lr"] == 0.01
    assert drawn.linears[0].weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert not drawn.head.bias.any()
    scores = drawn(torch.randn(5, 64))
    assert scores.shape == (5, 10)
    assert scores.std() > 0.1


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_the_module_runs_as_a_command(option):
    command = [sys.executable, "-m", "lightning_gradguard.cli", option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert (__version__ if option == "--version" else "demo") in done.stdout
