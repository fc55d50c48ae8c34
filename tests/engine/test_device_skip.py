"""Skipping on the device: found_inf is set for one step only, and no step starts from uninitialised momentum."""

import math
import warnings

import pytest
import torch
from torch import nn

from lightning_gradguard import GradientHalt, Guard, NormClip, Policy

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def backward(model, step, spoil=False):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
    model.zero_grad()
    (loss * (math.nan if spoil else 1.0)).backward()
    return loss


def sound(model, optimizer):
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return all(t.isfinite().all() for t in [*model.parameters(), *moments])


@pytest.fixture
def uninitialised():
    """Fill uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("spoilt", [(0,), (5,), (5, 6), (11,)])
def test_two_guards_of_one_optimizer(spoilt):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guards = [
        Guard(model.named_parameters(), optimizer=optimizer, lag=1, clipper=clipper)
        for clipper in (NormClip(0.1), None)
    ]
    for step in range(12):
        loss = backward(model, step)
        before = [p.clone() for p in model.parameters()]
        # One of them alone is given the bad loss, so the other's verdict must not replace its own.
        for index, guard in enumerate(guards):
            guard.step(loss=loss * (math.nan if step in spoilt and index == step % 2 else 1.0))
        optimizer.step()
        kept = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert kept == (step in spoilt)
        assert "found_inf" not in optimizer.__dict__
    for index, guard in enumerate(guards):
        guard.close()
        assert guard.counts["skipped"] == sum(step % 2 == index for step in spoilt)
    assert sound(model, optimizer)


@pytest.mark.usefixtures("uninitialised")
def test_a_group_added_at_a_bad_step_starts_with_the_next():
    model, extra = network(), nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    guard = Guard([*model.named_parameters(), *extra.named_parameters("extra")], optimizer=optimizer, lag=1)
    whole = nn.Sequential(extra, model)
    for step in range(12):
        if step == 6:
            optimizer.add_param_group({"params": extra.parameters()})
        guard.step(loss=backward(whole, step, spoil=step == 6))
        optimizer.step()
    guard.close()
    assert guard.counts["skipped"] == 1
    assert sound(whole, optimizer)


def test_a_halt_leaves_nothing_on_the_optimizer():
    """A caller who catches the halt can continue, even with a step of their own."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = Guard(model.named_parameters(), optimizer=optimizer, lag=1, policy=Policy.strict())
    with warnings.catch_warnings(), pytest.raises(GradientHalt) as caught:
        warnings.simplefilter("ignore")
        for step in range(12):
            guard.step(loss=backward(model, step, spoil=step in (5, 6)))
            optimizer.step()
    assert caught.value.step == 5
    assert "found_inf" not in optimizer.__dict__
    # The step under way is not taken, whoever calls it.
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert sound(model, optimizer)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("clipper", [None, NormClip(0.01)], ids=repr)
def test_sparse_gradients_of_a_bad_step_are_set_to_zero(clipper):
    torch.manual_seed(0)
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    guard = Guard(table.named_parameters(), optimizer=optimizer, lag=1, clipper=clipper)
    for step in range(6):
        before = table.weight.detach().clone()
        optimizer.zero_grad()
        loss = table(torch.tensor([1, step, 1])).square().sum() * (math.nan if step in (0, 3) else 1.0)
        loss.backward()
        guard.step(loss=loss)
        if clipper is not None and table.weight.grad is not None:
            assert table.weight.grad.coalesce().values().norm() <= 0.01 * (1 + 1e-5)
        optimizer.step()
        assert torch.equal(table.weight, before) == (step in (0, 3))
    guard.close()
    assert guard.counts["skipped"] == 2
    assert table.weight.isfinite().all()
