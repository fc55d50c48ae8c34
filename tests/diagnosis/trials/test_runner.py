"""Tried fixes come first, are few, and the first of them cures."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_gradguard.diagnosis.diagnose import diagnose_context as diagnose
from lightning_gradguard.diagnosis.diagnosis import Remedy
from lightning_gradguard.diagnosis.trials.candidates import find_candidates
from lightning_gradguard.diagnosis.trials.change import Change, SwappedForward
from lightning_gradguard.diagnosis.trials.runner import MAX_PASSES, TrialRunner, try_fixes, unhealthy_decades
from lightning_gradguard.diagnosis.trials.trial import TrialResult, apply_change_, run_trial
from lightning_gradguard.introspection.layer_calls import LayerStructure
from lightning_gradguard.introspection.sandbox import SandboxedStep
from lightning_gradguard.results import Fault


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def ruined(kind):
    """Return a model with a given fault."""
    torch.manual_seed(0)
    depth, activation, weight, bias = {
        Fault.VANISHING: (14, nn.Sigmoid, None, None),
        Fault.EXPLODING: (14, nn.ReLU, 0.6, 0.0),
        Fault.DEAD: (5, nn.ReLU, None, -12.0),
    }[kind]
    sizes = [32] + [48] * depth
    layers = [p for a, b in zip(sizes, sizes[1:], strict=False) for p in (nn.Linear(a, b), activation())]
    model = nn.Sequential(*layers, nn.Linear(48, 10))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and weight:
            nn.init.normal_(parameter, 0.0, weight)
        elif parameter.ndim == 1 and bias is not None and not name.startswith(str(len(model) - 1)):
            nn.init.constant_(parameter, bias)
    return model


def result(tilt, time_tilt=None, live=5):
    """Return the result of a trial with given tilts."""
    return TrialResult(0.0, tilt, time_tilt, live, LayerStructure(), 1)


class Counted:
    """Training step that counts its calls."""

    def __init__(self, lab, model, breaks=None):
        self.lab, self.model, self.calls, self.breaks = lab, model, 0, breaks

    def __call__(self, batch):
        self.calls += 1
        if self.breaks is not None and self.calls in self.breaks:
            raise RuntimeError("out of | <memory>\nhere")
        return F.cross_entropy(self.model(batch[0]), batch[1])


def examined(lab, fault, **more):
    """Return a model, its context, its diagnosis without and with trials, and the passes these took."""
    model = ruined(fault)
    optimizer = sgd(model, 1e-6 if fault == Fault.EXPLODING else 0.1)
    case = lab.train(model, lab.cross_entropy, optimizer, 5, fault, value=1.0)
    case = dataclasses.replace(case, input_rms=1.0)
    loss_of = Counted(lab, model, **more)
    plain = diagnose(case)
    step = SandboxedStep(model, loss_of, lab.templates()(0), optimizer)
    return model, case, plain, try_fixes(plain, case, lambda: step), loss_of.calls


@pytest.mark.parametrize("fault", [Fault.VANISHING, Fault.EXPLODING, Fault.DEAD])
def test_the_first_fix_cures(lab, fault):
    _, _, _, diagnosis, calls = examined(lab, fault)
    first = diagnosis.remedies[0]
    assert calls <= MAX_PASSES
    assert f"in {calls} passes" in diagnosis.trials[0]
    assert first.tried
    assert fault != Fault.VANISHING or unhealthy_decades(result(first.before)) > 1
    assert unhealthy_decades(result(first.after)) == 0

    def learns(model, change, steps=150):
        step = SandboxedStep(model, Counted(lab, model), lab.templates()(0), sgd(model))
        structure = run_trial(step, Change(), layers=(), passes=1).structure
        apply_change_(model, change, structure)
        optimizer, mode = sgd(model, 0.05), SwappedForward(model, change, structure)
        for number in range(steps):
            optimizer.zero_grad()
            with mode:
                loss = lab.cross_entropy(model, number)
            loss.backward()
            optimizer.step()
        return loss.item() < 0.5

    assert not learns(ruined(fault), Change())
    assert learns(ruined(fault), first.change)


@pytest.mark.parametrize("fault", [Fault.VANISHING, Fault.DEAD])
def test_fixes_are_ranked_by_health_then_cures_by_size_and_others_by_loss(lab, fault):
    _, _, plain, diagnosis, _ = examined(lab, fault)
    tried = [r for r in diagnosis.remedies if r.tried]
    stepped = [r for r in tried if r.loss is not None]
    assert 2 <= len(stepped) < len(tried) <= 6
    assert stepped == tried[: len(stepped)]
    healthy = [r for r in stepped if unhealthy_decades(result(r.after)) == 0]
    assert healthy == stepped[: len(healthy)]
    for i, r in enumerate(healthy):
        assert not any(
            other.change.size <= r.change.size and other.loss < r.loss for other in healthy[i + 1 :]
        )
    untried = [r for r in diagnosis.remedies if not r.tried]
    assert diagnosis.remedies == (*tried, *untried)
    assert set(untried) <= set(plain.remedies)
    assert len({r.name for r in diagnosis.remedies}) == len(diagnosis.remedies)
    assert dataclasses.replace(diagnosis, remedies=plain.remedies, trials=()) == plain


class Scripted(TrialRunner):
    """Runner whose trials have given results: (tilt, loss after virtual steps) by the name of the fix."""

    def __init__(self, results, loss=2.0, *, bottomless=False):
        super().__init__(None, (), bottomless=bottomless)
        self.results = {change: outcome for change, outcome in results}
        self.stepped = []
        self.baseline = TrialResult(loss, 9.0, None, 5, LayerStructure(), 4, start=loss)
        self.passes = 4

    def _run(self, change, passes):
        self.passes += passes
        tilt, loss = self.results.get(change, (9.0, 9.0))  # a pair does no good
        if passes > 1:
            self.stepped.append(change)
        return TrialResult(
            loss if passes > 1 else math.nan, tilt, None, 5, LayerStructure(), passes, start=2.0
        )


CHANGES = [
    Change(skip=True, normalise=True, activation="relu"), Change(normalise=True, initialise="he"),
    Change(initialise="he"), Change(normalise=True), Change(activation="relu"), Change(rate=0.1),
    Change(skip=True), Change(input=True), Change(shorten=True), Change(activation="gelu", initialise="he"),
]  # fmt: skip
TILTS, LOSSES = st.sampled_from([0.0, 1.0, 2.6, 5.0, -4.0]), st.sampled_from([0.5, 1.0, 1.3, 1.9, 2.1, 3.0])


@given(st.lists(st.tuples(TILTS, LOSSES), min_size=len(CHANGES), max_size=len(CHANGES)))
def test_the_smallest_of_the_cures_comes_first(outcomes):
    """A cure has a healthy tilt, and at least half of the best healthy fix's fall of the loss."""
    results = list(zip(CHANGES, outcomes, strict=True))
    runner = Scripted(results)
    trials = runner.run([Remedy(str(change.size), "", change=change) for change in CHANGES])
    assert runner.passes <= MAX_PASSES
    assert {t.fix.change for t in trials} >= set(CHANGES)
    healthy = {change for change, (tilt, _) in results if unhealthy_decades(result(tilt)) == 0}
    if healthy:
        least = min(change.size for change in healthy)
        assert any(change.size == least for change in runner.stepped if change in healthy)
    stepped = [t for t in trials if t.result and not math.isnan(t.result.loss)]
    falls = {t.fix.change: 2.0 - t.result.loss for t in stepped if t.fix.change in healthy}
    best = max(falls.values(), default=0.0)
    is_cure = [best > 0 and falls.get(t.fix.change, -1.0) >= best / 2 for t in stepped]
    cures = [t for t, yes in zip(stepped, is_cure, strict=True) if yes]
    assert trials[: len(cures)] == cures  # none of another kind stands before them
    assert [(t.fix.change.size, t.result.loss) for t in cures] == sorted(
        (t.fix.change.size, t.result.loss) for t in cures
    )


def test_among_fixes_that_do_not_cure_the_effect_decides():
    """Of these, none brings the tilt to health."""
    outcomes = [(6.0, 1.0), (4.0, 1.5), (5.0, 0.5), *[(9.0, 1.9)] * 7]
    trials = Scripted(list(zip(CHANGES, outcomes, strict=True))).run(
        [Remedy(str(change), "", change=change) for change in CHANGES]
    )
    assert [t.fix.change for t in trials[:2]] == [CHANGES[1], CHANGES[2]]


def test_without_a_lower_bound_of_the_loss_nothing_is_a_cure():
    outcomes = [(0.0, 1.0)] * len(CHANGES)
    trials = Scripted(list(zip(CHANGES, outcomes, strict=True)), bottomless=True).run(
        [Remedy(str(change), "", change=change) for change in CHANGES]
    )
    assert trials[0].fix.change == CHANGES[0]


def test_where_every_loss_without_a_fix_is_infinite_any_finite_one_cures():
    outcomes = [(0.0, 1.0), *[(9.0, 1.0)] * 4, (0.0, 90.0), *[(9.0, 1.0)] * 4]
    runner = Scripted(list(zip(CHANGES, outcomes, strict=True)), loss=math.inf)
    trials = runner.run([Remedy(str(change), "", change=change) for change in CHANGES])
    assert [t.fix.change for t in trials[:2]] == [Change(rate=0.1), CHANGES[0]]


def test_a_fix_that_cannot_be_tried_has_a_note(lab):
    """The first trial after the four passes without a change fails."""
    _, _, plain, diagnosis, _ = examined(lab, Fault.VANISHING, breaks={5})
    failed = [r for r in diagnosis.remedies if r.note]
    assert [r.name for r in failed] == [plain.remedies[0].name]
    assert failed[0].note == "could not be tried: RuntimeError: out of | <memory> here"
    assert not failed[0].tried
    assert diagnosis.remedies[0].tried
    for text in (str(diagnosis), diagnosis.to_html()):
        assert "could not be tried: RuntimeError" in " ".join(text.split())
    assert "<memory>" not in diagnosis.to_html()
    assert "<memory>" not in diagnosis.to_markdown()


def test_the_reason_is_given_where_nothing_can_be_tried(lab):
    _, case, plain, diagnosis, _ = examined(lab, Fault.VANISHING, breaks={1, 2})
    assert diagnosis.remedies == plain.remedies
    assert diagnosis.trials == ("No fix was tried: RuntimeError: out of | <memory> here.",)

    def refuse():
        raise ValueError("the module optimizes by hand")

    refused = try_fixes(plain, case, refuse)
    assert refused.trials == ("No fix was tried: the module optimizes by hand.",)
    assert refused.remedies == plain.remedies
    assert refused.trials[0] in str(refused)


def test_fixes_of_other_faults_are_not_tried(lab):
    model = lab.mlp(4)
    case = lab.train(model, lab.cross_entropy, sgd(model, 1e-9), 30, Fault.STALLED)
    plain = diagnose(case)
    told = try_fixes(plain, case, lambda: pytest.fail("not to be asked for"))
    assert told.trials == ("No fix was tried: none for this cause can be tried on a copy of the model.",)
    assert dataclasses.replace(told, trials=()) == plain


def test_runaway_weights_are_scaled_back_for_trials(lab):
    model = ruined(Fault.VANISHING)
    optimizer = sgd(model)
    case = lab.train(model, lab.cross_entropy, optimizer, 5, Fault.VANISHING, value=8.0)
    with torch.no_grad():
        [p.mul_(1e4) for p in model.parameters()]
    norms = {n: p.detach().norm().item() for n, p in model.named_parameters()}
    case = dataclasses.replace(case, weight_norms=tuple(norms[n] for n in case.names))
    step = SandboxedStep(model, Counted(lab, model), lab.templates()(0), optimizer)
    diagnosis = try_fixes(diagnose(case), case, lambda: step)
    assert "scaled back" in diagnosis.trials[-1]
    assert diagnosis.remedies[0].loss < 10
    assert model[0].weight.detach().norm().item() == norms["0.weight"]


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
def test_fixes_of_a_compiled_model_are_tried_eagerly(lab):
    model, case, plain, diagnosis, _ = examined(lab, Fault.VANISHING)
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(compiled)
    step = SandboxedStep(
        compiled, lambda b: F.cross_entropy(compiled(b[0]), b[1]), lab.templates()(0), optimizer
    )
    assert try_fixes(plain, case, lambda: step).remedies == diagnosis.remedies


def test_a_sequence_is_ranked_by_its_tilt_over_time(lab):
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(8, 24, batch_first=True), nn.Linear(24, 4)
            self.rnn.weight_hh_l0.data.mul_(0.3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model, optimizer = Model(), None
    batch = torch.randn(32, 50, 8), torch.randint(4, (32,))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    case = lab.case_of(model, loss, Fault.VANISHING_IN_TIME, value=16.0, time_tilt=16.0, optimizer=optimizer)
    step = SandboxedStep(model, lambda b: F.cross_entropy(model(b[0]), b[1]), batch, optimizer)
    diagnosis = try_fixes(diagnose(case), case, lambda: step)
    by_name = {r.name: r for r in diagnosis.remedies}
    assert {"Orthogonal recurrent weights", "LSTM with a forget-gate bias of 3", "GRU"} <= set(by_name)
    assert diagnosis.remedies[0].before > 6
    assert -3 < diagnosis.remedies[0].after < 6
    assert by_name["GRU"].after > by_name["LSTM with a forget-gate bias of 3"].after
    assert isinstance(model.rnn, nn.RNN)


def test_fixes_that_fit_are_candidates(lab):
    """They are the fixes that the evidence suggests, and more; none is there twice."""
    model, case, plain, _, _ = examined(lab, Fault.VANISHING)
    step = SandboxedStep(model, Counted(lab, model), lab.templates()(0), sgd(model))
    structure = run_trial(step, Change(), layers=(), passes=1).structure
    names = [r.name for r in find_candidates(case, plain.causes, model, step.batch, structure)]
    assert {r.name for r in plain.remedies} - {"Xavier initialization"} <= set(names)
    assert {"ReLU", "GELU", "Skip connections", "Fewer layers", "Standardize the inputs"} <= set(names)
    assert "An activation that cannot die" not in names
    assert len(names) == len(set(names))
    worse = dataclasses.replace(case, finding=lab.finding(Fault.EXPLODING))
    exploding = find_candidates(worse, plain.causes, model, step.batch, structure)
    assert any(r.change.rate < 1 for r in exploding)


def test_the_worse_of_both_tilts_counts():
    assert (
        unhealthy_decades(result(0.0))
        == unhealthy_decades(result(2.5, 3.8))
        == unhealthy_decades(result(None))
        == 0
    )
    assert unhealthy_decades(result(4.0)) == pytest.approx(1.5)
    assert unhealthy_decades(result(-4.0, 10.0)) == pytest.approx(4.0)
    assert unhealthy_decades(None) == math.inf
    assert unhealthy_decades(result(0.0, live=0)) == unhealthy_decades(result(0.0, math.nan)) == math.inf


def test_a_batch_that_cannot_be_halved_is_used_whole():
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    batch = torch.randn(12, 5), torch.eye(12), torch.randint(3, (12,))

    def loss_of(batch):
        nodes, adjacency, labels = batch
        return torch.nn.functional.cross_entropy(model(adjacency @ nodes), labels)

    step = SandboxedStep(model, loss_of, batch, torch.optim.SGD(model.parameters(), lr=0.1))
    runner = TrialRunner(step, ("0.weight", "2.weight"))
    assert math.isfinite(runner.run_baseline().loss)
    assert not runner.halve
