"""`measure` against torch's own norms, over shapes, dtypes and layouts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.signals.norms import unit_norms, weight_means, weight_norms
from lightning_gradguard.signals.stats import Layout, measure


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


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]),
    seed=st.integers(0, 2**31),
)
def test_norms_are_torchs_norms(shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    stats = stats_of(*gradients)
    wide = [g.to(torch.complex128 if g.is_complex() else torch.float64) for g in gradients]
    expected = torch.stack([torch.linalg.vector_norm(g).to(torch.float64) for g in wide])
    torch.testing.assert_close(stats.norms.double(), expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(
        stats.total.double(), torch.linalg.vector_norm(expected), rtol=1e-5, atol=1e-12
    )


def test_dtypes_devices_and_missing_gradients_may_be_mixed():
    gradients = [
        torch.full((3,), 2.0), None, torch.full((4,), 1.0, dtype=torch.float64), torch.full((2,), 3.0, dtype=torch.half)
    ]  # fmt: skip
    stats = stats_of(*gradients)
    assert stats.norms.tolist() == pytest.approx([math.sqrt(12), 0.0, 2.0, math.sqrt(18)])
    assert stats.present.tolist() == [True, False, True, True]


def test_half_precision_does_not_overflow_in_its_own_range():
    assert stats_of(torch.full((100,), 60000.0, dtype=torch.half)).total.item() == pytest.approx(600000.0)


def test_sparse_gradients_are_coalesced_first():
    values = torch.tensor([[1.0, 2.0], [2.0, 2.0]])
    gradient = torch.sparse_coo_tensor([[1, 1]], values, (4, 2), check_invariants=True)
    assert stats_of(gradient).total.item() == pytest.approx(5.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element_is_seen_in_its_own_tensor_alone(bad):
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


def test_layers_leave_out_vectors_and_embeddings_and_follow_the_order():
    parameters = {
        "emb": torch.ones(9, 4),
        "w2": torch.ones(4, 4),
        "b2": torch.ones(4),
        "w1": torch.ones(4, 4),
    }
    layout = Layout.of(parameters, order=[0, 3, 1, 2], embeddings=frozenset({"emb"}))
    assert layout.layers.tolist() == [3, 1]
    assert layout.depth.tolist() == [0.0, 2.0, 3.0, 1.0]
    assert layout.pairs.tolist() == [[0], [1]]


def test_pairs_are_bounded_for_thousands_of_layers():
    layout = Layout.of({f"w{i}": torch.ones(1, 1) for i in range(1500)})
    assert layout.pairs.shape[1] < 2 * 4096


def test_a_zero_weight_has_a_floor_of_a_tenth_of_a_usual_initialisation():
    weight = torch.empty(64, 256)
    nn.init.xavier_normal_(weight)
    usual = torch.linalg.vector_norm(weight).item()
    floor = Layout.of({"w": torch.zeros(64, 256)}).floors.item()
    assert 0.05 < floor / usual < 0.2


def test_unit_norms_are_per_output_row():
    torch.testing.assert_close(
        unit_norms(torch.full((2, 3, 4), 2.0)).flatten(), torch.full((2,), math.sqrt(48))
    )
    assert unit_norms(torch.full((4,), 2.0)).item() == pytest.approx(4.0)
    assert unit_norms(torch.tensor(-3.0)).item() == pytest.approx(3.0)


def test_means_are_torchs_means():
    parameters = {
        "half": nn.Parameter(torch.randn(40).half()),
        "complex": nn.Parameter(torch.tensor([1 + 3j, 3 + 5j])),
        "empty": nn.Parameter(torch.ones(0)),
    }
    half, pairs, empty = weight_means(Layout.of(parameters)).tolist()
    assert half == pytest.approx(parameters["half"].float().mean().item(), rel=1e-5)
    assert pairs == pytest.approx(3.0)
    assert math.isnan(empty)
