"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop(capsys):
    assert load("plain_loop").main() < 15
    assert "'skipped': 7" in capsys.readouterr().out


def test_digits():
    assert load("digits").main(epochs=1) > 0.7
    assert list(Path("runs/digits").rglob("events.*"))


def test_own_detector():
    (finding,) = load("own_detector").main()
    assert finding.detector == "Lopsided"
    assert finding.parameters[0] == "0.weight"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_short_and_tested(path):
    assert len(path.read_text().splitlines()) < 80
    assert f"def test_{path.stem}(" in Path(__file__).read_text()
