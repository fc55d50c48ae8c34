"""Samples against the whole tensors that they represent."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.samples import (
    SAMPLES,
    changed_shares,
    dead_row_share,
    dead_shares,
    lost_shares,
    sample,
    update_ratios,
)


@given(numel=st.integers(0, 5000))
def test_a_sample_is_bounded_and_covers_small_tensors_whole(numel):
    layout = Layout.of({"w": torch.arange(1.0, numel + 1)})
    picked = sample(layout)[0]
    assert picked.shape == (SAMPLES,)
    assert (picked > 0).sum() == min(numel, SAMPLES)


def test_update_ratio_of_a_sample_is_that_of_the_whole():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(100, 200))
    layout = Layout.of({"w": weight})
    before = sample(layout)
    with torch.no_grad():
        weight += 1e-3 * torch.randn_like(weight)
    ratio = update_ratios(before, sample(layout)).item()
    assert ratio == pytest.approx(1e-3, rel=0.4)


def test_update_ratio_of_an_empty_tensor_is_a_number():
    layout = Layout.of({"w": torch.empty(0)})
    assert update_ratios(sample(layout), sample(layout)).tolist() == [0.0]


@given(width=st.sampled_from([8, 64, 100, 256]))
def test_a_sample_is_not_of_one_column(width):
    columns = torch.arange(1.0, width + 1).repeat(width, 1)
    assert len(sample(Layout.of({"w": columns}))[0].unique()) > min(width, SAMPLES) / 3


@pytest.mark.parametrize("dead", [0, 3, 10])
def test_dead_shares_count_rows_that_are_all_zero(dead):
    gradient = torch.randn(10, 7)
    gradient[:dead] = 0
    gradient[9, :6] = 0
    layout = Layout.of({"w": torch.ones(10, 7), "b": torch.ones(10)})
    shares = dead_shares([gradient, torch.zeros(10)], layout)
    assert shares.tolist() == pytest.approx([dead / 10, 0.0])
    assert dead_row_share(gradient).item() == pytest.approx(dead / 10)


@pytest.mark.parametrize("size", [4, 300])
def test_a_row_of_the_smallest_numbers_is_not_dead(size):
    gradient = torch.full((8, size), 1e-40)
    gradient[2:4] = 0
    layout = Layout.of({"w": torch.ones(8, size), "v": torch.ones(8, size)})
    assert dead_shares([gradient, -gradient], layout).tolist() == [0.25, 0.25]
    assert dead_row_share(gradient) == 0.25


def test_dead_shares_of_convolutions_and_missing_gradients():
    layout = Layout.of(
        {"conv": torch.ones(200, 2, 3, 3), "none": torch.ones(2, 2), "empty": torch.ones(0, 3)}
    )
    gradient = torch.randn(200, 2, 3, 3)
    gradient[100:] = 0
    assert dead_shares([gradient, None, torch.ones(0, 3)], layout).tolist() == pytest.approx(
        [0.5, 0, 0], abs=0.05
    )


def test_dead_row_share_reads_every_row_of_every_kind():
    many = torch.ones(200, 3)
    many[5] = 0
    assert dead_row_share(many).item() == pytest.approx(1 / 200)
    assert dead_row_share(torch.tensor([[0j, 0], [1j, 0]])) == 0.5
    assert dead_row_share(torch.tensor([[math.nan, 0.0], [0.0, 0.0]])) == 0.5
    assert dead_row_share(torch.ones(3, 0)) == 1


def test_only_half_precision_loses_elements():
    values = torch.tensor([1.0, 1e-3, 1e-6, 0.0])
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    layout = Layout.of({str(kind): torch.ones(4, dtype=kind) for kind in kinds})
    assert lost_shares([values.to(kind) for kind in kinds], layout).tolist() == pytest.approx(
        [0.5, 0.25, 0.0]
    )


def test_of_elements_without_a_gradient_no_change_is_counted():
    before, after, fed = torch.zeros(3, SAMPLES), torch.zeros(3, SAMPLES), torch.zeros(3, SAMPLES) > 0
    fed[:, :32] = True
    fed[2, 15:] = False  # too few to tell
    after[0, 24:] = 1.0
    after[1, 32:] = 1.0
    assert changed_shares(before, after, fed).tolist() == pytest.approx([0.25, 0.0, math.nan], nan_ok=True)
