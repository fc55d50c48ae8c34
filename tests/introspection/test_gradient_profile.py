"""The measurements on the host agree with those on the device that faults are judged by."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.introspection.gradient_profile import (
    dead_share,
    dead_shares,
    depth_tilt,
    layer_profile,
)
from lightning_gradguard.stats import samples, trends
from lightning_gradguard.stats.layout import Layout


@given(st.lists(st.floats(-30, 5), max_size=40))
def test_the_depth_tilt_equals_that_on_the_device(profile):
    layout = Layout.of({str(i): torch.zeros(2, 2) for i in range(max(len(profile), 1))})
    live = torch.ones(len(layout.names), dtype=torch.bool)
    reference = trends.depth_tilt(torch.tensor([*profile, *[0.0] * (not profile)]), live, layout).item()
    tilt = depth_tilt(profile)
    assert (tilt is None) == math.isnan(reference)
    assert tilt is None or tilt == pytest.approx(reference, abs=1e-3)


def test_a_deep_profile_is_thinned():
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


def test_dead_shares_equal_those_on_the_device():
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(12, 3)) for name in "abc"}
    for number, parameter in enumerate(parameters.values()):
        parameter.grad = torch.randn(12, 3)
        parameter.grad[: 4 * number] = 0.0
    device = samples.dead_shares([p.grad for p in parameters.values()], Layout.of(parameters))
    assert list(dead_shares(parameters, "abc").values()) == pytest.approx(device.tolist())
    assert dead_shares(parameters, ["missing"]) == {}
