"""Who owns the tensors that a loss trains: in no optimizer, in no module, or elsewhere on purpose."""

import copy
import gc
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard import Cause, Fault, Guard, Severity
from lightning_gradguard.engine.ownership import add_ownership
from lightning_gradguard.engine.step_record import DetectorResult, StepRecord
from lightning_gradguard.introspection.graph_problems import GraphProblem, Problem

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


@pytest.fixture(autouse=True)
def _alone():
    """Optimizers of an earlier test must not own tensors of this one."""
    gc.collect()


def step(net, optimizer, loss_of=None, named=None, guard=None):
    """Take one step; return the guard and the first finding of a disconnected tensor."""
    guard = guard or Guard(net.named_parameters() if named is None else named, optimizer=optimizer)
    optimizer.zero_grad()
    loss = F.cross_entropy(net(X), Y) if loss_of is None else loss_of()
    loss.backward()
    report = guard.step(loss=loss)
    optimizer.step()
    return guard, next((f for f in report.findings if f.fault == Fault.DISCONNECTED), None)


def adam(*groups):
    return torch.optim.Adam([p for group in groups for p in group], lr=1e-3)


def sequential():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


class Held(nn.Module):
    """Stem and head are registered; what is between them is kept as ``keep`` says."""

    def __init__(self, keep, layers=2):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.keep(keep, [nn.Linear(8, 8) for _ in range(layers)])

    def keep(self, how, layers):
        if how == "list":
            self.hidden = layers
        elif how == "tuple":
            self.hidden = tuple(layers)
        elif how == "dict":
            self.hidden = {"first": layers[0], "second": layers[1]}
        elif how == "nested":
            self.hidden = [{"block": [layer]} for layer in layers]
        elif how == "dataclass":
            self.hidden = Blocks(*layers)
        elif how == "object":
            self.hidden = Plain(layers)
        elif how == "sequential in a list":
            self.hidden = [nn.Sequential(*layers)]
        elif how == "registered":
            self.hidden = nn.ModuleList(layers)

    def layers(self):
        hidden = self.hidden
        if isinstance(hidden, dict):
            return list(hidden.values())
        if isinstance(hidden, Blocks):
            return [hidden.first, hidden.second]
        if isinstance(hidden, Plain):
            return hidden.layers
        return [layer["block"][0] if isinstance(layer, dict) else layer for layer in hidden]

    def forward(self, x):
        x = self.stem(x).tanh()
        for layer in self.layers():
            x = layer(x).tanh()
        return self.head(x)


@dataclass
class Blocks:
    first: nn.Module
    second: nn.Module


class Plain:
    def __init__(self, layers):
        self.layers = layers


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("list", "hidden.0.weight"),
        ("tuple", "hidden.0.weight"),
        ("dict", "hidden.first.weight"),
        ("nested", "hidden.0.block.0.weight"),
        ("dataclass", "hidden.first.weight"),
        ("object", "hidden.layers.0.weight"),
        ("sequential in a list", "hidden.0.0.weight"),
    ],
)
def test_layers_that_no_module_registers(how, name):
    net = Held(how)
    guard, finding = step(net, adam(net.parameters()))
    assert finding.severity == Severity.WARNING
    assert finding.step == 0
    assert finding.parameters[0] == name
    assert guard.diagnosis.causes[0] == Cause.UNREGISTERED_MODULES
    assert "ModuleList" in guard.diagnosis.remedies[0].name


def test_layers_that_are_registered_are_fine():
    net = Held("registered")
    assert step(net, adam(net.parameters()))[1] is None


def test_heads_in_a_dict_are_layers_too():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Linear(4, 8)
            self.heads = {"a": nn.Linear(8, 3), "b": nn.Linear(8, 3)}

        def forward(self, x):
            x = self.trunk(x).tanh()
            return self.heads["a"](x) + self.heads["b"](x)

    net = Heads()
    assert step(net, adam(net.parameters()))[1].parameters[:2] == ("heads.a.weight", "heads.b.weight")


def test_a_plain_tensor_that_is_multiplied_with_is_a_weight():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(4, 8)
            self.w = torch.randn(8, 3, requires_grad=True)

        def forward(self, x):
            return self.stem(x) @ self.w

    net = Bare()
    guard, finding = step(net, adam(net.parameters()))
    assert finding.parameters == ("w",)
    assert guard.diagnosis.causes[0] == Cause.UNREGISTERED_MODULES


def test_all_layers_are_replaced():
    net = sequential()
    optimizer = adam(net.parameters())
    net[0], net[2], net[4] = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
    guard, finding = step(net, optimizer)
    assert finding.severity == Severity.WARNING
    assert finding.parameters[0] == "0.weight"
    assert guard.diagnosis.causes[0] == Cause.STALE_OPTIMIZER
    assert "optimizer" in guard.diagnosis.remedies[0].name.lower()


def test_the_head_is_replaced():
    net = sequential()
    optimizer = adam(net.parameters())
    net[4] = nn.Linear(8, 3)
    guard, finding = step(net, optimizer)
    assert finding.parameters == ("4.weight", "4.bias")
    assert guard.diagnosis.causes[0] == Cause.STALE_OPTIMIZER


def test_layers_are_replaced_behind_an_old_list_of_names():
    net = sequential()
    named, optimizer = list(net.named_parameters()), adam(net.parameters())
    net[2] = nn.Linear(8, 8)
    guard, finding = step(net, optimizer, named=named)
    assert finding.parameters == ("2.weight", "2.bias")
    assert guard.diagnosis.causes[0] == Cause.STALE_OPTIMIZER


def test_layers_are_replaced_while_the_old_ones_stay_alive():
    net = sequential()
    optimizer, old = adam(net.parameters()), net[4]
    net[4] = nn.Linear(8, 3)
    guard, finding = step(net, optimizer)
    assert finding.parameters == ("4.weight", "4.bias")
    assert guard.diagnosis.causes[0] == Cause.STALE_OPTIMIZER
    assert old is not net[4]


def test_layers_are_replaced_in_the_middle_of_training():
    net = sequential()
    optimizer = adam(net.parameters())
    guard, finding = step(net, optimizer)
    assert finding is None
    net[0] = nn.Linear(4, 8)
    guard, finding = step(net, optimizer, guard=guard)
    assert finding.parameters == ("0.weight", "0.bias")
    assert finding.step == 1
    assert guard.diagnosis.causes[0] == Cause.STALE_OPTIMIZER


def test_an_optimizer_of_another_model():
    net, other = sequential(), sequential()
    guard, finding = step(net, adam(other.parameters()))
    assert finding.severity == Severity.WARNING
    assert finding.parameters[0] == "0.weight"
    assert guard.diagnosis.causes[0] == Cause.STALE_OPTIMIZER


def test_an_optimizer_of_a_copy():
    net = sequential()
    guard, finding = step(net, adam(copy.deepcopy(net).parameters()))
    assert finding.severity == Severity.WARNING
    assert guard.diagnosis.causes[0] == Cause.STALE_OPTIMIZER


def test_it_is_mended_by_a_new_group():
    net = sequential()
    optimizer = adam(net.parameters())
    net[4] = nn.Linear(8, 3)
    guard, finding = step(net, optimizer)
    assert finding is not None
    optimizer.add_param_group({"params": list(net[4].parameters())})
    step(net, optimizer, guard=guard)
    assert not [p for p in guard.tracker.graph_summary.problems if p.certain]


def test_it_becomes_critical_after_the_patience():
    net = Held("list")
    optimizer = adam(net.parameters())
    guard = None
    for _ in range(60):
        guard, _ = step(net, optimizer, guard=guard)
    assert [f.severity for f in guard.findings if f.fault == Fault.DISCONNECTED] == [1, 2]


# What is not in the optimizer on purpose.


def quiet(net, optimizer, loss_of=None, named=None, steps=3):
    guard = None
    for _ in range(steps):
        guard, _ = step(net, optimizer, loss_of, named, guard)
    loud = [f for f in guard.findings if f.severity > Severity.INFO]
    assert not loud
    return guard


def test_inputs_that_require_gradients():
    net, x = sequential(), X.clone().requires_grad_(True)
    net.x = x
    guard = quiet(net, adam(net.parameters()), lambda: F.cross_entropy(net(x), Y))
    assert not guard.tracker.graph_summary.problems


def test_a_gradient_penalty():
    net = sequential()

    def loss_of():
        x = X.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return F.cross_entropy(net(x), Y) + slope.square().mean()

    assert not quiet(net, adam(net.parameters()), loss_of).tracker.graph_summary.problems


def test_points_of_a_differential_equation():
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
            self.points = torch.linspace(0, 1, 16)[:, None].requires_grad_(True)

    field = Field()

    def loss_of():
        u = field.net(field.points)
        (slope,) = torch.autograd.grad(u.sum(), field.points, create_graph=True)
        return (slope + u).square().mean()

    assert not quiet(field, adam(field.parameters()), loss_of).tracker.graph_summary.problems


@pytest.mark.parametrize("how", ["frozen", "no_grad"])
def test_a_teacher_in_a_list(how):
    net, teacher = sequential(), sequential()
    net.teacher = [teacher]
    if how == "frozen":
        teacher.requires_grad_(False)

    def loss_of():
        with torch.set_grad_enabled(how == "frozen"):
            aim = teacher(X)
        return F.mse_loss(net(X), aim)

    assert not quiet(net, adam(net.parameters()), loss_of).tracker.graph_summary.problems


def test_a_perceptual_loss_that_forgot_to_be_frozen_is_info():
    net, judge = nn.Sequential(nn.Linear(4, 4)), sequential()
    net.judge = [judge]
    guard = quiet(net, adam(net.parameters()), lambda: F.mse_loss(judge(net(X)), judge(2 * X)))
    (problem,) = guard.tracker.graph_summary.problems
    assert not problem.certain
    assert [f.severity for f in guard.findings] == [Severity.INFO]


def test_a_guide_in_evaluation_mode_is_info():
    net, guide = nn.Sequential(nn.Linear(4, 4)), sequential().eval()
    net.guide = [guide]
    quiet(net, adam(net.parameters()), lambda: F.cross_entropy(guide(net(X)), Y))


def test_latents_of_another_optimizer():
    net, latents = sequential(), nn.Parameter(torch.randn(16, 4))
    net.latents = [latents]
    other = adam([latents])
    assert not quiet(
        net, adam(net.parameters()), lambda: F.cross_entropy(net(latents), Y)
    ).tracker.graph_summary.problems
    assert other is not None


def test_a_generator_beside_its_critic():
    generator, critic = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    for_generator, for_critic = adam(generator.parameters()), adam(critic.parameters())
    quiet(generator, for_generator, lambda: critic(generator(X)).mean())
    quiet(critic, for_critic, lambda: -critic(generator(X)).mean())


def test_only_the_head_is_trained_without_freezing_the_rest():
    net = sequential()
    guard = quiet(net, adam(net[4].parameters()))
    (problem,) = guard.tracker.graph_summary.problems
    assert (problem.kind, problem.certain) == (Problem.STALE_OPTIMIZER, False)
    assert [f.severity for f in guard.findings] == [Severity.INFO]


def test_a_head_of_its_own_behind_a_separate_encoder_is_info():
    encoder, head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3)
    quiet(head, adam(head.parameters()), lambda: F.cross_entropy(head(encoder(X)), Y))


def test_frozen_backbones_adapters_and_tied_weights():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(4, 8).requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 8, bias=False)
            self.head, self.again = nn.Linear(8, 3), nn.Linear(8, 3)
            self.again.weight = self.head.weight

        def forward(self, x):
            h = self.base(x) + self.up(self.down(x))
            return self.head(h) + self.again(h)

    net = Adapted()
    assert not quiet(net, adam(p for p in net.parameters() if p.requires_grad)).tracker.graph_summary.problems


def test_parametrized_and_functional_weights():
    net = sequential()
    nn.utils.parametrizations.weight_norm(net[2])
    nn.utils.parametrizations.spectral_norm(net[0])
    assert not quiet(net, adam(net.parameters())).tracker.graph_summary.problems
    params = {name: p.detach().clone().requires_grad_(True) for name, p in sequential().named_parameters()}
    plain = sequential()

    def loss_of():
        return F.cross_entropy(torch.func.functional_call(plain, params, (X,)), Y)

    guard = quiet(plain, adam(params.values()), loss_of, list(params.items()))
    assert not guard.tracker.graph_summary.problems


def test_a_learner_that_is_copied_at_each_step():
    net = sequential()

    def loss_of():
        learner = copy.deepcopy(net)
        F.cross_entropy(learner(X), Y).backward()
        for p, q in zip(net.parameters(), learner.parameters(), strict=True):
            p.grad = q.grad
        return F.cross_entropy(learner(X), Y)

    quiet(net, adam(net.parameters()), loss_of)


def test_checkpointed_layers():
    net = sequential()

    def loss_of():
        h = torch.utils.checkpoint.checkpoint(net[:2], X.clone().requires_grad_(True), use_reentrant=True)
        return F.cross_entropy(net[2:](h), Y)

    quiet(net, adam(net.parameters()), loss_of)


@pytest.mark.parametrize(
    ("raised", "ceiling", "certain", "severity"),
    [
        (False, Severity.INFO, True, Severity.CRITICAL),
        (False, Severity.INFO, False, Severity.INFO),
        (True, Severity.CRITICAL, True, Severity.CRITICAL),
        (True, Severity.INFO, False, Severity.INFO),
        (True, Severity.CRITICAL, False, None),
    ],
)
def test_a_doubtful_mistake_replaces_no_finding_that_is_grave(raised, ceiling, certain, severity):
    result = DetectorResult(
        "Disconnected", Fault.DISCONNECTED, False, False, raised, not raised, ceiling, 1.0, 1.0, "tensors", ("a",)
    )  # fmt: skip
    nan = math.nan
    record = StepRecord(
        total_norm=1.0, clipped_norm=1.0, threshold=nan, clipped=False, finite=True, loss=1.0, loss_start=1.0,
        loss_mean=1.0, loss_first=1.0, loss_scale=nan, tilt=nan, update_ratio=nan, baseline_norm=1.0, norms={},
        results=[result],
    )  # fmt: skip
    problem = GraphProblem(Problem.STALE_OPTIMIZER, "The optimizer is stale.", ("b", "c"), certain)
    (found,) = add_ownership(record, (problem,)).results
    if severity is None:
        assert found == result
    else:
        assert (found.raised, found.ceiling, found.value, found.parameters) == (True, severity, 2, ("b", "c"))
