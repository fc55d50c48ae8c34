"""Whatever goes wrong in a training, at random places and moments: weights survive, ranks agree, and nothing hangs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from packaging.version import Version

HERE = Path(__file__).parent
#: Seconds after which processes count as hanging.
LIMIT = 200
ALONE, TOGETHER = range(70), range(1000, 1030)
KILLS = 4
TROUBLES = ["full", "closed", "removed", "replaced"]
goes_on = pytest.mark.skipif(
    Version(L.__version__) < Version("2.5"),
    reason="Lightning 2.4 takes a batch twice where it goes on within an epoch",
)


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(HERE / script), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # One arena: what a thread that draws has given back is not kept for the next one.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip


def await_all(processes):
    """Waits for them all, and returns what they printed; one that hangs is ended and fails the test."""
    try:
        said = [process.communicate(timeout=LIMIT) for process in processes]
        for process, (_, errors) in zip(processes, said, strict=True):
            assert process.returncode == 0, errors[-3000:]
        return [printed for printed, _ in said]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the scripts leave: trainings with faults, killed ones, those that cannot write, and long ones."""
    folder = tmp_path_factory.mktemp("chaos")
    for name in ("alone", "together", "killed", "writers", "growth"):
        (folder / name).mkdir()
    port = free_port()
    # Two at a time: the ranks wait for each other.
    await_all([start("chaos_script.py", folder / "alone", ALONE.start, len(ALONE)),
               start("kill_script.py", folder / "killed", 0, KILLS)])  # fmt: skip
    await_all([start("chaos_script.py", folder / "together", TOGETHER.start, len(TOGETHER), rank, 2, port)
               for rank in (0, 1)])  # fmt: skip
    _, grown = await_all([start("writers_script.py", folder / "writers"),
                          start("growth_script.py", folder / "growth", 300, 700, 500)])  # fmt: skip
    (folder / "growth" / "grown.json").write_text(grown.splitlines()[-1])
    return folder


def runs(folder, rank=0):
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("way", "seeds"), [("alone", ALONE), ("together", TOGETHER)])
def test_nothing_that_is_not_finite_reaches_a_weight_or_a_moment(folder, way, seeds):
    seen = runs(folder / way)
    assert [run["seed"] for run in seen] == list(seeds)
    for run in seen:
        assert run["problem"] is None, f"{run['problem']} in {run['said']}"
        assert run["ruined"] == [], run["said"]
    # What there was to survive: trainings in which something struck, some of them halted, and some ended gracefully.
    assert sum(run["struck"] for run in seen) >= 60
    halted = [run["agreed"]["halted"] is not None for run in seen]
    assert 3 <= sum(halted) <= len(seen) / 2
    assert sum(run["agreed"]["stop_reason"] is not None for run in seen) > sum(halted)
    assert sum(run["agreed"]["summary"]["skipped"] for run in seen) > len(seen) / 2


def test_ranks_agree_to_the_last_bit(folder):
    for first, second in zip(*(runs(folder / "together", rank) for rank in (0, 1)), strict=True):
        assert first["agreed"] == second["agreed"], first["said"]
    # Also where only one of them was struck.
    pairs = zip(*(runs(folder / "together", rank) for rank in (0, 1)), strict=True)
    assert sum(min(a["struck"], b["struck"]) == 0 < max(a["struck"], b["struck"]) for a, b in pairs) >= 5


@goes_on
def test_after_kills_at_any_moment_the_run_is_the_uninterrupted_one(folder):
    statuses = torch.load(folder / "killed" / "statuses.pt")
    assert statuses["whole"] == [0]
    assert statuses["killed"] == [-9] * KILLS + [0]
    assert_whole(folder / "killed", "killed")


@goes_on
@pytest.mark.parametrize("way", ["terminated", "bereft"])
def test_after_sigterm_or_the_death_of_a_worker_too(folder, way):
    """Both end the process by itself, with a flight record, and not as if nothing had been."""
    first, second = torch.load(folder / "killed" / "statuses.pt")[way]
    assert (first > 0, second) == (True, 0)
    assert len(list((folder / "killed" / way / "records").glob("*.pt"))) == 1
    assert_whole(folder / "killed", way)


def assert_whole(folder, way):
    whole, other = (torch.load(folder / f"{name}.pt") for name in ("whole", way))
    assert whole["began_from"] is None
    assert other["began_from"] is not None
    for key in ("weights", "optimizer"):
        torch.testing.assert_close(other[key], whole[key], rtol=0, atol=0)
    assert (other["state"], other["summary"]) == (whole["state"], whole["summary"])
    assert whole["summary"]["skipped"] == 3


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("logger", ["board", "csv"])
def test_a_writer_that_fails_changes_nothing_and_is_said_once(folder, logger, trouble):
    bare = torch.load(folder / "writers" / "none-nothing.pt")
    seen = torch.load(folder / "writers" / f"{logger}-{trouble}.pt")
    assert (seen["judged"], seen["ended"]) == (60, True)
    torch.testing.assert_close(seen["weights"], bare["weights"], rtol=0, atol=0)
    # `GradGuard` and `GradHistogram` have a sink each.
    assert len(seen["said"]) <= 2
    if logger == "board" and trouble != "closed":
        assert len(seen["said"]) == 2
    # What is raised in the end is of Lightning's own closing of its files; a RuntimeError before 2.5.
    assert set(seen["errors"]) <= {"OSError", "FileNotFoundError", "NotADirectoryError", "RuntimeError"}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("logger", ["board", "csv"])
def test_a_writer_that_fails_hides_no_halt(folder, logger, trouble):
    """Neither does a recorder whose folder cannot be written."""
    seen = torch.load(folder / "writers" / f"{logger}-{trouble}-halt.pt")
    assert seen["errors"][-1] == "halt before 46"
    assert (seen["judged"], seen["ended"]) == (47, False)


def test_memory_does_not_grow(folder):
    """With findings that come and go; measured over 20,000 steps in benchmarks/chaos.md."""
    grown = json.loads((folder / "growth" / "grown.json").read_text())
    assert len(grown) == 3
    for what, megabytes in grown.items():
        assert megabytes < 1, what
