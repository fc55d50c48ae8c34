"""A value has a form, or the message names the first place that differs."""

import pytest
import torch

from lightning_gradguard.forms import Each, FormError, Maybe, OrMissing, Row, check_form, form_like, short
from lightning_gradguard.printing import one_line

FORM = {
    "step": int,
    "loss": Maybe(float),
    "names": [str],
    "counts": Each(int),
    "pair": (int, str),
    "state": torch.zeros(2, 3),
    "row": Row(torch.int64),
    "note": OrMissing(str),
    "flag": bool,
}
VALUE = {
    "step": 3, "loss": 1, "names": ("a", "b"), "counts": {"x": 1}, "pair": [1, "a"], "state": torch.ones(2, 3),
    "row": torch.arange(9), "flag": True, "further": object(),
}  # fmt: skip


def test_a_value_of_the_form_passes():
    check_form(VALUE, FORM, "it")
    check_form({**VALUE, "loss": None, "note": "x", "names": []}, FORM, "it")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": True}, "it['step'] must be a whole number, got True"),
        ({"step": 1.0}, "it['step'] must be a whole number, got 1.0"),
        ({"step": 2**63}, "it['step'] must be a whole number, got 9223372036854775808"),
        ({"loss": -(10**400)}, "it['loss'] must be a number, got -1000"),
        ({"loss": "1"}, "it['loss'] must be a number, got '1'"),
        ({"names": ["a", 3]}, "it['names'][1] must be of type str, got 3"),
        ({"names": "ab"}, "it['names'] must be a list, got 'ab'"),
        ({"counts": {"x": "y"}}, "it['counts']['x'] must be a whole number, got 'y'"),
        ({"counts": {3: 1}}, "it['counts'] must be a dict whose keys are strings, got 3"),
        ({"counts": 1}, "it['counts'] must be a dict, got 1"),
        ({"pair": [1]}, "it['pair'] must be a list of 2, got [1]"),
        (
            {"state": torch.ones(3, 2)},
            "it['state'] must be a tensor of (2, 3), torch.float32, got a tensor of (3, 2)",
        ),
        ({"state": torch.ones(2, 3).double()}, "got a tensor of (2, 3), torch.float64"),
        ({"state": torch.ones(2, 3).to_sparse()}, "it['state'] must be a tensor of (2, 3)"),
        ({"state": torch.ones(2, 3, device="meta")}, "it['state'] must be a tensor of (2, 3)"),
        (
            {"row": torch.zeros(2, 2, dtype=torch.int64)},
            "it['row'] must be a tensor with one dimension, torch.int64",
        ),
        ({"note": 3}, "it['note'] must be of type str, got 3"),
        ({"flag": 1}, "it['flag'] must be of type bool, got 1"),
    ],
    ids=str,
)
def test_the_message_names_the_place(change, problem):
    with pytest.raises(FormError) as caught:
        check_form({**VALUE, **change}, FORM, "it")
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", [name for name in FORM if name != "note"])
def test_a_missing_entry_is_named(name):
    with pytest.raises(FormError, match=rf"^it\['{name}'\] is missing$"):
        check_form({key: part for key, part in VALUE.items() if key != name}, FORM, "it")


def test_the_form_of_an_example():
    example = {"a": 1, "b": {"c": "x"}, "t": torch.zeros(2), "l": [1], "n": None}
    check_form(example, form_like(example), "it")
    check_form({**example, "l": 3, "n": "x"}, form_like(example), "it")
    with pytest.raises(FormError, match="must be a tensor of"):
        check_form({**example, "t": torch.zeros(3)}, form_like(example), "it")


def test_a_value_is_short_whatever_it_is():
    deep = circle = []
    for _ in range(100_000):
        deep = [deep]
    circle.append(circle)

    class Odd:
        def __repr__(self):
            raise RuntimeError

    for value in (deep, circle, 10**5000, "x" * 10**6, {i: i for i in range(99)}, Odd(), "a\nb"):
        assert len(short(value)) <= 40
        assert "\n" not in short(value)


def test_a_line_is_bounded_and_printable():
    assert one_line("a\x1b[2J\n\tb\ud800") == "a?[2J b?"
    assert len(one_line("x" * 9999)) == 1000
