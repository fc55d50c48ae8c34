"""The tilts are those that the verdict rests on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.introspection.gradient_profile import dead_share, depth_tilt, layer_profile
from lightning_gradguard.introspection.sandbox import sandbox
from lightning_gradguard.introspection.sequence_probe import SandboxedSequenceProbe, SequenceGradientProbe
from lightning_gradguard.stats import trends
from lightning_gradguard.stats.grad_stats import Layout


@given(st.lists(st.floats(-30, 5), max_size=20))
def test_the_tilt_over_depth_is_the_verdicts(profile):
    layout = Layout.of({str(i): torch.zeros(2, 2) for i in range(max(len(profile), 1))})
    live = torch.ones(len(layout.names), dtype=torch.bool)
    reference = trends.depth_tilt(torch.tensor([*profile, *[0.0] * (not profile)]), live, layout).item()
    tilt = depth_tilt(profile)
    assert (tilt is None) == math.isnan(reference)
    assert tilt is None or tilt == pytest.approx(reference, abs=1e-3)


def test_a_deep_profile_is_thinned_out():
    assert depth_tilt([0.01 * i for i in range(2000)]) == pytest.approx(19.99)


def test_layers_without_a_gradient_do_not_count():
    parameters = {name: nn.Parameter(torch.full((2, 2), 0.5)) for name in "abcd"}
    parameters["a"].grad = torch.full((2, 2), 0.05)
    parameters["b"].grad = torch.zeros(2, 2)
    parameters["c"].grad = torch.full((2, 2), math.inf)
    assert layer_profile(parameters, ["a", "b", "c", "d", "missing"]) == pytest.approx([-1.0])
    assert dead_share(parameters, "abcd") == 1.0
    parameters["b"].grad[0] = 1.0
    assert dead_share(parameters, "abcd") == 0.5


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM])
def test_the_tilt_over_time_is_the_verdicts(kind):
    model, x = kind(3, 4, batch_first=True), torch.randn(5, 30, 3)
    spy = SequenceGradientProbe(frozenset(id(p) for p in model.parameters()))
    model(x)[0][:, -1].sum().backward()
    reference = spy.close().item()
    with sandbox(model):
        times = SandboxedSequenceProbe(model)
        model(x)[0][:, -1].sum().backward()
        assert times.take() == pytest.approx(reference, rel=1e-4)
        assert times.take() is None
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
        times = SandboxedSequenceProbe(module)
        if module[0] is layer:
            out = layer(x)[0][-1]
        else:
            state = None
            for step in x:
                state = cell(step, state)
            out = state[0] if isinstance(state, tuple) else state
        out.sum().backward()
        tilts.append(times.take())
    assert tilts[0] == pytest.approx(tilts[1], rel=1e-4)
    assert tilts[0] > 3
