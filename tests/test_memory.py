"""Memory of a guard by number and size of tensors; no time is measured."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cost import memory
from benchmarks.cost.memory import after_steps, held, python_bytes
from benchmarks.cost.models import tensors
from lightning_gradguard import SpikeClip, SteadyClip

TENSORS = (torch.Tensor,)


@pytest.fixture(scope="module", params=[SpikeClip, SteadyClip])
def clipper(request):
    """Class of the clipper that guards have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "SpikeClip", request.param)
        yield request.param


@pytest.fixture(scope="module")
def guards(clipper):
    """Return guards with default detectors and a clipper after 24 steps, by number and side of the tensors."""
    return {
        (n, side): after_steps(tensors([(side, side)] * n))
        for n, side in ((1000, 32), (2000, 32), (1000, 64))
    }


def test_thousand_tensors_need_less_than_a_megabyte(guards, clipper):
    assert isinstance(guards[1000, 32].clipper, clipper)
    by_holder = held(guards[1000, 32], TENSORS)
    assert by_holder.total() < 1e6, by_holder.most_common(5)


def test_memory_is_linear_in_number_of_tensors(guards):
    one, two = (held(guards[n, 32]).total() for n in (1000, 2000))
    assert 1.5 * one < two <= 2.2 * one


def test_memory_does_not_depend_on_tensor_size(guards):
    small, large = (held(guards[1000, side]).total() for side in (32, 64))
    assert abs(large - small) <= 0.1 * small


def test_step_leaks_no_memory(clipper):
    short, long = (after_steps(tensors([(8, 8)] * 50), steps) for steps in (100, 236))
    for guard in (short, long):
        guard.flush()  # up to seven steps may be deferred
    assert held(long) == held(short)


def test_weight_samples_are_64_numbers_per_tensor(guards):
    assert held(guards[1000, 32])["tracker._before"] == 1000 * 64 * 4


def test_python_objects_depend_on_number_of_tensors_only():
    one, two, wide = (
        python_bytes(lambda n=n, side=side: after_steps(tensors([(side, side)] * n)))
        for n, side in ((60, 8), (120, 8), (60, 32))
    )
    assert two <= 2.2 * one
    assert abs(wide - one) <= 0.1 * one


def test_hidden_tensors_are_counted(guards):
    """Check the measurement itself: a tensor in a dict in an object counts once, a view of a weight does not."""
    guard = after_steps(tensors([(8, 8)] * 3))
    before = held(guard).total()
    extra = torch.zeros(1000)
    guard.fault_tracker.hidden = {"deep": [extra, extra[:10], (extra,)]}
    guard.fault_tracker.view = guard.tracker.layout.parameters[0].detach()[2:]
    assert held(guard).total() == before + 4000
    assert held(guard)["fault_tracker"] >= 4000
