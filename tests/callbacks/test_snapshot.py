"""Restored snapshots and lowered learning rates.

A snapshot is bit-identical for every optimizer, and rates stay low under every schedule.
"""

import copy

import pytest
import torch
from torch import nn

from lightning_gradguard.callbacks.rollback import Snapshot, lower_rates

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
}


def net_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def train(net, optimizer, steps, start=0):
    for number in range(start, start + steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def state_of(net, optimizer):
    return copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_training_continues_from_a_restored_snapshot_bit_for_bit(kind, before):
    net = net_of()
    optimizer = OPTIMIZERS[kind](net.parameters())
    train(net, optimizer, before)
    snapshot, held = Snapshot(net, [optimizer]), state_of(net, optimizer)
    train(net, optimizer, 4, start=before)
    reference = state_of(net, optimizer)
    for _ in range(2):  # it can be gone back to more than once
        with torch.no_grad():
            [p.fill_(float("nan")) for p in net.parameters()]
        snapshot.restore()
        assert equal(state_of(net, optimizer), held)
        assert all(p.grad is None for p in net.parameters())
        train(net, optimizer, 4, start=before)
        assert equal(state_of(net, optimizer), reference)


def test_its_size_is_that_of_model_and_optimizer():
    net = net_of()
    optimizer = torch.optim.Adam(net.parameters())
    numbers = sum(p.numel() for p in net.parameters())
    buffers = sum(b.numel() * b.element_size() for b in net.buffers())
    assert Snapshot(net, [optimizer]).nbytes == 4 * numbers + buffers
    train(net, optimizer, 1)
    steps = 4 * len(list(net.parameters()))
    assert Snapshot(net, [optimizer]).nbytes == 3 * 4 * numbers + buffers + steps


SCHEDULES = {
    "none": lambda o: None,
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 3),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
            torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        ],
        milestones=[5],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.filterwarnings("ignore")
def test_lowered_rates_stay_lowered_under_a_schedule(kind):
    def rates(factor):
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.4)
        scheduler = SCHEDULES[kind](optimizer)
        seen = []
        for step in range(12):
            if step == 4 and factor != 1:
                before, after = lower_rates([optimizer], [scheduler] if scheduler else [], factor)
                assert after == pytest.approx(before * factor)
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return seen

    plain, lowered = rates(1), rates(0.25)
    assert lowered[:4] == plain[:4]
    assert lowered[4:] == pytest.approx([0.25 * rate for rate in plain[4:]])


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters(), lr=rate, capturable=False, foreach=False)
    own = optimizer.param_groups[0]["lr"]
    lower_rates([optimizer], [], 0.5)
    assert optimizer.param_groups[0]["lr"] is own
    assert float(own) == 0.25
