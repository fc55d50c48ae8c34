"""What is encoded is decoded again, loads without running code, and stores no more than it shows."""

import dataclasses
import io
from collections import OrderedDict, UserDict, namedtuple
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from lightning_gradguard.flight_recorder.serialization import decode, describe, encode, size_of

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    label: int


class Colour(Enum):
    RED = "red"


class Custom:
    """A class that is not supported."""


def through_a_file(plain):
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def round_trip(value):
    left_out = []
    plain = encode(value, "batch", left_out)
    return decode(through_a_file(plain)), left_out


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
nested = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(nested)
def test_plain_containers_are_unchanged(value):
    back, left_out = round_trip(value)
    assert back == value
    assert type(back) is type(value)
    assert left_out == []


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 2),
        torch.randn(3).bfloat16(),
        torch.arange(3),
        torch.tensor(True),
        torch.randn(4, 4).T,
        torch.zeros(1).expand(5, 3),
        torch.randn(2, 3).to_sparse(),
        torch.empty(0, 3),
        torch.randn(3, requires_grad=True) * 2,
        nn.Parameter(torch.ones(2)),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}",
)
def test_tensors_are_unchanged(tensor):
    back, left_out = round_trip([tensor])
    assert torch.equal(back[0].to_dense(), tensor.detach().to_dense())
    assert (back[0].dtype, back[0].layout, left_out) == (tensor.dtype, tensor.layout, [])


def test_a_batch_that_is_a_view_of_the_data_set_is_stored_without_it():
    data = torch.randn(10_000, 8)
    plain = encode((data[:4], data[4]), "batch", [])
    assert size_of(plain) == 5 * 8 * 4
    assert torch.equal(decode(plain)[0], data[:4])


def test_shared_memory_counts_once():
    tensor = torch.randn(100)
    assert size_of([tensor, tensor.view(10, 10), {"a": tensor}]) == 400


def test_dataclasses_and_named_tuples_keep_names_and_fields():
    sample, _ = round_trip(Sample(torch.ones(2), 3))
    assert (sample.image.tolist(), sample.label, type(sample).__name__) == ([1, 1], 3, "Sample")
    first, second = pair = round_trip(Pair(1, [2]))[0]
    assert (first, second, pair.second) == (1, [2], [2])


def test_entries_of_other_mappings_are_attributes_too():
    back, _ = round_trip(UserDict(image=torch.ones(1), label=2))
    assert (back["label"], back.label, dict(**back)["label"]) == (2, 2, 2)
    with pytest.raises(AttributeError, match="the recorded batch has no entry 'other'"):
        _ = back.other
    assert type(round_trip(OrderedDict(a=1))[0]) is dict


def test_arrays_numbers_enums_paths_and_packed_sequences():
    value = [np.arange(3), np.float32(2.5), Colour.RED, Path("a/b"), torch.Size([2]), {1, 2}, torch.float16]
    (array, number, colour, path, size, some, dtype), left_out = round_trip(value)
    assert array.tolist() == [0, 1, 2]
    assert (number, colour, path, size, some, dtype) == (2.5, "red", "a/b", (2,), {1, 2}, torch.float16)
    assert left_out == []
    packed = pack_sequence([torch.ones(3, 2), torch.zeros(1, 2)])
    back = round_trip(packed)[0]
    assert torch.equal(back.data, packed.data)
    assert nn.LSTM(2, 2)(back)[0].data.shape == (4, 2)


def test_unsupported_parts_are_listed_and_decode_to_none():
    back, left_out = round_trip({"x": torch.ones(1), "meta": [Custom(), 1], "words": np.array(["a"])})
    assert back["x"].tolist() == [1]
    assert (back["meta"], back["words"]) == ([None, 1], None)
    assert left_out == ["batch['meta'][0] (Custom)", "batch['words'] (ndarray)"]


def test_a_container_that_holds_itself_is_left_out():
    circle = []
    circle.append(circle)
    _, left_out = round_trip({"a": 1, "circle": circle})
    assert left_out
    assert left_out[0].startswith("batch['circle']")


def test_changing_a_decoded_value_does_not_change_the_encoded_one():
    plain = encode({"x": torch.zeros(2)}, "batch", [])
    decode(plain)["x"].add_(1)
    assert decode(plain)["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "plain",
    [
        {"is": "module", "of": []},
        {"is": "dataclass", "name": "A", "keys": ["x): pass\nprint('run')\ndef f(self"], "of": [1]},
        {"is": "namedtuple", "name": "A b", "keys": ["x"], "of": [1]},
        {"is": "dataclass", "name": "A", "keys": ["class"], "of": [1]},
    ],
)
def test_names_from_a_file_are_never_run_as_code(plain, capsys):
    with pytest.raises(ValueError, match="holds a"):
        decode(plain)
    assert capsys.readouterr().out == ""


def test_a_description_is_plain():
    described = describe({Colour.RED: Sample(torch.ones(1), 2), "n": (1, None, Custom)})
    assert described["red"] == {"image": "tensor([1.])", "label": 2}
    assert described["n"][:2] == [1, None]
    assert through_a_file(described) == described


def test_all_tensors_of_an_encoded_value_count():
    assert size_of(encode({"a": [torch.ones(1)], "b": (torch.zeros(2), 3)}, "batch", [])) == 3 * 4
