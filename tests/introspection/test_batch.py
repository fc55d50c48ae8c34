"""Tensors in nested batches are found and replaced, and NaN and Inf are named with their rows."""

import math
from collections import UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch

from lightning_gradguard.introspection.batch import (
    find_nonfinite,
    inputs_and_targets,
    is_finite,
    map_tensors,
    tensors_of,
)


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
        (Pair(torch.ones(2), spoiled(2)), "batch.y"),
        ([Sample(spoiled(2))], "batch[0].image"),
    ],
)
def test_nan_is_found_in_every_container(batch, path):
    assert [(e.path, e.rows, e.values) for e in find_nonfinite(batch)] == [(path, (2,), "NaN")]


def test_finite_tensors_and_other_values_are_no_entries():
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


def test_tensors_that_cannot_be_read_count_as_finite():
    assert is_finite(torch.empty(3, device="meta"))
    assert is_finite(torch.arange(3))
    assert not is_finite(torch.tensor([complex(math.nan, 0)]))
    assert [path for path, _ in tensors_of(3)] == []


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(3),
        [torch.ones(3), "text"],
        (torch.ones(3), None),
        {"x": [torch.ones(3)], "n": 1},
        UserDict(x=torch.ones(3)),
        MappingProxyType({"x": torch.ones(3)}),
        defaultdict(list, x=torch.ones(3)),
        Pair(torch.ones(2), (torch.ones(3),)),
        [Sample(torch.ones(2), "y")],
    ],
)
def test_tensors_are_replaced_in_every_container(batch):
    paths = [(path, (2 * tensor).tolist()) for path, tensor in tensors_of(batch)]
    mapped = map_tensors(batch, lambda tensor: 2 * tensor)
    assert type(mapped) is type(batch)
    assert [(path, tensor.tolist()) for path, tensor in tensors_of(mapped)] == paths
    assert all(bool((tensor == 1).all()) for _, tensor in tensors_of(batch))


def test_other_values_and_default_factories_are_kept():
    batch = defaultdict(list, x=torch.ones(2), name="text", sample=Sample(torch.ones(1), "y"))
    mapped = map_tensors(batch, torch.zeros_like)
    assert mapped["missing"] == []
    assert (mapped["name"], mapped["sample"].name) == ("text", "y")
    assert "missing" not in batch


@pytest.mark.parametrize("key", ["y", "Label", "targets"])
def test_targets_of_a_mapping_are_known_by_their_name(key):
    x, y = torch.ones(2), torch.zeros(2)
    inputs, targets = inputs_and_targets({"image": x, "nested": {key: y}})
    assert (inputs is x, targets is y) == (True, True)
    assert inputs_and_targets({"image": x, f"my_{key}": y}) == (None, None)


class Graph:
    """Batch that keeps its attributes in a store of its own, as graph libraries do."""

    def __init__(self, **store):
        self.__dict__["_store"] = store

    def __getattr__(self, name):
        try:
            return self.__dict__["_store"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self._store[name] = value

    def __copy__(self):
        return type(self)(**self._store)

    def keys(self):
        return list(self._store)

    def __getitem__(self, key):
        return self._store[key]


class TypedGraph(Graph):
    """Batch that tells its entries as nested dicts."""

    def to_dict(self):
        return {"paper": {"x": self.x}, "y": self.y}


class Slotted:
    __slots__ = ("other", "x")

    def __init__(self, x):
        self.x, self.other = x, self


class Plain:
    def __init__(self, x):
        self.x, self.net, self.me, self.name = x, torch.nn.Linear(2, 2), self, "plain"
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1)

    @property
    def fails(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("batch", "path"),
    [
        (Graph(x=spoiled(2), y=torch.ones(3)), "batch.x"),
        ([Graph(x=torch.ones(2)), {"g": Graph(edge=spoiled(2))}], "batch[1]['g'].edge"),
        (TypedGraph(x=spoiled(2), y=torch.ones(3)), "batch['paper']['x']"),
        (Slotted(spoiled(2)), "batch.x"),
        (Plain(spoiled(2)), "batch.x"),
    ],
)
def test_nan_is_found_in_objects(batch, path):
    assert [(e.path, e.rows, e.values) for e in find_nonfinite(batch)] == [(path, (2,), "NaN")]


@pytest.mark.parametrize("kind", [lambda x: Graph(x=x), Slotted, Plain])
def test_objects_are_copied_with_other_tensors(kind):
    batch = kind(torch.ones(3))
    made = map_tensors(batch, lambda tensor: tensor * 2)
    assert type(made) is type(batch)
    assert (float(made.x.sum()), float(batch.x.sum())) == (6.0, 3.0)


def test_objects_without_tensors_are_shared():
    class Empty:
        pass

    batch = [Empty(), torch.nn.Linear(1, 1), torch.device("cpu"), print]
    made = map_tensors(batch, lambda tensor: tensor + 1)
    assert all(new is old for new, old in zip(made, batch, strict=True))
    assert list(tensors_of(batch)) == []


def test_a_whole_data_set_in_an_object_is_not_looked_into():
    batch = Plain(torch.ones(2))
    batch.samples = [torch.ones(1)] * 20_000
    assert [path for path, _ in tensors_of(batch)] == ["batch.x"]


def test_inputs_and_targets_of_an_object_are_known_by_name():
    x, y = torch.ones(3, 2), torch.zeros(3)
    assert inputs_and_targets(Graph(x=x, edge_index=torch.ones(2, 3, dtype=torch.long), y=y)) == (x, y)
    assert inputs_and_targets(Graph(x=x, weight=y)) == (None, None)
    assert inputs_and_targets(Pair(x, y)) == (x, y)


def test_the_target_comes_after_an_entry_that_holds_all_inputs():
    known, tokens, y = torch.ones(3, 2), torch.ones(3, dtype=torch.long), torch.zeros(3)
    assert inputs_and_targets(({"tokens": tokens, "known": known}, (y, None))) == (known, y)
    assert inputs_and_targets([[known, known + 1], y]) == (None, y)
    assert inputs_and_targets(([tokens], [y])) == (None, y)
    assert inputs_and_targets(([known], tokens)) == (known, None)
    assert inputs_and_targets([{"x": known, "y": y}, {"x": known, "y": y}])[1] is y
