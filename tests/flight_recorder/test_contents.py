"""What a flight record holds, in words."""

from pathlib import Path

import torch

from lightning_gradguard.flight_recorder.contents import to_text


def test_it_says_what_there_is_and_what_is_not(make_bundle):
    bundle = make_bundle(
        left_out=["batch['meta'] (Custom)"], notes=["Steps were judged one step late (lag=1)."]
    )
    bundle["diagnosis"] = {"text": "Something is wrong.\n\nSigns\n  - one", "data": {}}
    bundle["optimizers"][0]["history"] = {"names": ["a", "b"], "step": torch.arange(3, 8)}
    text = to_text(bundle, Path("my runs/step-00000007.pt"))
    assert text.startswith(
        "Flight record of a run that ended at step 7 (halt): nonfinite.\n\nSomething is wrong."
    )
    for line in (
        "  statistics  steps 3 to 7, 2 tensors (SGD)",
        "  batch       number 5, 0.2 kB",
        "  weights     2 tensors, 0.0 kB",
        "  left out    batch['meta'] (Custom)",
        "  note        Steps were judged one step late (lag=1).",
        "Replay it: gradguard replay 'my runs/step-00000007.pt' --module a:Tiny",
    ):
        assert line in text.splitlines(), line


def test_one_of_many_processes_and_an_error(make_bundle):
    bundle = make_bundle(
        rank=1, world_size=4, target=None, message="KeyError: 'a'\nmore", parts=[], weights=None
    )
    text = to_text(bundle, Path("a.pt"))
    assert "KeyError: 'a'." in text
    assert "process     rank 1 of 4" in text
    assert "Replay it" not in text
    assert "weights" not in text


def test_a_file_has_no_say_over_the_terminal(make_bundle):
    bundle = make_bundle(notes=["\x1b[2Jgone"])
    bundle["module"]["class"] = "a; rm -r b"
    text = to_text(bundle, Path("a.pt"))
    assert "?[2Jgone" in text
    assert "--module 'a; rm -r b'" in text
