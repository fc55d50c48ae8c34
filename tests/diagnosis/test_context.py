"""Derived facts, against numbers worked out by hand."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.diagnosis.context import DiagnosticContext, finite_median
from lightning_gradguard.diagnosis.diagnose import _padding
from lightning_gradguard.results import Fault, Finding, Severity


@pytest.fixture
def case(lab):
    """Return three layers of width 4, with bias and table."""
    return DiagnosticContext(
        lab.finding(Fault.STALLED),
        names=("a.weight", "a.bias", "b.weight", "c.weight"),
        shapes=((4, 4), (4,), (4, 4), (2, 4)),
        gradients_log10=(-3.0, -1.0, -2.0, -math.inf),
        weight_norms=(2.0, 1.0, 4.0, 8.0),
        update_ratios=(1e-3, 0.5, 2e-3, math.nan),
        optimizer="SGD",
        learning_rates=(0.1, 0.3),
        defaults={"momentum": 0.9, "betas": (0.9, 0.99), "nesterov": False},
    )


def test_lengths_must_agree(case):
    with pytest.raises(ValueError, match="update_ratios must have one entry for each of 4 names, got 1"):
        dataclasses.replace(case, update_ratios=(1.0,))


def test_layers_are_matrices(case):
    assert case.layers == [0, 2, 3]


def test_medians_ignore_biases_and_unknown_values(case):
    assert case.typical_update == pytest.approx(1.5e-3)
    assert case.typical_gradient == pytest.approx((1e-3 / 2 + 1e-2 / 4) / 2)
    assert case.largest_update == (2e-3, "b.weight")


def test_the_first_oversized_update_of_the_run_counts(case, lab):
    finding = lab.finding(Fault.OVERSIZED_UPDATE, value=3.0, parameters=["c.weight"], step=2)
    later = lab.finding(Fault.OVERSIZED_UPDATE, value=1e9, parameters=["a.weight"], step=9)
    assert dataclasses.replace(case, findings=(finding, later)).largest_update == (3.0, "c.weight")
    assert dataclasses.replace(case, findings=(finding,)).found_before(Fault.OVERSIZED_UPDATE)
    assert not dataclasses.replace(case, findings=(case.finding,)).found_before(*Fault)


def test_root_mean_squares(case):
    assert case.gradient_rms_log10(0) == pytest.approx(-3 - math.log10(4))
    assert case.weight_rms(1) == pytest.approx(0.5)


def test_settings_are_numbers(case):
    assert case.setting("momentum") == 0.9
    assert math.isnan(case.setting("betas"))
    assert math.isnan(case.setting("eps"))
    assert case.learning_rate == 0.3


@given(
    gain=st.floats(1e-2, 1e2),
    fan_in=st.integers(1, 300),
    fan_out=st.integers(1, 300),
    depth=st.integers(1, 9),
)
def test_gain_is_the_factor_by_which_a_layer_scales_a_signal(gain, fan_in, fan_out, depth):
    """Weights of RMS gain/sqrt(fan_in) have that gain.

    Their shape does not matter, and outliers do not move the median.
    """
    norm = gain / math.sqrt(fan_in) * math.sqrt(fan_in * fan_out)
    names = tuple(str(i) for i in range(2 * depth + 1))
    norms = (norm,) * (depth + 1) + (0.0,) * depth
    nan = (math.nan,) * len(names)
    finding = Finding(Fault.STALLED, Severity.CRITICAL, 0, (), 0.0, 0.0, "")
    case = DiagnosticContext(finding, names, ((fan_out, fan_in),) * len(names), nan, norms, nan)
    assert case.excess_gain == pytest.approx(math.log10(gain), abs=1e-6)
    zeros = dataclasses.replace(case, initial_weight_norms=(0.0,) * len(names))
    assert zeros.excess_gain == -3.0


@pytest.mark.parametrize(
    ("initialise", "activation"),
    [
        (nn.init.kaiming_normal_, nn.ReLU),
        (nn.init.xavier_normal_, nn.Tanh),
        (nn.init.xavier_uniform_, nn.Sigmoid),
    ],
)
def test_standard_initializations_preserve_the_scale(lab, initialise, activation):
    model = lab.mlp(9, 64, activation, inputs=64, outputs=64)
    for layer in model[::2]:
        initialise(layer.weight, nonlinearity="relu") if activation is nn.ReLU else initialise(layer.weight)
    case = lab.case_of(model, model(torch.randn(4, 64)).sum(), Fault.VANISHING)
    assert abs(case.excess_gain) < 0.03
    assert case.bare_layers == 9


def test_normalized_layers_do_not_pass_on_a_scale(lab):
    layers = [layer for _ in range(5) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
    model = nn.Sequential(*layers)
    assert lab.case_of(model, model(torch.randn(4, 8)).sum(), Fault.VANISHING).bare_layers == 0


def test_first_update_is_known_for_optimizers_that_normalize_the_gradient(case):
    adam = dataclasses.replace(case, optimizer="AdamW", initial_weight_norms=(4.0, 9.0, 4.0, 0.0))
    assert adam.first_update == pytest.approx(0.3 / 1.0)
    assert case.first_update == 0.0


def test_growth_ignores_weights_that_began_near_zero(case):
    grown = dataclasses.replace(case, initial_weight_norms=(1.0, 0.01, 0.5, 1e-6))
    assert grown.growth == (8.0, "b.weight")
    assert case.growth == (1.0, "")


@given(st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), max_size=3), st.integers(0, 3))
def test_finite_median_ignores_nonfinite_values(odd, count):
    values = [float(i) for i in range(count)]
    middle = finite_median([*odd, *values])
    assert middle == (count - 1) / 2 if count else math.isnan(middle)


def test_a_missing_loss_is_not_a_nonfinite_loss(case):
    assert case.nonfinite_loss
    assert not dataclasses.replace(case, has_loss=False).nonfinite_loss
    assert not dataclasses.replace(case, loss_last=0.3).nonfinite_loss


@pytest.mark.parametrize(
    ("batch", "share"),
    [
        (nn.functional.pad(torch.randn(4, 10, 3), (0, 0, 0, 30)), 0.75),
        (nn.functional.pad(torch.randn(4, 10, 3), (0, 0, 0, 30)).transpose(0, 1), 0.75),
        (nn.functional.pad(torch.randint(1, 9, (4, 10)), (0, 30)), 0.75),
        (nn.functional.pad(torch.randint(1, 9, (4, 30)), (10, 0)), 0.05),  # padded in front
        (torch.randn(4, 40, 3), 0.025),
        ({"x": torch.randn(4, 6, 3), "y": torch.zeros(4)}, 0.0),  # too short
        (None, 0.0),
    ],
)
def test_padding_is_the_end_of_a_sequence_that_stays_the_same(batch, share):
    assert _padding(batch) == pytest.approx(share, abs=0.06)
