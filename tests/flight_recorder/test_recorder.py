"""Arguments of a recorder: what it accepts and refuses."""

from pathlib import Path

import pytest

from lightning_gradguard import Recorder


def test_equal_settings_print_alike_and_are_equal():
    assert Recorder(on=["halt", "sigterm"]) == Recorder(on=("halt", "sigterm"))
    assert repr(Recorder(steps=5)) == repr(Recorder(steps=5)) != repr(Recorder())


@pytest.mark.parametrize("folder", [None, "here", Path("there")])
def test_any_path_is_accepted(folder):
    assert Recorder(folder=folder).folder == folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"folder": 3}, "folder must be a path, or None for the trainer's, got 3"),
        ({"folder": ""}, "folder must be a path"),
        ({"steps": 0}, "steps must be a whole number, 1 or more, got 0"),
        ({"steps": True}, "steps must be a whole number"),
        ({"max_bytes": 1.5}, "max_bytes must be a whole number, 1 or more, got 1.5"),
        ({"keep": -1}, "keep must be a whole number, 1 or more, got -1"),
        ({"keep_batch": "yes"}, "keep_batch must be True or False, got 'yes'"),
        ({"on": "halt"}, r"on must be a sequence of some of .* such as \('halt',\), got 'halt'"),
        ({"on": ("halt", "ctrl+c")}, "on must be a sequence"),
        ({"on": None}, "on must be a sequence"),
    ],
)
def test_wrong_values_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Recorder(**arguments)
