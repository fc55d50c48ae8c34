"""What is not finite in a batch is found wherever it stands, and its rows are named."""

import math
from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from lightning_gradguard.introspection.batch import find_nonfinite, is_finite, tensors_of


@dataclass
class Sample:
    image: torch.Tensor
    name: str = "x"


Pair = namedtuple("Pair", "x y")


def spoiled(*rows, length=10, value=math.nan):
    x = torch.zeros(length, 3)
    x[list(rows), 1] = value
    return x


@pytest.mark.parametrize(
    ("batch", "path"),
    [
        (spoiled(2), "batch"),
        ((torch.ones(3), spoiled(2)), "batch[1]"),
        ({"image": [torch.ones(3), spoiled(2)]}, "batch['image'][1]"),
        (UserDict(image=spoiled(2)), "batch['image']"),
        (Pair(torch.ones(2), spoiled(2)), "batch[1]"),
        ([Sample(spoiled(2))], "batch[0].image"),
    ],
)
def test_every_nesting_is_searched(batch, path):
    assert [(e.path, e.rows, e.values) for e in find_nonfinite(batch)] == [(path, (2,), "NaN")]


def test_what_is_finite_or_no_tensor_is_no_entry():
    assert find_nonfinite((torch.ones(3), torch.arange(3), torch.zeros(0), "text", None, {"n": 1.0})) == ()


def test_at_most_eight_rows_are_named():
    (entry,) = find_nonfinite(spoiled(*range(10), value=-math.inf))
    assert entry.rows == tuple(range(10))
    assert str(entry) == "`batch` holds Inf in rows 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    (scalar,) = find_nonfinite({"y": torch.tensor(math.nan)})
    assert str(scalar) == "`batch['y']` holds NaN"


def test_both_values_are_named():
    (entry,) = find_nonfinite(torch.tensor([math.nan, 1.0, math.inf]))
    assert (entry.values, entry.rows) == ("NaN and Inf", (0, 2))


def test_what_cannot_be_looked_into_counts_as_finite():
    assert is_finite(torch.empty(3, device="meta"))
    assert is_finite(torch.arange(3))
    assert not is_finite(torch.tensor([complex(math.nan, 0)]))
    assert [path for path, _ in tensors_of(3)] == []
