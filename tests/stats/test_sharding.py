"""Parts of sharded tensors; ranks: e2e/test_sharded."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.stats.samples import SAMPLES, stride_of
from lightning_gradguard.stats.sharding import Shards, local, local_units, mean_over_ranks, spans_of

REPLICATE = SimpleNamespace()


def cut(dim, *, after_the_rest=False):
    placement = SimpleNamespace(dim=dim)
    if after_the_rest:  # what torch calls strided: FSDP2 over tensor parallel
        placement.split_factor = 2
    return placement


class ShardedTensor:
    """One rank's view of a tensor cut with `torch.chunk`."""

    device, requires_grad = torch.device("cpu"), False

    def __init__(self, whole, mesh, coordinate, placements):
        self.shape, self.placements = whole.shape, placements
        self.device_mesh = SimpleNamespace(
            size=lambda axis: mesh[axis], get_local_rank=lambda axis: coordinate[axis], device_type="cpu"
        )
        order = sorted(enumerate(placements), key=lambda pair: hasattr(pair[1], "split_factor"))
        for axis, placement in order:
            if hasattr(placement, "dim"):
                parts = whole.chunk(mesh[axis], placement.dim)
                rank = coordinate[axis]
                whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
        self.part = whole

    def to_local(self):
        return self.part


@st.composite
def sharded_tensors(draw):
    """Draw a tensor and its parts on a mesh."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    mesh = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    choices = [REPLICATE, *(cut(dim) for dim in range(len(shape)))]
    placements = [draw(st.sampled_from(choices)) for _ in mesh]
    if len(mesh) == 2 and hasattr(placements[1], "dim") and draw(st.booleans()):
        placements[0] = cut(placements[1].dim, after_the_rest=True)
    whole = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    coordinates = itertools.product(*(range(size) for size in mesh))
    return whole, [ShardedTensor(whole, mesh, coordinate, placements) for coordinate in coordinates]


@given(sharded_tensors())
def test_spans_are_those_of_the_part(tensors):
    whole, ranks = tensors
    for rank in ranks:
        box = tuple(slice(begin, end) for begin, end in spans_of(rank))
        assert torch.equal(whole[box], rank.part)


@given(tensors=sharded_tensors())
def test_every_element_counts_once(tensors):
    whole, ranks = tensors
    counted = torch.zeros_like(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_world_size", lambda: len(ranks))
        for rank in ranks:
            box = tuple(slice(begin, end) for begin, end in spans_of(rank))
            counted[box] += Shards.of([rank]).shares
    torch.testing.assert_close(counted, torch.ones_like(whole))


@given(tensors=sharded_tensors(), stride=st.integers(1, 5), most=st.integers(1, 9))
def test_ranks_together_hold_the_entries_that_one_process_reads(tensors, stride, most):
    whole, ranks = tensors
    wanted = whole.reshape(-1)[::stride][:most]
    found = torch.full_like(wanted, -1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_world_size", lambda: len(ranks))
        for rank in ranks:
            numbers, places = Shards.of([rank]).local_entries(0, tuple(whole.shape), stride, most)
            found[numbers] = rank.part.reshape(-1)[places]
    assert torch.equal(found, wanted)


@given(tensors=sharded_tensors())
def test_local_units_are_those_of_the_part(tensors):
    whole, ranks = tensors
    units = torch.arange(float(whole.shape[0])).reshape([-1] + [1] * (whole.ndim - 1))
    for rank in ranks:
        begin, end = spans_of(rank)[0]
        own = local_units(units, rank)
        assert own.numel() == 1 if len(units) == 1 else torch.equal(own, units[begin:end])
        assert (rank.part * own).shape == rank.part.shape


def test_a_complex_tensor_is_sampled_as_pairs(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    whole = torch.arange(10, dtype=torch.float32).to(torch.complex64)
    shape, found = (10, 2), []
    for rank in range(2):
        tensor = ShardedTensor(whole, (2,), (rank,), [cut(0)])
        numbers, places = Shards.of([tensor]).local_entries(0, shape, stride_of(shape), SAMPLES)
        found += torch.view_as_real(tensor.part).reshape(-1)[places].tolist()
        assert len(numbers) == 10
    assert found == torch.view_as_real(whole).reshape(-1).tolist()


def test_tensors_that_are_not_sharded_are_unchanged():
    tensor = torch.ones(3)
    assert Shards.of([tensor]) is None
    assert local(tensor) is tensor
    assert spans_of(tensor) == ((0, 3),)
    assert local_units(tensor, tensor) is tensor


def test_an_unknown_way_to_cut_is_refused():
    tensor = ShardedTensor(torch.ones(6), (2,), (0,), [cut(0)])
    tensor.part = torch.ones(5)
    with pytest.raises(ValueError, match="must be sharded as FSDP2 and tensor parallel do"):
        spans_of(tensor)


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [((2,), [cut(0)]), ((3,), [cut(1)]), ((2, 2), [REPLICATE, cut(0)]), ((2, 2), [cut(1), cut(0)])],
)
def test_squares_of_the_parts_add_up_to_the_norm_of_the_whole(ranks, mesh, placements):
    whole = torch.arange(12.0).reshape(4, 3)
    coordinates = list(itertools.product(*(range(size) for size in mesh)))

    def norm_of(rank):
        tensor = ShardedTensor(whole, mesh, coordinates[rank], placements)
        shards = Shards.of([tensor])
        return shards.sum_over_ranks([shards.squares(tensor.part.norm().reshape(1))])[0].sqrt()

    for norm in ranks(norm_of, len(coordinates)):
        assert norm.item() == pytest.approx(whole.norm().item())


def test_a_mean_over_ranks_is_the_same_on_each(ranks):
    for mean in ranks(lambda rank: mean_over_ranks(torch.tensor([float(rank), 6.0])), 3):
        assert mean.tolist() == [1.0, 6.0]
