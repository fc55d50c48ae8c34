"""Backward nodes of the installed torch are known by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.introspection.autograd_graph import summarize_graph
from lightning_gradguard.introspection.operations import RISKY, SATURATING, operation_of

WIDTH = 8


def softsign_by_hand(x):
    return x / (1 + x.abs())


def sigmoid_by_hand(x):
    return 1 / (1 + torch.exp(-x))


def standardised_by_hand(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


def standardised_by_variance(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)


KINDS = [
    (torch.sigmoid, "sigmoid"),
    (sigmoid_by_hand, "sigmoid"),
    (F.hardsigmoid, "hardsigmoid"),
    (torch.tanh, "tanh"),
    (F.hardtanh, "hardtanh"),
    (lambda x: x.clamp(-1, 1), "hardtanh"),
    (F.softsign, "softsign"),
    (softsign_by_hand, "softsign"),
    (F.logsigmoid, "logsigmoid"),
    (torch.erf, "erf"),
    (torch.atan, "atan"),
    (F.relu, "relu"),
    (lambda x: F.threshold(x, 0.1, 0.0), "relu"),
    (lambda x: x.clamp_min(0), "relu"),
    (F.leaky_relu, "soft relu"),
    (nn.PReLU(), "soft relu"),
    (F.gelu, "soft relu"),
    (F.silu, "soft relu"),
    (F.elu, "soft relu"),
    (F.selu, "soft relu"),
    (F.celu, "soft relu"),
    (F.mish, "soft relu"),
    (F.softplus, "soft relu"),
    (F.hardswish, "soft relu"),
    (nn.BatchNorm1d(WIDTH), "normalisation"),
    (nn.LayerNorm(WIDTH), "normalisation"),
    (nn.GroupNorm(2, WIDTH), "normalisation"),
    (nn.RMSNorm(WIDTH), "normalisation"),
    (F.normalize, "normalisation"),
    (standardised_by_hand, "normalisation"),
    (standardised_by_variance, "normalisation"),
    (lambda x: F.softmax(x, -1), "attention"),
    (lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]), "attention"),
    (nn.Linear(WIDTH, 3), "product"),
    (lambda x: x @ torch.randn(WIDTH, 2), "product"),
    (lambda x: nn.Conv1d(1, 2, 3)(x[:, None]), "product"),
    (lambda x: nn.ConvTranspose2d(1, 2, 3)(x[None, None]), "product"),
    (lambda x: torch.einsum("ij,jk->ik", x, torch.randn(WIDTH, 2)), "product"),
    (lambda x: torch.bmm(x[None], torch.randn(1, WIDTH, 2)), "product"),
]


@pytest.mark.parametrize(("function", "kind"), KINDS)
def test_kinds_are_recognized(function, kind):
    weight = nn.Parameter(torch.randn(4, WIDTH))
    assert summarize_graph(function(weight * 1.0).sum(), {"w": weight}).kinds["w"].get(kind) == 1


@pytest.mark.parametrize(
    "function", [torch.abs, torch.sin, F.dropout, lambda x: x / x.abs(), lambda x: x * x]
)
def test_other_operations_have_no_kind(function):
    weight = nn.Parameter(torch.randn(4, WIDTH))
    assert summarize_graph(function(weight).sum(), {"w": weight}).kinds["w"] == {}


@pytest.mark.parametrize(("kind", "steepest"), SATURATING.items())
def test_the_steepest_slopes(kind, steepest):
    module = {"erf": torch.erf, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "atan": torch.atan}
    function = module.get(kind) or getattr(F, kind)
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(function(x).sum(), x)
    assert slopes.max().item() == pytest.approx(steepest, rel=1e-2)


RISKY_CALLS = {
    "Log": lambda x: x.log(),
    "Log2": lambda x: x.log2(),
    "Log10": lambda x: x.log10(),
    "Log1P": lambda x: (x - 1).log1p(),
    "Xlogy": lambda x: torch.special.xlogy(x, x),
    "Logit": lambda x: x.logit(),
    "Div": lambda x: x / x,
    "Reciprocal": lambda x: 1 / x,
    "Sqrt": lambda x: x.sqrt(),
    "Rsqrt": lambda x: x.rsqrt(),
    "Pow": lambda x: x**0.5,
    "Exp": lambda x: (x + 1000).exp(),
    "Acos": lambda x: (x + 1).acos(),
    "Asin": lambda x: (x + 1).asin(),
    "Atanh": lambda x: (x + 1).atanh(),
}


@pytest.mark.parametrize("name", RISKY)
def test_each_risky_operation_gives_nan_or_inf(name):
    x = torch.zeros(3, requires_grad=True)
    loss = RISKY_CALLS[name](x).sum()
    assert name in summarize_graph(loss, {"x": x}).loss_ops
    (gradient,) = torch.autograd.grad(loss, x)
    assert not (loss.isfinite() and gradient.isfinite().all())


def test_decoration_is_removed_from_names():
    assert operation_of("NativeLayerNormBackward0") == "NativeLayerNorm"
    assert operation_of("SumBackward1") == operation_of("SumBackward0") == "Sum"
    assert operation_of("torch::autograd::CopySlices") == "CopySlices"
