"""Weights that are drawn again have the promised variance, and gated layers replace plain recurrent ones."""

import math

import pytest
import torch
from torch import nn

from lightning_gradguard.diagnosis.trials.weights import (
    add_gates_,
    has_gates,
    has_plain_recurrence,
    has_recurrence,
    initialise_,
    rewind_,
)
from lightning_gradguard.introspection.layer_calls import LayerStructure, StructureRecorder


def structure_of(model, *inputs):
    recorder = StructureRecorder(model)
    with recorder:
        model(*inputs)
    return recorder.structure


@pytest.mark.parametrize(
    ("how", "variance"), [("he", lambda i, o: 2 / i), ("xavier", lambda i, o: 2 / (i + o))]
)
def test_layers_are_drawn_again_and_biases_and_normalizations_are_reset(how, variance):
    model = nn.Sequential(nn.Embedding(9, 200), nn.Linear(200, 400), nn.LayerNorm(400), nn.Linear(400, 3))
    for parameter in model.parameters():
        parameter.data.fill_(5.0)
    plan = structure_of(model, torch.arange(9))
    random = torch.get_rng_state()
    initialise_(model, how, plan)
    assert torch.equal(random, torch.get_rng_state())
    assert model[1].weight.std().item() == pytest.approx(math.sqrt(variance(200, 400)), rel=0.02)
    assert not model[1].bias.any()
    assert not model[3].bias.any()
    assert torch.equal(model[2].weight, torch.ones(400))
    assert not model[2].bias.any()
    assert torch.equal(model[0].weight, torch.full((9, 200), 5.0))
    first = model[1].weight.clone()
    initialise_(model, how, plan)
    assert torch.equal(first, model[1].weight)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_matrices_become_orthogonal_and_nothing_else_changes(kind):
    model = nn.Sequential(kind(3, 5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    initialise_(model, "orthogonal", structure_of(model, torch.randn(4, 2, 3)))
    for block in model[0].weight_hh_l0.split(5):
        assert torch.allclose(block @ block.T, torch.eye(5), atol=1e-5)
    assert torch.equal(model[0].weight_ih_l0, before["0.weight_ih_l0"])
    bias = model[0].bias_ih_l0 + model[0].bias_hh_l0
    if kind is not nn.RNN:
        assert torch.equal(bias[5:10], torch.full((5,), 3.0))
    else:
        assert torch.equal(bias, before["0.bias_ih_l0"] + before["0.bias_hh_l0"])


@pytest.mark.parametrize("gates", ["GRU", "LSTM"])
def test_a_gated_layer_replaces_a_plain_one(gates):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(3, 5, num_layers=2, batch_first=True, bidirectional=True)

        def forward(self, x, state=None):
            return self.rnn(x, state)

    model, x, state = Model(), torch.randn(4, 7, 3), torch.randn(4, 4, 5)
    shapes = [[t.shape for t in model(*args)] for args in ((x,), (x, state))]
    assert has_recurrence(model)
    assert has_plain_recurrence(model)
    random = torch.get_rng_state()
    add_gates_(model, gates)
    assert torch.equal(random, torch.get_rng_state())
    assert isinstance(model.rnn, getattr(nn, gates))
    assert [[t.shape for t in model(*args)] for args in ((x,), (x, state))] == shapes
    assert has_recurrence(model)
    assert not has_plain_recurrence(model)
    assert not has_recurrence(nn.Linear(1, 1))


@pytest.mark.parametrize(("cell", "kept"), [(nn.LSTMCell, True), (nn.GRUCell, True), (nn.RNNCell, False)])
def test_gates_of_cells_are_set_to_keep_the_state(cell, kept):
    model = nn.ModuleDict({"cell": cell(3, 5)})
    initialise_(model, "orthogonal", LayerStructure())
    for block in model["cell"].weight_hh.split(5):
        assert torch.allclose(block @ block.T, torch.eye(5), atol=1e-5)
    bias = model["cell"].bias_ih + model["cell"].bias_hh
    assert torch.equal(bias[5:10], torch.full((5,), 3.0)) == kept
    assert has_recurrence(model)
    assert has_gates(model) == kept


def test_a_matrix_of_a_loop_becomes_orthogonal():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            for _ in range(5):
                x = self.step(x)
            return self.out(x)

    model = Loop()
    before = model.out.weight.detach().clone()
    plan = structure_of(model, torch.randn(3, 6))
    assert plan.repeated == {"step.weight"}
    initialise_(model, "orthogonal", plan)
    assert torch.allclose(model.step.weight @ model.step.weight.T, torch.eye(6), atol=1e-5)
    assert torch.equal(model.out.weight, before)


@pytest.mark.parametrize("grown", [3.0, 50.0, math.nan])
def test_weights_are_rewound_to_their_size_at_the_start(grown):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 4))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    norms = {name: p.norm().item() for name, p in start.items() if name != "1.bias"}
    with torch.no_grad():
        [p.mul_(grown) for p in model.parameters()]
    random = torch.get_rng_state()
    rewind_(model, norms)
    assert torch.equal(random, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        if name in norms:
            assert parameter.norm().item() == pytest.approx(norms[name], rel=1e-5)
    # What has grown little still points where it pointed; what has run away points anywhere.
    assert torch.allclose(model[0].weight, start["0.weight"], atol=1e-6) == (grown == 3.0)
    assert torch.equal(model[1].bias.isnan(), (start["1.bias"] * grown).isnan())
