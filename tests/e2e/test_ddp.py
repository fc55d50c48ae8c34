"""Two DDP processes reach the same verdict.

It does not matter which of them saw the fault.
"""

import json
import math
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "ddp_script.py"


def train(python, folder, case, *arguments):
    ranks = python.ranks(SCRIPT, folder, case, json.dumps(arguments))
    files = [folder / f"rank{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), "".join(rank.stderr[-3000:] for rank in ranks)
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def protected(python, tmp_path_factory):
    return train(python, tmp_path_factory.mktemp("ddp"), "protect", [5, 6, 20], "protect")


def test_ranks_agree_in_everything(protected):
    first, second = protected
    assert json.dumps(first) == json.dumps(second)


def test_what_one_rank_saw_both_skipped(protected):
    for rank in protected:
        assert [r[0] for r in rank["reports"] if r[-1]] == [5, 6, 20]
        assert rank["summary"]["skipped"] == 3
        assert all(math.isfinite(w) for tensor in rank["weights"] for w in tensor)


def test_the_loss_is_the_mean_over_ranks(protected):
    losses = [r[1] for r in protected[0]["reports"] if not r[-1]]
    assert len(losses) == 27
    assert all(0 < loss < 1.5 for loss in losses)


def test_both_halt_before_the_same_step(python, tmp_path):
    first, second = train(python, tmp_path, "protect", [7], "strict")
    assert first["halted"] == second["halted"] == 7
    assert first["findings"] == second["findings"]


def test_a_spike_of_one_rank_is_clipped_by_both(python, tmp_path):
    first, second = train(python, tmp_path, "clip_spikes", 40)
    assert json.dumps(first) == json.dumps(second)
    assert first["spans"] == [[40, 44, ["spike"]]]
    clipped = [step for step, _, total, after, _ in first["reports"] if after < total]
    assert clipped == [40, 41, 42, 43, 44]


@pytest.mark.parametrize("talks", [False, True])
def test_each_rank_tries_remedies_by_itself_and_none_waits(python, tmp_path, talks):
    first, second = train(python, tmp_path, "try_fixes", talks)
    assert first["fault"] == second["fault"] == "vanishing"
    assert first["halted"] == second["halted"] is not None
    for rank in (first, second):
        # A step that talks to the others cannot be run alone, and says so.
        assert ("communicates with other processes" in rank["trials"]) == talks
        assert rank["tried"][0] is not talks
