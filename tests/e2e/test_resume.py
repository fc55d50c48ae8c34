"""Resumed runs equal uninterrupted ones.

They judge, clip, skip and halt alike, in another process.
"""

import sys
from pathlib import Path

import pytest
import torch

from lightning_gradguard import GradGuard

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the script is imported, too
from resume_script import CASES, LATE, file_of, train  # noqa: E402

quiet = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
#: What is to be equal in the end.
EVERYTHING = ("halted", "stop_reason", "findings", "reports", "summary", "state", "weights", "optimizer")


@pytest.fixture(scope="module")
def runs(python, tmp_path_factory):
    """Return each case, trained whole and resumed.

    The resumed one runs in a process of its own, from checkpoints of the whole one.
    """
    return interrupt(python, tmp_path_factory.mktemp("resume"), list(CASES))


def interrupt(python, folder, names):
    whole = {name: train(name, folder, resumed=False) for name in names}
    done = python.run(HERE / "resume_script.py", folder, *names, warnings="ignore")
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = {name: torch.load(file_of(folder, name).with_suffix(".pt")) for name in names}
    return whole, resumed, folder


def compare(runs, name, what=EVERYTHING):
    """Assert that two runs are equal; return one.

    They are compared from the checkpoint on. The whole run is returned.
    """
    whole, resumed = dict(runs[0][name]), dict(runs[1][name])
    whole["findings"] = whole["findings"][whole["known"] :]
    for run in (whole, resumed):
        run["reports"] = [report for report in run["reports"] if report[0] > whole["saved"]]
    for key in what:
        if key in ("weights", "optimizer"):
            torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)
        else:
            assert resumed[key] == whole[key], key
    return whole


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(runs, name):
    # Which of the experts ran first is known of the pass after the checkpoint; it decides nothing.
    whole = compare(runs, name, [key for key in EVERYTHING if (name, key) != ("experts", "state")])
    # Something is judged before the checkpoint, and something after it.
    assert whole["known"] > 0
    assert whole["findings"] or name == "experts"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "all, late" else pytest.mark.slow)
        for name in LATE
        if "halt" not in name
    ],
)
def test_judged_late_the_weights_are_those_of_the_uninterrupted_run(python, tmp_path, name):
    compare(interrupt(python, tmp_path, [name]), name, ("weights", "optimizer"))


@pytest.mark.parametrize("name", ["DepthTilt", "DeadUnits", "Stalled", "UpdateRatio", "Disconnected"])
def test_an_episode_that_was_under_way_becomes_critical_when_it_would_have(runs, name):
    before, after = runs[0][name]["findings"][0], runs[1][name]["findings"]
    assert "WARNING" in before
    assert [finding.count("CRITICAL") for finding in after] == [1]


def test_skips_in_a_row_are_counted_on(runs):
    # Steps 30 and 31 before the checkpoint, 32 after it, and 33 is one too many.
    assert runs[1]["halt"]["halted"] == runs[0]["halt"]["halted"] == 33


def test_rollbacks_are_counted_on(runs):
    assert runs[1]["rollback"]["summary"]["rollbacks"] == runs[0]["rollback"]["summary"]["rollbacks"] == 2


def spoil(folder, name, change):
    """Return a checkpoint with a changed guard state."""
    state = torch.load(file_of(folder, name), weights_only=True)
    (key,) = [key for key in state["callbacks"] if key.startswith("GradGuard")]
    change(state["callbacks"][key])
    other = folder / "spoilt"
    other.mkdir(exist_ok=True)
    torch.save(state, file_of(other, name))
    return other


def older(state):
    state["0"] = {"version": 1, "mean": torch.ones(3)}


def of_another_model(state):
    state["0"]["watch"]["names"][0] = "encoder.weight"


@pytest.mark.parametrize("change", [older, of_another_model])
def test_a_state_that_does_not_fit_is_said_and_nothing_else_is_harmed(runs, change, monkeypatch):
    whole, _, folder = runs
    said = []
    monkeypatch.setattr(
        "lightning_gradguard.callbacks.guard_registry.warn", lambda _, message: said.append(message)
    )
    again = train("DepthTilt", spoil(folder, "DepthTilt", change), resumed=True)
    assert len(said) == 1
    assert said[0].startswith(
        "GradGuard: judging starts afresh, since the state in the checkpoint does not fit: state must be of"
    )
    # Nothing is clipped or skipped in this case, so that the training is the same.
    for key in ("weights", "optimizer"):
        torch.testing.assert_close(again[key], whole["DepthTilt"][key], rtol=0, atol=0)
    # Afresh: only the steps since are counted.
    assert again["summary"]["judged"] == 70 - whole["DepthTilt"]["saved"]


@quiet
def test_a_guard_of_another_configuration_leaves_the_state_alone(runs):
    whole, _, folder = runs
    again = train("DepthTilt", folder, resumed=True, guard=GradGuard(detectors=[]))
    torch.testing.assert_close(again["weights"], whole["DepthTilt"]["weights"], rtol=0, atol=0)
    assert again["summary"]["judged"] == 70 - whole["DepthTilt"]["saved"]
