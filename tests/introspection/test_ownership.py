"""Layers that no optimizer steps: made anew in each pass, or kept in a dict."""

import warnings

import pytest
import torch
from torch import nn

from lightning_gradguard import Guard
from lightning_gradguard.introspection.graph_problems import Problem

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


class HeadInForward(nn.Module):
    """Net that makes its head in each pass, in the first one only, or when it is built."""

    def __init__(self, when):
        super().__init__()
        self.when, self.body = when, nn.Linear(6, 8)
        self.head = nn.Linear(8, 1) if when == "never" else None

    def forward(self, x):
        if self.when == "always" or self.head is None:
            self.head = nn.Linear(8, 1)
        return self.head(self.body(x).tanh())


class Sums(nn.Module):
    """Sum of layers side by side, kept in a dict or registered."""

    def __init__(self, keep, number):
        super().__init__()
        self.own = nn.Linear(6, 1)
        self.layers = keep({str(k): nn.Linear(6, 1) for k in range(number)})

    def forward(self, x):
        return self.own(x) + sum(layer(x) for layer in self.layers.values())


def problems_of(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    guard = Guard(model.named_parameters(), optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            guard.step(loss=loss)
            optimizer.step()
    return [(p.kind, p.certain) for p in guard.tracker.graph_summary.problems]


@pytest.mark.parametrize(
    ("when", "found"),
    [
        ("always", [(Problem.REMADE_LAYERS, True)]),
        ("first", [(Problem.STALE_OPTIMIZER, False)]),
        ("never", []),
    ],
)
def test_layers_made_in_the_forward_pass(when, found):
    assert problems_of(HeadInForward(when)) == found


@pytest.mark.parametrize(
    ("keep", "number", "found"),
    [
        (dict, 3, [(Problem.UNREGISTERED_MODULES, True)]),
        (nn.ModuleDict, 3, []),
        (dict, 1, [(Problem.STALE_OPTIMIZER, False)]),  # may be a teacher beside the model
    ],
)
def test_layers_side_by_side_in_a_dict(keep, number, found):
    assert problems_of(Sums(keep, number)) == found


class Hyper(nn.Module):
    """Layer whose weight a net computes in each pass, and hands on in one of several ways."""

    def __init__(self, way, recurrent=False):
        super().__init__()
        self.way, self.layer = way, nn.Linear(6, 2)
        self.maker = nn.Linear(2, 2) if recurrent else nn.Linear(1, 12)
        self.recurrent = recurrent

    def forward(self, x):
        made = self.maker(self.layer.weight.T).T if self.recurrent else self.maker(torch.ones(1))
        weight = made.reshape(2, 6)
        if self.way == "functional":
            return torch.func.functional_call(self.layer, {"weight": weight}, (x,))
        if self.way == "plain":
            return nn.functional.linear(x, weight, self.layer.bias)
        if self.way == "anonymous":
            return nn.functional.linear(x, nn.Parameter(weight), self.layer.bias)
        self.layer.weight = nn.Parameter(weight)
        return self.layer(x)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize(
    ("way", "found"),
    [
        ("assigned", [(Problem.WRAPPED_TENSOR, True)]),
        ("anonymous", [(Problem.WRAPPED_TENSOR, True)]),
        ("functional", []),
        ("plain", []),
    ],
)
def test_computed_tensors_that_are_wrapped_in_a_parameter(way, recurrent, found):
    assert problems_of(Hyper(way, recurrent)) == found


@pytest.mark.parametrize("cut", [False, True])
def test_a_layer_that_was_replaced_is_no_wrapped_tensor(cut):
    class Cut(nn.Tanh):
        def forward(self, x):
            return super().forward(x.detach() if cut else x)

    model = nn.Sequential(nn.Linear(6, 8), Cut(), nn.Linear(8, 8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model[3] = nn.Linear(8, 1)
    guard = Guard(model.named_parameters(), optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            loss = model(X).square().mean()
            loss.backward()
            guard.step(loss=loss)
            optimizer.step()
            model.zero_grad()
    assert [(p.kind, p.certain) for p in guard.tracker.graph_summary.problems] == [
        (Problem.STALE_OPTIMIZER, True)
    ]


class Latent(nn.Module):
    """Decoder of a code that is optimized by hand, anew in each pass."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.decoder = kind, nn.Linear(6, 1)

    def forward(self, x):
        code = torch.zeros(len(x), 6)
        code = nn.Parameter(code) if self.kind == "parameter" else code.requires_grad_()
        return self.decoder(x + code)


@pytest.mark.parametrize("kind", ["parameter", "tensor"])
def test_an_input_that_is_optimized_by_hand_is_no_layer(kind):
    assert problems_of(Latent(kind)) == []
