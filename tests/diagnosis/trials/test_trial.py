"""Trials measure the known decades, take the steps of the optimizer, and leave the training unchanged."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.diagnosis.trials.change import Change, SwappedForward
from lightning_gradguard.diagnosis.trials.trial import run_trial
from lightning_gradguard.introspection.layer_calls import LayerStructure
from lightning_gradguard.introspection.sandbox import SandboxedStep


def chain(depth=20, width=64, activation=nn.Sigmoid, inputs=64, outputs=10):
    sizes = [inputs] + [width] * depth
    layers = [part for i in range(depth) for part in (nn.Linear(sizes[i], sizes[i + 1]), activation())]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def sandboxed_step_of(model, optimizer=None, size=64):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 64, generator=generator)
    y = torch.randint(10, (size,), generator=generator)
    batch = centres[y] + torch.randn(size, 64, generator=generator), y
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return SandboxedStep(model, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), batch, optimizer)


def weights(model):
    return [name for name, p in model.named_parameters() if p.ndim > 1]


def test_twenty_sigmoids_lose_the_known_decades():
    """Another activation, or other weights, is not enough alone; both together are."""
    torch.manual_seed(0)
    model = chain()
    step, layers = sandboxed_step_of(model), weights(model)
    plain = run_trial(step, Change(), layers=layers, passes=1)
    assert plain.tilt == pytest.approx(17.5, abs=1.5)
    relu, he = Change(activation="relu"), Change(initialise="he")
    tilts = {
        change: run_trial(step, change, layers=layers, passes=1, structure=plain.structure).tilt
        for change in (relu, he, relu | he)
    }
    assert tilts[relu] == pytest.approx(7.0, abs=1.0)
    assert tilts[he] == pytest.approx(10.7, abs=1.0)
    assert tilts[relu | he] == pytest.approx(0.3, abs=0.5)


@pytest.mark.parametrize(
    "change", [Change(), Change(activation="relu"), Change(normalise=True, skip=True), Change(rate=0.1)]
)
@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_training_is_bit_identical_with_and_without_trials(kind, change):
    torch.manual_seed(1)
    first = nn.Sequential(
        chain(3, activation=nn.Tanh, outputs=64), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 10)
    )
    second = copy.deepcopy(first)
    results = []
    for model, tries in ((first, True), (second, False)):
        torch.manual_seed(2)
        step = sandboxed_step_of(model, kind(model.parameters(), lr=1e-2))
        for number in range(4):
            step.optimizer.zero_grad()
            step.loss_of(step.batch).backward()
            if tries and number == 1:
                structure = run_trial(step, Change(), layers=weights(model), passes=3).structure
                run_trial(step, change, layers=weights(model), passes=3, structure=structure)
            step.optimizer.step()
        results.append([*model.state_dict().values(), torch.rand(3), *_tensors(step.optimizer)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _tensors(optimizer):
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize(
    ("kind", "options", "same"),
    [
        (torch.optim.SGD, {"lr": 0.1}, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}, {"lr": 0.1}),
        (torch.optim.LBFGS, {"lr": 0.1}, {"lr": 0.1}),
        (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.9)}, None),
    ],
)
def test_virtual_steps_are_those_of_the_optimizer(kind, options, same):
    """They train on half of the batch; the loss is that of all of it. A velocity counts with its steady size."""
    torch.manual_seed(0)
    model = chain(2, activation=nn.ReLU)
    step = sandboxed_step_of(model, kind(model.parameters(), **options))
    found = run_trial(step, Change(), layers=weights(model), passes=4).loss
    reference = torch.optim.SGD(model.parameters(), **same) if same else step.optimizer
    for _ in range(3):
        reference.zero_grad()
        step.loss_of([t[::2] for t in step.batch]).backward()
        reference.step()
    assert found == pytest.approx(step.loss_of(step.batch).item(), rel=1e-5)


def test_groups_keep_their_rates_and_frozen_parameters_stay_frozen():
    torch.manual_seed(0)
    model = chain(2, activation=nn.ReLU)
    model[0].requires_grad_(False)
    others = [*model[0].parameters(), *model[4].parameters()]
    groups = [{"params": model[2].parameters(), "lr": 0.0}, {"params": others}]
    seen = []
    step = sandboxed_step_of(model, torch.optim.SGD(groups, lr=0.1))
    spied = SandboxedStep(
        model,
        lambda batch: seen.append([p.detach().clone() for p in model.parameters()]) or step.loss_of(batch),
        step.batch,
        step.optimizer,
    )
    run_trial(spied, Change(), layers=weights(model), passes=3)
    moved = [not torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True)]
    assert moved == [False, False, False, False, True, True]


def test_plain_descent_replaces_an_optimizer_that_cannot_be_made_again():
    class Odd(torch.optim.SGD):
        def __init__(self, model, rate):
            super().__init__(model.parameters(), lr=rate)

    torch.manual_seed(0)
    model = chain(2, activation=nn.ReLU)
    plain = run_trial(sandboxed_step_of(model), Change(), layers=weights(model), passes=4)
    odd = run_trial(sandboxed_step_of(model, Odd(model, 0.1)), Change(), layers=weights(model), passes=4)
    assert odd.loss == plain.loss


def test_a_lower_rate_moves_less_and_weights_are_scaled_back():
    torch.manual_seed(0)
    model = chain(2, activation=nn.ReLU)
    layers = weights(model)
    norms = {name: p.detach().norm().item() for name, p in model.named_parameters()}
    plain = run_trial(sandboxed_step_of(model), Change(), layers=layers, passes=2)
    with torch.no_grad():
        [p.mul_(8) for p in model.parameters()]
    again = run_trial(sandboxed_step_of(model), Change(), layers=layers, passes=2, start_norms=norms)
    assert again.loss == pytest.approx(plain.loss, rel=1e-4)
    still = run_trial(sandboxed_step_of(model), Change(rate=0.0), layers=layers, passes=4, start_norms=norms)
    assert still.loss == pytest.approx(math.log(10), rel=0.1)


def test_a_nonfinite_step_ends_the_trial():
    model = chain(2, activation=nn.ReLU)
    step = sandboxed_step_of(model, torch.optim.SGD(model.parameters(), lr=1e20))
    assert run_trial(step, Change(), layers=weights(model), passes=4).loss == math.inf


def test_gradients_of_outside_parameters_are_restored():
    model = chain(2, activation=nn.ReLU)
    outside = nn.Parameter(torch.ones(()))
    step = sandboxed_step_of(model, torch.optim.SGD([*model.parameters(), outside], lr=0.1))
    inner = step.loss_of
    step = dataclasses.replace(step, loss_of=lambda batch: inner(batch) * outside)
    outside.grad = torch.tensor(3.0)
    run_trial(step, Change(), layers=weights(model), passes=4)
    assert outside.grad == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused(reentrant):
    model = chain(2, activation=nn.ReLU)
    step = sandboxed_step_of(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def loss_of(batch):
        x, y = batch
        hidden = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
        return nn.functional.cross_entropy(hidden, y)

    step = dataclasses.replace(step, loss_of=loss_of)
    with pytest.raises((ValueError, RuntimeError), match="checkpointing"):
        run_trial(step, Change(activation="gelu"), layers=weights(model), passes=1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_module_is_refused():
    model = chain(2, activation=nn.ReLU)
    model.append(torch.jit.script(nn.Linear(10, 10)))
    step = sandboxed_step_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="scripted"):
        run_trial(step, Change(), layers=weights(model), passes=4)


def test_a_step_without_an_optimizer_is_refused():
    step = dataclasses.replace(sandboxed_step_of(chain(2)), optimizer=None)
    with pytest.raises(ValueError, match="needs the optimizer"):
        run_trial(step, Change(), layers=(), passes=1)


def test_spectral_norms_bound_every_slope():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    with torch.no_grad():
        [p.mul_(5) for p in model.parameters()]
    x = torch.randn(32, 8, requires_grad=True)
    swaps = SwappedForward(model, Change(lipschitz=True), LayerStructure())
    with swaps:
        out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert slope.norm(dim=1).max() <= 1 + 1e-5
    (free,) = torch.autograd.grad(model(x).sum(), x)
    assert free.norm(dim=1).max() > 1


@pytest.mark.parametrize("decay", [1.0, 0.0])
def test_virtual_steps_use_the_factor_of_weight_decay(decay):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=9.0)
    batch = torch.randn(16, 4), torch.zeros(16, 2)
    zero = SandboxedStep(
        model, lambda b: 0.0 * model(b[0]).sum() + model[0].weight.square().sum().detach(), batch, optimizer
    )
    before = model[0].weight.detach().square().sum().item()
    loss = run_trial(zero, Change(decay=decay), layers=weights(model), passes=3).loss
    # A gradient of zero is one of a dead layer; what is left of the weights is told by the loss alone.
    assert loss == math.inf
    seen = []
    watched = dataclasses.replace(
        zero, loss_of=lambda b: seen.append(model[0].weight.detach().square().sum().item()) or zero.loss_of(b)
    )
    run_trial(watched, Change(decay=decay), layers=weights(model), passes=3)
    assert seen[-1] == pytest.approx(before * (1 - 0.9 * decay) ** 4, rel=1e-4, abs=1e-8)


def test_another_momentum_is_another_rate_for_a_steady_gradient():
    torch.manual_seed(0)
    model = chain(2, activation=nn.ReLU)
    heavy = sandboxed_step_of(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.99))
    light = sandboxed_step_of(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
    one = run_trial(heavy, Change(momentum=0.9), layers=weights(model), passes=4)
    other = run_trial(light, Change(), layers=weights(model), passes=4)
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.loss != run_trial(heavy, Change(), layers=weights(model), passes=4).loss
    grows = sandboxed_step_of(model, torch.optim.SGD(model.parameters(), lr=1e-9, momentum=1.02))
    assert math.isfinite(run_trial(grows, Change(), layers=weights(model), passes=2).loss)


def test_a_net_that_the_steps_killed_has_infinite_loss():
    torch.manual_seed(0)
    model = chain(2, activation=nn.ReLU)
    calm = run_trial(sandboxed_step_of(model), Change(), layers=weights(model), passes=4)
    assert math.isfinite(calm.loss)
    wild = sandboxed_step_of(model, torch.optim.SGD(model.parameters(), lr=1e3))
    assert run_trial(wild, Change(), layers=weights(model), passes=4).loss == math.inf
