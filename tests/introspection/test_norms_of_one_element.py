"""Normalizations over a single element, and those that are sound."""

import pytest
import torch
from torch import nn

from lightning_gradguard.introspection.autograd_graph import summarize_graph
from lightning_gradguard.introspection.graph_problems import Problem


class ByHand(nn.Module):
    def forward(self, x):
        centred = x - x.mean((2, 3), keepdim=True)
        return centred / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()


def problems_of(net, x):
    return summarize_graph(net(x).square().mean(), dict(net.named_parameters())).problems


def net_with(norm, channels=8, pixels=1):
    first, second = nn.Conv2d(1, channels, 9 - pixels), nn.Conv2d(channels, channels, 1)
    return nn.Sequential(first, nn.ReLU(), second, norm, nn.Flatten(), nn.LazyLinear(2))


@pytest.mark.parametrize("norm", [nn.GroupNorm(8, 8), ByHand()])
def test_a_norm_over_one_pixel_is_found(norm):
    (problem,) = problems_of(net_with(norm), torch.randn(4, 1, 8, 8))
    assert problem.kind == Problem.ONE_ELEMENT_NORMALIZATION
    assert problem.certain
    assert problem.names == ("0.weight", "2.weight")


@pytest.mark.parametrize(
    ("norm", "pixels"),
    [
        (nn.GroupNorm(1, 8), 1),
        (nn.GroupNorm(4, 8), 1),
        (nn.GroupNorm(8, 8), 2),
        (nn.BatchNorm2d(8), 1),
        (ByHand(), 2),
    ],
)
def test_a_norm_over_several_elements_is_sound(norm, pixels):
    assert not problems_of(net_with(norm, pixels=pixels), torch.randn(4, 1, 8, 8))


def test_a_layer_norm_over_one_feature_is_found():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.LayerNorm(1), nn.Linear(1, 2))
    (problem,) = problems_of(net, torch.randn(5, 4))
    assert "`3` normalizes over a single element" in problem.text


def test_a_batch_norm_in_eval_mode_has_its_own_statistics():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    assert not problems_of(net, torch.randn(1, 4))


def test_a_norm_of_the_input_is_worth_saying_only_without_progress():
    net = nn.Sequential(nn.Unflatten(1, (4, 1)), nn.LayerNorm(1), nn.Linear(1, 2))
    (problem,) = problems_of(net, torch.randn(5, 4))
    assert not problem.certain


def test_a_skip_connection_around_it_lets_the_gradient_pass():
    layer, norm = nn.Linear(4, 1), nn.LayerNorm(1)
    h = layer(torch.randn(5, 4))
    parameters = {f"layer.{n}": p for n, p in layer.named_parameters()}
    assert not summarize_graph((h + norm(h)).square().mean(), parameters).problems


def test_a_mean_over_one_pixel_is_no_normalization():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2)
    )
    assert not problems_of(net, torch.randn(3, 1, 8, 8))
