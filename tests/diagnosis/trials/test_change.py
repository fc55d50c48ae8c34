"""Changes of the batch and of the forward pass equal a model or batch written with them."""

import dataclasses
import itertools
from functools import reduce
from operator import or_

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.diagnosis.trials.change import (
    Change,
    Part,
    Scale,
    SwappedForward,
    half,
    prepare_batch,
)
from lightning_gradguard.diagnosis.trials.operation_patch import OperationPatch
from lightning_gradguard.introspection.layer_calls import StructureRecorder


def test_standardized_data_has_zero_mean_and_unit_variance():
    x, y = 7 + 100 * torch.randn(50, 3), 1e4 * torch.randn(50)
    batch = {"x": x, "ids": torch.arange(50), "target": y}
    for change in (Change(input=True), Change(target=True)):
        out = prepare_batch(batch, change, Scale.of_targets(batch))
        changed, kept = (out["x"], out["target"])[:: 1 if change.input else -1]
        assert changed.mean().item() == pytest.approx(0, abs=1e-5)
        assert changed.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
        assert any(kept is t for t in (x, y))
        assert out["ids"] is batch["ids"]
    assert prepare_batch(batch, Change(), None) is batch
    assert prepare_batch([torch.zeros(9)], Change(input=True))[0].isfinite().all()
    # Of a mapping whose names say nothing nobody knows what is what.
    unnamed = {"price": x, "features": y}
    assert prepare_batch(unnamed, Change(input=True)) is unnamed
    # Tokens come first, so that what follows is no input.
    tokens = torch.arange(50), y
    assert prepare_batch(tokens, Change(input=True)) is tokens


def test_half_a_batch_is_every_other_example():
    x, y = torch.arange(20).view(10, 2), torch.arange(10)
    assert [t.tolist() for t in half([x, y])] == [x[::2].tolist(), y[::2].tolist()]
    for whole in ([x[:4], y[:4]], [x, y[:9]], [torch.tensor(3.0)], "text"):
        assert half(whole) is whole


WIDTH = 6


class Net(nn.Module):
    """Net of three square layers between a narrower one and a head; ``activation`` is a function or a module."""

    def __init__(self, activation, raw=False):
        super().__init__()
        sizes = [3, WIDTH, WIDTH, WIDTH, WIDTH]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head, self.activation, self.raw = nn.Linear(WIDTH, 2), activation, raw

    def apply_layer(self, layer, x):
        return torch.addmm(layer.bias, x, layer.weight.T) if self.raw else layer(x)

    def forward(self, x):
        for layer in self.layers:
            x = self.activation(self.apply_layer(layer, x))
        return self.apply_layer(self.head, x)


def swapped(model, change, x):
    recorder = StructureRecorder(model)
    with recorder:
        plain = model(x)
    assert torch.equal(plain, model(x))
    swaps = SwappedForward(model, change, recorder.structure)
    with swaps:
        first = model(x)
    with swaps:
        assert torch.equal(model(x), first)
    assert torch.equal(plain, model(x))
    return first


def written(model, x, *, activation=torch.sigmoid, norm=None, skip=False, block=False, drop=()):
    for i, layer in enumerate(model.layers):
        if i in drop:
            continue
        h = layer(norm(x) if block and i else x)
        h = norm(h) if norm and not block else h
        x = x + activation(h) if (skip or block) and i else activation(h)
    return model.head(norm(x) if block else x)


def batch_norm(x):
    return F.batch_norm(x, None, None, training=True)


def layer_norm(x):
    return F.layer_norm(x, x.shape[-1:])


SIGMOIDS = [
    nn.Sigmoid(),
    torch.sigmoid,
    F.sigmoid,
    torch.Tensor.sigmoid,
    lambda x: x.clone().sigmoid_(),
    torch.special.expit,
]
CHANGES = [
    (Change(activation="relu"), {"activation": torch.relu}),
    (Change(activation="gelu"), {"activation": F.gelu}),
    (Change(activation="leaky_relu"), {"activation": lambda x: F.leaky_relu(x, 0.1)}),
    (Change(normalise=True), {"norm": batch_norm}),
    (Change(skip=True), {"skip": True}),
    (Change(shorten=True), {"drop": (2,)}),
    (Change(activation="relu", normalise=True), {"activation": torch.relu, "norm": batch_norm}),
    (
        Change(activation="relu", normalise=True, skip=True),
        {"activation": torch.relu, "norm": layer_norm, "block": True},
    ),
]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("sigmoid", SIGMOIDS, ids=range(len(SIGMOIDS)))
@pytest.mark.parametrize(("change", "same"), CHANGES, ids=[str(sorted(c.fields)) for c, _ in CHANGES])
def test_functions_modules_and_products_are_swapped_alike(sigmoid, raw, change, same):
    model, x = Net(sigmoid, raw), torch.randn(9, 3)
    assert torch.allclose(swapped(model, change, x), written(model, x, **same), atol=1e-6)


MODULES = [nn.ReLU(inplace=True), nn.Tanh(), nn.Softsign(), nn.Hardtanh(), nn.GELU(), nn.SiLU()]
MODULES += [
    nn.Softplus(),
    nn.ELU(),
    nn.LeakyReLU(0.3),
    nn.LogSigmoid(),
    nn.Hardsigmoid(),
    nn.PReLU(),
    nn.Mish(),
]


@pytest.mark.parametrize(
    "activation", [*MODULES, torch.erf, torch.atan, F.relu6], ids=lambda a: getattr(a, "__name__", str(a))
)
def test_every_activation_is_recognized(activation):
    model, x = Net(activation), torch.randn(9, 3)
    out = swapped(model, Change(activation="gelu"), x)
    assert torch.allclose(out, written(model, x, activation=F.gelu), atol=1e-6)


def test_an_activation_after_the_last_layer_is_not_swapped():
    model, x, y = Net(torch.tanh), torch.randn(9, 3), torch.rand(9, 2)
    whole = nn.Module()
    whole.net, whole.forward = model, lambda x: F.binary_cross_entropy(torch.sigmoid(model(x)), y)
    out = swapped(whole, Change(activation="relu"), x)
    assert torch.allclose(out, F.binary_cross_entropy(written(model, x, activation=torch.relu).sigmoid(), y))


def test_normalized_layers_are_not_normalized_again():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    model[1].weight.data.fill_(3.0)
    x = torch.randn(9, 3)
    out = swapped(model, Change(normalise=True), x)
    assert torch.allclose(out, model[5](batch_norm(model[3](model[:3](x))).relu()), atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_convolutions(rank):
    conv = (nn.Conv1d, nn.Conv2d)[rank - 1]
    model = nn.Sequential(
        conv(2, 4, 3, padding=1),
        nn.Tanh(),
        conv(4, 4, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    x = torch.randn(5, 2, *[6] * rank)
    model(x)
    h = batch_norm(model[0](x)).relu()
    expected = model[5](batch_norm(model[2](h)).relu().flatten(1))
    assert torch.allclose(swapped(model, Change(activation="relu", normalise=True), x), expected, atol=1e-5)
    skipped = model[5]((model[:2](x) + model[2](model[:2](x)).tanh()).flatten(1))
    assert torch.allclose(swapped(model, Change(skip=True), x), skipped, atol=1e-5)


def test_sequences_and_single_examples_are_normalized_over_their_features():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    for x in (torch.randn(5, 7, 3), torch.randn(1, 3)):
        expected = model[2](F.layer_norm(model[0](x), (4,)).tanh())
        assert torch.allclose(swapped(model, Change(normalise=True), x), expected, atol=1e-6)


def test_a_linear_net_gets_skips_around_its_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    x = torch.randn(5, 4)
    h = x
    for layer in model[:3]:
        h = h + layer(h)
    assert torch.allclose(swapped(model, Change(skip=True), x), model[3](h), atol=1e-6)


#: A change of each field, from the smallest part of a training to the largest.
BY_PART = {
    Part.SETTING: [Change(rate=0.1), Change(decay=0.1), Change(momentum=0.9), Change(input=True), Change(target=True),
                   Change(batch="drop")],
    Part.INITIALIZATION: [Change(initialise="he")],
    Part.OPERATION: [Change(activation="relu"), Change(gates="LSTM"), Change(operation=OperationPatch("clamp"))],
    Part.NORMALIZATION: [Change(normalise=True), Change(lipschitz=True)],
    Part.ARCHITECTURE: [Change(skip=True), Change(shorten=True)],
}  # fmt: skip
SINGLE = [change for changes in BY_PART.values() for change in changes]


def test_every_field_has_a_part():
    fields = {f.name for f in dataclasses.fields(Change)} - {"slope"}
    assert sorted(fields) == sorted(name for change in SINGLE for name in change.fields)
    for part, changes in BY_PART.items():
        assert {change.size for change in changes} == {(part,)}
    assert Change().size == Change(slope=0.3).size == ()
    assert list(BY_PART) == sorted(Part)


@given(st.sets(st.sampled_from(range(len(SINGLE)))), st.sets(st.sampled_from(range(len(SINGLE)))))
def test_more_is_larger_and_the_largest_part_decides(some, others):
    one = reduce(or_, (SINGLE[i] for i in some), Change())
    more = reduce(or_, (SINGLE[i] for i in some | others), Change())
    assert one.size <= more.size
    assert (one.size == more.size) == (some >= others)
    assert more.size[:1] == (max(one.size[:1], reduce(or_, (SINGLE[i] for i in others), Change()).size[:1]))


def test_changes_combine_unless_they_change_the_same():
    both = Change(activation="relu") | Change(initialise="he")
    assert both == Change(activation="relu", initialise="he")
    assert both.fields == {"activation", "initialise"}
    assert both.changes_forward
    assert not Change(rate=0.1).changes_forward
    with pytest.raises(ValueError, match="both change activation"):
        both | Change(activation="gelu")
