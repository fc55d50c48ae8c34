"""The structure of a pass: layers, what follows them, and what is applied again and again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.introspection.layer_calls import LOOP, StructureRecorder


def structure_of(module, x):
    with StructureRecorder(module) as recorder:
        module(x)
    return recorder.structure


class Loop(nn.Module):
    """Applies one layer so many times."""

    def __init__(self, times):
        super().__init__()
        self.layer, self.times = nn.Linear(4, 4), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x).tanh()
        return x


@pytest.mark.parametrize(("times", "repeated"), [(LOOP - 1, set()), (LOOP, {"layer.weight"})])
def test_a_weight_that_is_applied_four_times_is_a_recurrence(times, repeated):
    structure = structure_of(Loop(times), torch.ones(2, 4))
    assert structure.repeated == repeated
    assert structure.last == times - 1
    assert structure.activations == ["tanh"] * times


def test_what_follows_a_layer_belongs_to_it():
    module = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 6), nn.Dropout(0.0), nn.Tanh()
    )
    structure = structure_of(module, torch.ones(2, 4))
    assert structure.weights == [("0.weight", "0.bias"), ("3.weight", "3.bias")]
    assert structure.square == {1}
    assert structure.normalised == {0}
    assert structure.activated == {0, 1}
    assert structure.activations == ["relu", "tanh"]


def test_a_product_with_a_parameter_is_a_layer_and_any_other_is_none():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            x = x @ self.w.T
            return F.softmax(x @ x.T, 1) @ x

    assert structure_of(Products(), torch.ones(2, 4)).weights == [("w", None)]
