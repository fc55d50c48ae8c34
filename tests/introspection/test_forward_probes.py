"""What one forward pass shows: which parameters took part, and how gradients fall over time."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from lightning_gradguard import Guard
from lightning_gradguard.introspection.forward_probes import ForwardUsage
from lightning_gradguard.introspection.sequence_probe import SequenceGradientProbe


def test_usage_knows_what_was_called_and_stops():
    used, idle = nn.Linear(2, 2), nn.Linear(2, 2)
    usage = ForwardUsage()
    used(torch.ones(1, 2))
    seen = usage.close()
    idle(torch.ones(1, 2))
    assert {id(p) for p in used.parameters()} <= seen
    assert not {id(p) for p in idle.parameters()} & usage.close()


def test_a_forgotten_usage_takes_its_hook_along():
    gc.collect()
    before = len(_global_forward_pre_hooks)
    usage = ForwardUsage()
    assert len(_global_forward_pre_hooks) == before + 1
    del usage
    gc.collect()
    assert len(_global_forward_pre_hooks) == before


class Cell(nn.Module):
    """A recurrent net by hand, which multiplies its state by ``gain`` in each step."""

    def __init__(self, gain):
        super().__init__()
        self.step = nn.Linear(8, 8, bias=False)
        nn.init.eye_(self.step.weight).data.mul_(gain)

    def forward(self, x):
        h = torch.zeros(x.shape[0], 8)
        for t in range(x.shape[1]):
            h = self.step(h + x[:, t])
        return h


def spy(model, x, reduce=lambda out: out.square().sum()):
    watcher = SequenceGradientProbe(frozenset(id(p) for p in model.parameters()))
    reduce(model(x)).backward()
    tilt = watcher.close()
    return None if tilt is None else tilt.item()


@pytest.mark.parametrize(("gain", "decades"), [(0.5, 54 * 0.301), (1.0, 0.0), (1.1, -54 * 0.0414)])
def test_time_tilt_of_a_cell_by_hand(gain, decades):
    assert spy(Cell(gain), torch.ones(2, 60, 8)) == pytest.approx(decades, abs=0.8)


@pytest.mark.parametrize("batch_first", [True, False])
def test_time_tilt_of_a_fused_layer(batch_first):
    torch.manual_seed(0)
    model = nn.RNN(8, 8, batch_first=batch_first, nonlinearity="relu", bias=False)
    nn.init.eye_(model.weight_ih_l0)
    nn.init.eye_(model.weight_hh_l0).data.mul_(0.5)
    x = torch.rand(2, 60, 8) + 0.5
    last = (lambda out: out[0][:, -1].sum()) if batch_first else (lambda out: out[0][-1].sum())
    assert spy(model, x if batch_first else x.transpose(0, 1), last) == pytest.approx(54 * 0.301, abs=0.8)


def test_spying_changes_no_gradient_and_leaves_no_hook():
    torch.manual_seed(0)
    model = nn.LSTM(4, 8, batch_first=True)
    x = torch.randn(2, 30, 4)
    model(x)[0].sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    before = len(_global_forward_hooks), len(_global_forward_pre_hooks)
    assert spy(model, x, lambda out: out[0].sum()) is not None
    assert (len(_global_forward_hooks), len(_global_forward_pre_hooks)) == before
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, model.parameters(), strict=True))
    assert not x.requires_grad


def test_short_sequences_and_idle_models_say_nothing():
    assert spy(Cell(0.5), torch.ones(2, 5, 8)) is None
    watcher = SequenceGradientProbe(frozenset())
    assert watcher.close() is None


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_a_closed_guard_leaves_no_hook():
    model = nn.LSTM(4, 8, batch_first=True)
    gc.collect()
    before = len(_global_forward_hooks), len(_global_forward_pre_hooks)
    guard = Guard(model.named_parameters())
    for _ in range(33):
        model.zero_grad()
        loss = model(torch.randn(2, 30, 4))[0].square().sum() * 0 + 1.0
        loss.backward()
        guard.step(loss=loss)
    assert (len(_global_forward_hooks), len(_global_forward_pre_hooks)) != before
    guard.close()
    assert (len(_global_forward_hooks), len(_global_forward_pre_hooks)) == before
