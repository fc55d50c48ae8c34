"""``gradguard replay``: the summary of a flight record, and the arguments of the command."""

from pathlib import Path

import pytest
import torch

from lightning_gradguard.cli.replay import parse_arguments, summary
from lightning_gradguard.cli.user_code import CommandError

BUNDLE = {
    "reason": "halt", "step": 7, "rank": 0, "world_size": 1, "message": "GradientHalt: not finite",
    "target": {"fault": "nonfinite"}, "diagnosis": None,
    "optimizers": [{"kind": "SGD", "history": {"names": ["a", "b"], "step": torch.arange(3, 8)}}],
    "parts": [{"batch": {"is": "tuple", "of": [torch.ones(12, 3), torch.ones(12)]}, "number": 5}],
    "weights": {"layer.weight": torch.ones(2, 3), "layer.bias": torch.ones(2)}, "module": {"class": "a:Tiny"},
    "trainer": {"precision": "32-true"}, "versions": {"torch": "2.6", "device": "cpu"}, "notes": [], "left_out": [],
}  # fmt: skip


def summary_of(path="a.pt", **changes):
    return summary({**BUNDLE, **changes}, Path(path))


def test_it_lists_what_there_is_and_what_is_not():
    text = summary_of(
        "my runs/step-00000007.pt",
        left_out=["batch['meta'] (Custom)"],
        notes=["Steps were judged one step late (lag=1)."],
        diagnosis={"text": "Something is wrong.\n\nSigns\n  - one", "data": {}},
    )
    assert text.startswith("GradGuard halted training before step 7: nonfinite.\n\nSomething is wrong.")
    for line in (
        "  statistics  steps 3 to 7, 2 tensors (SGD)",
        "  batch       number 5, 0.2 kB",
        "  weights     2 tensors, 0.0 kB",
        "  left out    batch['meta'] (Custom)",
        "  module      a:Tiny, precision 32-true",
        "  versions    torch 2.6, device cpu",
        "  note        Steps were judged one step late (lag=1).",
        "  gradguard replay 'my runs/step-00000007.pt' --module a:Tiny",
    ):
        assert line in text.splitlines(), line


def test_an_error_in_one_of_many_processes():
    text = summary_of(
        reason="exception", rank=1, world_size=4, target=None, message="KeyError: 'a'\nmore", parts=[], weights=None
    )  # fmt: skip
    assert text.startswith("Training ended with an error at step 7: KeyError: 'a'.\n")
    assert "process     rank 1 of 4" in text
    assert "gradguard replay" not in text
    assert "weights" not in text


def test_a_signal():
    text = summary_of(reason="sigterm", target=None, message="SIGTERMException: ")
    assert text.startswith("Training was ended by a signal (SIGTERM) at step 7.\n")


def test_all_lines_fit_on_a_terminal():
    versions = {f"package{i}": "1.2.3" for i in range(20)}
    assert max(map(len, summary_of(versions=versions).splitlines())) <= 100


def test_control_characters_of_a_file_do_not_reach_the_terminal():
    text = summary_of(notes=["\x1b[2Jgone"], module={"class": "a; rm -r b"})
    assert "?[2Jgone" in text
    assert "--module 'a; rm -r b'" in text


@pytest.mark.parametrize(
    ("texts", "arguments"),
    [
        ([], {}),
        (["lr=0.1", "name=adam", "deep=true"], {"lr": 0.1, "name": "adam", "deep": True}),
        (["layers=[1, 2]"], {"layers": [1, 2]}),
        (['{"a": 1}', "b=x=y"], {"a": 1, "b": "x=y"}),
        (["empty="], {"empty": ""}),
    ],
)
def test_arguments_are_parsed(texts, arguments):
    assert parse_arguments(texts) == arguments


@pytest.mark.parametrize("text", ["lr", "[1]", "a b=1", "3"])
def test_what_is_no_argument_is_refused(text):
    with pytest.raises(CommandError, match="--args must be name=value or a JSON object, got"):
        parse_arguments([text])
