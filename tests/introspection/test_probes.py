"""Probes of forward passes and of gradients over a sequence."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from lightning_gradguard import Guard
from lightning_gradguard.introspection.probes import (
    ForwardUsage,
    SandboxedSequenceProbe,
    SequenceGradientProbe,
    UnshardedParameterProbe,
)
from lightning_gradguard.introspection.sandbox import sandbox


def test_usage_records_called_modules_until_it_is_closed():
    used, idle = nn.Linear(2, 2), nn.Linear(2, 2)
    usage = ForwardUsage()
    used(torch.ones(1, 2))
    seen = usage.close()
    idle(torch.ones(1, 2))
    assert {id(p) for p in used.parameters()} <= seen
    assert not {id(p) for p in idle.parameters()} & usage.close()


def test_a_garbage_collected_usage_removes_its_hook():
    gc.collect()
    before = len(_global_forward_pre_hooks)
    usage = ForwardUsage()
    assert len(_global_forward_pre_hooks) == before + 1
    del usage
    gc.collect()
    assert len(_global_forward_pre_hooks) == before


@pytest.fixture
def sharded():
    """A linear layer that holds whole parameters while it is called, and its shards otherwise."""
    layer = nn.Linear(2, 4)
    whole = dict(layer._parameters)
    shards = {name: nn.Parameter(p.detach()[:2].clone()) for name, p in whole.items()}
    layer._parameters.update(shards)
    layer.register_forward_pre_hook(lambda *_: layer._parameters.update(whole))
    layer.register_forward_hook(lambda *_: layer._parameters.update(shards))
    return layer, shards, whole


def test_the_whole_parameter_is_found_by_its_shard(sharded):
    layer, shards, whole = sharded
    probe = UnshardedParameterProbe()
    assert not probe.seen
    layer(torch.ones(1, 2))
    assert probe.seen
    assert probe.close() == {id(shards[name]): whole[name] for name in ("weight", "bias")}


def test_a_pass_without_gradients_is_ignored(sharded):
    probe = UnshardedParameterProbe()
    with torch.no_grad():
        sharded[0](torch.ones(1, 2))
    assert not probe.seen
    assert probe.close() == {}


def test_a_closed_probe_records_nothing(sharded):
    probe = UnshardedParameterProbe()
    probe.close()
    sharded[0](torch.ones(1, 2))
    assert not probe.seen


def test_a_garbage_collected_probe_removes_its_hook_and_an_idle_one_has_none():
    gc.collect()
    before = len(_global_forward_hooks)
    probe = UnshardedParameterProbe()
    assert len(_global_forward_hooks) == before + 1
    del probe
    gc.collect()
    assert len(_global_forward_hooks) == before
    idle = UnshardedParameterProbe(idle=True)
    assert len(_global_forward_hooks) == before
    assert idle.close() == {}


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


def tilt_of(model, x, reduce=lambda out: out.square().sum()):
    probe = SequenceGradientProbe(frozenset(id(p) for p in model.parameters()))
    reduce(model(x)).backward()
    tilt = probe.close()
    return None if tilt is None else tilt.item()


@pytest.mark.parametrize(("gain", "decades"), [(0.5, 54 * 0.301), (1.0, 0.0), (1.1, -54 * 0.0414)])
def test_time_tilt_of_a_cell_by_hand(gain, decades):
    assert tilt_of(Cell(gain), torch.ones(2, 60, 8)) == pytest.approx(decades, abs=0.8)


def test_steps_at_the_end_that_get_nothing_do_not_count():
    """Such as padding: the tilt is that of the 40 steps before it."""
    torch.manual_seed(0)
    model = nn.RNN(8, 8, batch_first=True, nonlinearity="relu", bias=False)
    nn.init.eye_(model.weight_ih_l0)
    nn.init.eye_(model.weight_hh_l0).data.mul_(0.5)
    x = torch.rand(2, 60, 8) + 0.5
    padded = tilt_of(model, x, lambda out: out[0][:, 39].sum())
    # Both ends are means over a tenth, here of 60 steps.
    assert padded == pytest.approx(34 * 0.301, abs=0.8)


@pytest.mark.parametrize("batch_first", [True, False])
def test_time_tilt_of_a_fused_layer(batch_first):
    torch.manual_seed(0)
    model = nn.RNN(8, 8, batch_first=batch_first, nonlinearity="relu", bias=False)
    nn.init.eye_(model.weight_ih_l0)
    nn.init.eye_(model.weight_hh_l0).data.mul_(0.5)
    x = torch.rand(2, 60, 8) + 0.5
    last = (lambda out: out[0][:, -1].sum()) if batch_first else (lambda out: out[0][-1].sum())
    assert tilt_of(model, x if batch_first else x.transpose(0, 1), last) == pytest.approx(54 * 0.301, abs=0.8)


def test_the_probe_changes_no_gradient_and_leaves_no_hook():
    torch.manual_seed(0)
    model = nn.LSTM(4, 8, batch_first=True)
    x = torch.randn(2, 30, 4)
    model(x)[0].sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    before = len(_global_forward_hooks), len(_global_forward_pre_hooks)
    assert tilt_of(model, x, lambda out: out[0].sum()) is not None
    assert (len(_global_forward_hooks), len(_global_forward_pre_hooks)) == before
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, model.parameters(), strict=True))
    assert not x.requires_grad


def test_short_sequences_and_unused_models_have_no_tilt():
    assert tilt_of(Cell(0.5), torch.ones(2, 5, 8)) is None
    probe = SequenceGradientProbe(frozenset())
    assert probe.close() is None


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


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM])
def test_the_tilt_in_a_sandbox_equals_that_in_the_training(kind):
    model, x = kind(3, 4, batch_first=True), torch.randn(5, 30, 3)
    probe = SequenceGradientProbe(frozenset(id(p) for p in model.parameters()))
    model(x)[0][:, -1].sum().backward()
    reference = probe.close().item()
    with sandbox(model):
        inside = SandboxedSequenceProbe(model)
        model(x)[0][:, -1].sum().backward()
        assert inside.take() == pytest.approx(reference, rel=1e-4)
        assert inside.take() is None
    assert reference > 1


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_a_loop_over_a_cell_has_the_profile_of_the_layer(kind):
    """The same weights in a cell that is called once a step, and in a layer that takes the sequence."""
    torch.manual_seed(0)
    layer = {nn.RNNCell: nn.RNN, nn.GRUCell: nn.GRU, nn.LSTMCell: nn.LSTM}[kind](4, 6)
    cell = kind(4, 6)
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            parameter.copy_(getattr(layer, f"{name}_l0"))
    x = torch.randn(40, 3, 4)
    tilts = []
    for module in (nn.ModuleList([layer]), nn.ModuleList([cell])):
        probe = SandboxedSequenceProbe(module)
        if module[0] is layer:
            out = layer(x)[0][-1]
        else:
            state = None
            for step in x:
                state = cell(step, state)
            out = state[0] if isinstance(state, tuple) else state
        out.sum().backward()
        tilts.append(probe.take())
    assert tilts[0] == pytest.approx(tilts[1], rel=1e-4)
    assert tilts[0] > 3


@pytest.mark.parametrize(
    ("layer", "x", "norm"),
    [
        (nn.Linear(100, 2), torch.full((4, 100), 0.1), 1.0),
        (nn.Conv2d(1, 2, 3), torch.full((4, 1, 8, 8), 0.1), 0.3),
        (nn.Linear(100, 2, bias=False), torch.ones(4, 100), None),
        (nn.Embedding(9, 2), torch.ones(4, dtype=torch.long), None),
        (nn.LayerNorm(100), torch.ones(4, 100), None),  # it has no weight that multiplies its input
    ],
)
def test_the_first_input_is_measured_by_what_the_layer_weighs_together(layer, x, norm):
    usage = ForwardUsage()
    layer(x)
    found, own = usage.first_input
    usage.close()
    assert own == {id(p) for p in layer.parameters()}
    assert found is None if norm is None else found.item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.vmap(torch.func.jacrev(f))])
def test_no_tensor_of_a_function_transform_is_kept(transform):
    usage = ForwardUsage()
    transform(nn.Linear(3, 3))(torch.randn(4, 3))
    assert usage.first_input[0] is None
    usage.close()
