"""Warnings: the first names cause, fix and code; when the fault becomes critical, the next says what is new."""

import dataclasses
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from lightning_gradguard import Fault, GradientHalt, GradientWarning, Guard, Policy, Severity
from lightning_gradguard.diagnosis.diagnose import describe
from lightning_gradguard.diagnosis.diagnosis import Cause, Diagnosis, Remedy
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.engine.step_context import StepContext
from lightning_gradguard.introspection.sandbox import SandboxedStep
from lightning_gradguard.results import Finding, Report

PATIENCE = 20


def chain(activation, depth, std=None, bias=None):
    """Return a chain of layers, with weights of this spread and first biases of this value."""
    layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), activation())]
    net = nn.Sequential(*layers, nn.Linear(8, 2))
    for parameter in net.parameters():
        if std is not None and parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, std)
    if bias is not None:
        nn.init.constant_(net[0].bias, bias)
    return net


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.first(x).detach())


#: Trainings with a lasting fault: model and learning rate.
SICK = {
    Fault.VANISHING: lambda: (chain(nn.Sigmoid, 12), 0.1),
    Fault.DEAD: lambda: (chain(nn.ReLU, 3, bias=-50.0), 0.1),
    Fault.DISCONNECTED: lambda: (Cut(), 0.1),
    Fault.STALLED: lambda: (chain(nn.ReLU, 2), 1e-9),
}


def train(fault, policy, steps=100, *, trials=False):
    """Train until a halt, if there is one; return the guard and the messages about the fault."""
    torch.manual_seed(0)
    model, rate = SICK[fault]()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    guard = Guard(model.named_parameters(), optimizer=optimizer, policy=policy)

    def loss_of(batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            x = torch.randn(16, 8)
            batch = x, (x.sum(1) > 0).long()
            optimizer.zero_grad()
            loss = loss_of(batch)
            loss.backward()
            sandboxed_step = partial(SandboxedStep, model, loss_of, batch, optimizer)
            context = StepContext(batch=batch, sandboxed_step=sandboxed_step, run_trials=trials)
            try:
                skip = guard.step(loss, context=context).skip
            except GradientHalt:
                break
            if not skip:
                optimizer.step()
    own = [w for w in caught if issubclass(w.category, GradientWarning)]
    texts = [str(w.message).removeprefix("GradGuard: ") for w in own]
    return guard, [text for text in texts if text.startswith((f"{fault} ", f"{fault}:"))]


@pytest.mark.parametrize("fault", SICK)
def test_the_first_warning_has_cause_fix_code_and_where_to_read_more(fault):
    guard, (first,) = train(fault, Policy(patience=1000))
    diagnosis = guard.diagnosis
    assert first.startswith(f"{fault} since step ")
    assert f"Most likely cause: {diagnosis.causes[0].value.replace('_', ' ')}." in first
    assert f"Fix to try first: {diagnosis.remedies[0].name}.\n    {diagnosis.remedies[0].how}" in first
    for place in ("guard.diagnosis", "gradguard/diagnosis", "Text tab", "docs/"):
        assert place in first


@pytest.mark.parametrize("fault", SICK)
def test_a_critical_fault_says_so_and_repeats_no_more_than_it_must(fault):
    guard, (first, second) = train(fault, Policy(patience=PATIENCE))
    critical = next(f for f in guard.findings if f.fault == fault and f.severity == Severity.CRITICAL)
    assert critical.step <= PATIENCE + 100
    assert second.startswith(f"{fault}: now critical, after ")
    assert f"(since step {critical.step}" in second
    assert len(second) < len(first)
    assert guard.diagnosis.remedies[0].how not in second
    assert second.splitlines()[:2] != first.splitlines()[:2]


def test_without_patience_there_is_one_message_with_everything():
    guard, (only,) = train(Fault.VANISHING, Policy(patience=0))
    assert only.startswith("vanishing since step ")
    assert "\n  It is critical.\n" in only
    assert guard.diagnosis.remedies[0].how in only


def test_a_smaller_change_is_named_beside_the_first_fix():
    guard, (first,) = train(Fault.VANISHING, Policy(patience=1000))
    smallest = min(guard.diagnosis.remedies, key=lambda fix: fix.change.size)
    assert smallest.change.size < guard.diagnosis.remedies[0].change.size
    assert f"A smaller change, which may be enough: {smallest.name}.\n    {smallest.how}" in first


def test_a_critical_fault_whose_fixes_were_tried_carries_the_result_of_the_first():
    guard, (_, second) = train(Fault.VANISHING, Policy(patience=PATIENCE), trials=True)
    first = guard.diagnosis.remedies[0]
    assert first.tried
    assert f"Fix to try first: {first.name}.\n" in second
    assert f"Tried: tilt {first.before:.1f} -> {first.after:.1f}, loss {first.loss:.3g}." in second
    assert all(line.strip() in second for line in first.how.splitlines())


def test_a_halt_is_no_warning_too():
    guard, said = train(Fault.VANISHING, Policy(respond={"vanishing": "halt"}, patience=PATIENCE))
    assert len(said) == 1
    assert f"If this lasts {PATIENCE} further steps, the policy responds with 'halt'." in said[0]
    assert guard.findings[-1].severity == Severity.CRITICAL


FINDING = Finding(
    Fault.VANISHING, Severity.WARNING, 5, ("a[red].weight",), 4.0, 3.0, "DepthTilt", measure="tilt"
)
REPORT = Report(25, 1.0, 1.0, 1.0, None, 1.0, skip=False)


def said_of(*fixes, finding=FINDING, causes=(Cause.TOO_DEEP,)):
    diagnosis = Diagnosis(Fault.VANISHING, 5, (), (), causes, remedies=fixes)
    return describe(finding, None, Policy(patience=20), REPORT, diagnosis).splitlines()


LARGE = Remedy("Large", "large()\nmore()", change=Change(skip=True))
SMALL = Remedy("Small", "small()", change=Change(rate=0.1))
UNKNOWN = Remedy("Unknown", "unknown()")


@pytest.mark.parametrize(
    ("fixes", "smaller"),
    [
        ((LARGE, UNKNOWN, SMALL), "Small"),
        ((SMALL, LARGE), None),
        ((UNKNOWN, SMALL), None),
        ((LARGE, UNKNOWN), None),
        ((LARGE,), None),
        ((dataclasses.replace(LARGE, tried=True), SMALL), None),
    ],
)
def test_only_a_change_known_to_be_smaller_is_offered(fixes, smaller):
    lines = said_of(*fixes)
    offered = [line for line in lines if line.startswith("  A smaller change")]
    assert offered == ([f"  A smaller change, which may be enough: {smaller}."] if smaller else [])


def test_each_line_of_code_is_indented():
    assert said_of(LARGE)[2:5] == [
        "  Most likely cause: too deep. Fix to try first: Large.",
        "    large()",
        "    more()",
    ]


def test_without_a_known_cause_or_fix_nothing_is_made_up():
    assert not any("cause" in line for line in said_of(UNKNOWN, causes=(Cause.UNKNOWN,)))
    assert not any("Fix" in line for line in said_of())
    assert not any("cause" in line or "Fix" in line for line in said_of(causes=(Cause.UNKNOWN,)))


@pytest.mark.parametrize(("value", "limit"), [(4.0, 3.0), (2.0, 0.0), (math.inf, 1e3)])
def test_the_evidence_of_a_critical_fault_is_its_number(value, limit):
    critical = dataclasses.replace(FINDING, severity=Severity.CRITICAL, value=value, limit=limit)
    head, evidence, *_ = said_of(UNKNOWN, finding=critical)
    assert head == "vanishing: now critical, after 20 steps (since step 5, worst in a[red].weight)."
    assert evidence == (
        f"  Tilt: {value:.3g} (limit {limit:.3g})." if limit else f"  Number of tilt: {value:.3g}."
    )
