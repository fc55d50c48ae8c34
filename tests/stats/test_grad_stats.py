"""Values of `measure`, and contents of `Layout`."""

import math

import pytest
import torch
from torch import nn

from lightning_gradguard.stats.grad_stats import measure
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.norms import weight_norms


def parameters_of(*gradients):
    parameters = {}
    for i, gradient in enumerate(gradients):
        shape = gradient.shape if gradient is not None else (2,)
        dtype = gradient.dtype if gradient is not None else torch.float32
        parameters[f"p{i}"] = nn.Parameter(torch.ones(shape, dtype=dtype))
        parameters[f"p{i}"].grad = gradient
    return parameters


def stats_of(*gradients, loss=None):
    layout = Layout.of(parameters_of(*gradients))
    unknown = torch.full((len(gradients),), torch.nan)
    return measure(layout, weight_norms(layout), unknown, loss)


def test_presence_norms_and_total():
    stats = stats_of(torch.full((3,), 2.0), None, torch.full((4,), 1.0, dtype=torch.float64))
    assert stats.present.tolist() == [True, False, True]
    assert stats.norms.tolist() == pytest.approx([math.sqrt(12), 0.0, 2.0])
    assert stats.total.item() == pytest.approx(4.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_element_affects_its_own_norm_alone(bad):
    gradients = [torch.ones(50), torch.ones(50), torch.ones(50)]
    gradients[1][17] = bad
    stats = stats_of(*gradients)
    assert stats.norms.isfinite().tolist() == [True, False, True]
    assert not stats.finite


def test_a_norm_that_overflows_float32_is_not_finite():
    assert not stats_of(torch.full((4,), 3e19)).finite


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_nonfinite_loss_makes_the_step_nonfinite(loss):
    assert not stats_of(torch.ones(2), loss=torch.tensor(loss)).finite
    assert stats_of(torch.ones(2), loss=torch.tensor([1.0])).finite


def test_measuring_changes_nothing():
    gradient = torch.randn(7, 3)
    before = gradient.clone()
    stats_of(gradient)
    assert torch.equal(gradient, before)


def test_layers_exclude_vectors_and_embeddings_and_follow_the_order():
    parameters = {
        "emb": torch.ones(9, 4),
        "w2": torch.ones(4, 4),
        "b2": torch.ones(4),
        "w1": torch.ones(4, 4),
    }
    layout = Layout.of(parameters, order=[0, 3, 1, 2], embeddings=frozenset({"emb"}))
    assert layout.layers.tolist() == [3, 1]
    assert layout.depth.tolist() == [0.0, 2.0, 3.0, 1.0]
    assert layout.pairs.tolist() == [[[0]], [[1]]]


def test_pairs_are_bounded_for_thousands_of_layers():
    layout = Layout.of({f"w{i}": torch.ones(1, 1) for i in range(1500)})
    assert layout.pairs[0].numel() <= 4096


def test_a_zero_weight_has_a_floor_of_a_tenth_of_a_common_initialization():
    weight = torch.empty(64, 256)
    nn.init.xavier_normal_(weight)
    common = torch.linalg.vector_norm(weight).item()
    floor = Layout.of({"w": torch.zeros(64, 256)}).floors.item()
    assert 0.05 < floor / common < 0.2
