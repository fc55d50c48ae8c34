"""Damaged, foreign and odd files: `ReplayError` on one line, or a replay; nothing else, and no code is run."""

import contextlib
import io
import os
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard import ReplayError, replay
from lightning_gradguard.cli import main
from lightning_gradguard.flight_recorder.bundle import file_name, read_all_ranks, read_bundle, write_bundle
from tests.flight_recorder.conftest import Tiny
from tests.flight_recorder.damaged_bundles import damage

many = settings(max_examples=4 * settings.default.max_examples)


@pytest.fixture(scope="module")
def bundles(make_bundle):
    """Whole bundles, of several faults."""
    bundle = make_bundle(buffers={"margin": torch.ones(2)}, findings=[{"step": 3, "fault": "spike"}])
    bundle["diagnosis"] = {"text": "Something is wrong.\n\nSigns\n  - one", "data": {}}
    history = {"names": ["layer.weight", "layer.bias"], "step": torch.arange(3, 8), "norms": torch.ones(5, 2)}
    bundle["optimizers"][0] |= {"layers": ["layer.weight"], "history": history, "counts": {"judged": 5}}
    faults = [
        {"fault": "spike", "value": 3.0, "limit": 2.0},
        {"fault": "vanishing", "quantity": "depth_tilt", "value": 3.0, "limit": 2.0},
        {"fault": "disconnected", "parameters": ["layer.bias"]},
        {"fault": "stalled"},
    ]
    changes = [{"target": {**bundle["target"], **fault}} for fault in faults]
    changes += [{"target": None, "reason": "exception", "message": "KeyError: 'a'"}, {"world_size": 2}]
    return [bundle, make_bundle(zeros=()), *({**bundle, **change} for change in changes)]


def run(*arguments):
    """Run the command; return its status and all that it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(list(map(str, arguments)))
    return status, printed.getvalue()


def refusal(path):
    """Replay a file; return the error's message, if there is one."""
    try:
        assert str(replay(path, Tiny()))
    except ReplayError as error:
        return str(error)
    return ""


def check_printed(status, text):
    """Check that a command has printed its result, or one line of what is wrong."""
    assert status in (0, 2)
    assert all(c.isprintable() or c == "\n" for c in text)
    if status == 2:
        assert text.startswith("gradguard replay: ")
        assert text.count("\n") == 1
        assert len(text) < 1100


@many
@given(st.integers(0, 2**32))
def test_a_damaged_file_is_replayed_or_refused_on_one_line(bundles, seed):
    source = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file_name(7, 0, 1)
        damage(path, source.choice(bundles), source)
        check_printed(*run("replay", path))
        if source.random() < 0.5:
            check_printed(*run("replay", path, "--module", f"{Tiny.__module__}:Tiny"))
        else:
            assert "\n" not in refusal(path)
        assert not (Path(folder) / "ran").exists()
    assert not Path("ran").exists()


def test_the_whole_bundles_are_replayed(bundles, tmp_path):
    for bundle in bundles[:-2]:
        path = write_bundle(bundle, tmp_path, keep=1)
        for status, text in (run("replay", path), run("replay", path, "--module", f"{Tiny.__module__}:Tiny")):
            check_printed(status, text)
            assert status == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 10**30}, "the record['step'] must be a whole number"),
        ({"rank": 3}, "it is of rank 3 of 1, and ranks are counted from 0"),
        ({"rank": -1}, "it is of rank -1 of 1"),
        ({"weights": {"layer.weight": 3}}, "['weights']['layer.weight'] must be of type Tensor, got 3"),
        ({"notes": [3]}, "['notes'][0] must be of type str, got 3"),
        ({"report": {"total_norm": "x"}}, "['report']['total_norm'] must be a number, got 'x'"),
        ({"versions": {1: "x"}}, "['versions'] must be a dict whose keys are strings, got 1"),
    ],
)
def test_the_message_names_the_place(make_bundle, tmp_path, change, words):
    path = tmp_path / "bundle.pt"
    torch.save({"format": "gradguard bundle", "version": 1, **make_bundle(**change)}, path)
    with pytest.raises(ReplayError) as caught:
        read_bundle(path)
    assert f"{path} is damaged: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (
            {"is": "bytes", "of": [torch.tensor(10**11)]},
            "the step cannot be replayed: a recorded value cannot be restored",
        ),
        ({"is": "array", "of": []}, "a recorded value cannot be restored: IndexError"),
        ({"is": "dict", "keys": [[1]], "of": [1]}, "a recorded value cannot be restored: TypeError"),
        ({"is": "list", "of": 3}, "a recorded value cannot be restored: TypeError"),
    ],
    ids=["length", "nothing", "key", "number"],
)
def test_a_damaged_batch_or_argument_is_said(make_bundle, tmp_path, batch, words):
    bundle = make_bundle()
    bundle["parts"][0]["batch"] = batch
    path = write_bundle(bundle, tmp_path, keep=1)
    with pytest.raises(ReplayError, match=words):
        replay(path, Tiny())
    bundle = make_bundle()
    bundle["hyper_parameters"]["values"]["width"] = batch
    status, text = run(
        "replay", write_bundle(bundle, tmp_path, keep=1), "--module", f"{Tiny.__module__}:Tiny"
    )
    assert status == 2
    assert "the recorded arguments of Tiny cannot be used: a recorded value cannot be restored" in text


def test_random_states_that_torch_refuses_are_said(make_bundle, tmp_path):
    bundle = make_bundle()
    bundle["parts"][0]["random"]["torch"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ReplayError, match=r"the step cannot be replayed: RuntimeError: .*size"):
        replay(write_bundle(bundle, tmp_path, keep=1), Tiny())


def test_notes_of_a_file_reach_the_terminal_without_control_characters(make_bundle, tmp_path):
    path = write_bundle(make_bundle(notes=["\x1b[2Jgone\nand more\ud800"]), tmp_path, keep=1)
    status, text = run("replay", path, "--module", f"{Tiny.__module__}:Tiny")
    assert status == 0
    assert "?[2Jgone and more?" in text


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "long"])
def test_a_path_that_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a.pt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "long":
        path = tmp_path / ("a" * 300)
    else:
        path.symlink_to(path if kind == "loop" else "/dev/zero")
    words = {"loop": "cannot be read: ", "long": "cannot be read: "}.get(kind, "is not a regular file")
    with pytest.raises(ReplayError, match=words):
        read_bundle(path)


def test_a_claim_of_many_ranks_costs_nothing(make_bundle, tmp_path):
    for rank in (0, 5):
        write_bundle(make_bundle(rank=rank, world_size=2**60), tmp_path, keep=3)
    own, other = read_all_ranks(tmp_path / file_name(7, 0, 2**60))
    assert (own["rank"], other["rank"]) == (0, 5)
    named = "rank 1, 2, 3, 4, 6, 7, 8, 9 and 1152921504606846966 more."
    assert own["notes"] == [f"Not replayed, since its record is not in this folder: {named}"]


def test_a_file_named_for_another_rank_is_not_replayed(make_bundle, tmp_path):
    path = write_bundle(make_bundle(rank=0, world_size=2), tmp_path, keep=3)
    (tmp_path / file_name(7, 1, 2)).write_bytes(path.read_bytes())
    (own,) = read_all_ranks(path)
    assert own["notes"] == ["Not replayed, since its record is not in this folder: rank 1."]
