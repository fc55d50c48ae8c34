"""Trainings on two ranks, and others in processes of their own, without and with a guard."""

import json
from pathlib import Path

import pytest

from tests.pairs.pair import GUARDS, Net

SCRIPT = Path(__file__).parent / "ranks_script.py"
WORLDS = [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)]


def ranks(python, folder, *arguments, world=2):
    ended = python.ranks(SCRIPT, folder, *arguments, world=world)
    files = [folder / f"{' '.join(arguments)} {rank}.json" for rank in range(world)]
    assert all(file.exists() for file in files), "".join(rank.stderr[-3000:] for rank in ended)
    return [json.loads(file.read_text()) for file in files]


def test_a_guard_changes_nothing_on_two_ranks(python, tmp_path):
    first, second = ranks(python, tmp_path, "pairs")
    assert first == second
    assert len(first) == 8


@pytest.mark.parametrize("way", ["error", "SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_both_ranks_end_as_without_a_guard(way, python, tmp_path):
    bare = ranks(python, tmp_path, "end", way, "bare")
    assert {"error": "ValueError", "SIGTERM": "SIGTERMException", "SIGINT": "SystemExit"}[way] == bare[1][0]
    assert "no error" not in (bare[0][0], bare[1][0])
    assert ranks(python, tmp_path, "end", way, "everything") == bare


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_processes_that_lightning_starts(strategy, python, tmp_path):
    bare = ranks(python, tmp_path, "started", strategy, "bare", world=1)
    assert bare[0]["weights"] != {name: t.tolist() for name, t in Net().state_dict().items()}
    for guard in GUARDS:
        assert ranks(python, tmp_path, "started", strategy, guard, world=1) == bare


@pytest.mark.parametrize(("first", "second"), WORLDS)
def test_another_number_of_ranks_resumes(first, second, python, tmp_path):
    seen = {}
    for guard in ("bare", "default"):
        ranks(python, tmp_path, "resumed", guard, world=first)
        seen[guard] = ranks(python, tmp_path, "resumed", guard, world=second)
    steps = 8 // first + 8 // second
    for bare, watched in zip(seen["bare"], seen["default"], strict=True):
        assert (watched.pop("judged"), bare.pop("judged")) == (steps, None)
        assert watched == bare
        assert watched["step"] == steps


@pytest.mark.slow
def test_the_profiler_of_torch(python, tmp_path):
    """It ends a process in its second fit, guarded or not, so that each fit has a process."""
    bare = ranks(python, tmp_path, "profiled", "bare", world=1)
    for guard in GUARDS:
        assert ranks(python, tmp_path, "profiled", guard, world=1) == bare
