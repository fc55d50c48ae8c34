"""The response "clip" of a guard: from when to when, resume, rollback, lag, scaler, and what a report says."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_gradguard.guard as guard_module
from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    Fault,
    GradientWarning,
    Guard,
    NormClip,
    Policy,
    SpikeClip,
    SteadyClip,
    ZClip,
)
from lightning_gradguard.clippers import recommended_clipper
from lightning_gradguard.results import ClipSpan

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

#: Clips every step when it is in force.
TIGHT = NormClip(1e-3)
CLIP = Policy(respond={"spike": "clip", "exploding": "clip"}, patience=6)
SPIKE = 1e4


def norm_of(model):
    """Return the norm of the gradients as the optimizer gets them; inf if there are none."""
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else math.inf


class Loop:
    """Training of a small net whose gradients are multiplied at some steps."""

    def __init__(self, factors=None, guarded=True, rate=0.02, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.fused = options.get("lag") == 1
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=0.9, fused=self.fused)
        self.factors = factors or {}
        options = {"policy": CLIP, "clipper": TIGHT, **options}
        self.guard = (
            Guard(self.model.named_parameters(), optimizer=self.optimizer, **options) if guarded else None
        )
        self.reports, self.norms = [], []

    def take(self, step):
        inputs = torch.Generator().manual_seed(step)
        x = torch.randn(32, 6, generator=inputs)
        self.optimizer.zero_grad()
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        for p in self.model.parameters():
            p.grad.mul_(self.factors.get(step, 1.0))
        if self.guard is not None:
            self.reports.append(self.guard.step(loss=loss))
        self.norms.append(norm_of(self.model))
        self.optimizer.step()

    def run(self, steps, begin=0):
        for step in range(begin, steps):
            self.take(step)
        return self

    @property
    def clipped(self):
        """Steps whose gradients were in fact clipped."""
        return [step for step, norm in enumerate(self.norms) if norm < 2e-3]


def plain(state):
    """Return a state as text, in which NaN is equal to itself."""
    if isinstance(state, torch.Tensor):
        return f"{state.dtype} {state.tolist()}"
    if isinstance(state, dict):
        return str({key: plain(value) for key, value in state.items()})
    return str(list(map(plain, state))) if isinstance(state, list) else repr(state)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("clipper", [None, TIGHT, SpikeClip(), SteadyClip(), AutoClip(), AGC()])
def test_until_a_fault_is_found_nothing_is_changed(lag, clipper):
    bare, loop = Loop(guarded=False, lag=lag).run(60), Loop(clipper=clipper, lag=lag).run(60)
    same(loop.model.state_dict(), bare.model.state_dict())
    assert loop.guard.counts == {"judged": 60 - lag, "clipped": 0, "skipped": 0, "nonfinite": 0}
    assert loop.guard.clip_spans == ()
    for report in loop.reports:
        assert (report.scale, report.threshold) == (1.0, None)
        assert report.clipped_norm == report.total_norm


@pytest.mark.parametrize("lag", [0, 1])
def test_it_clips_from_the_spike_until_it_is_over(lag):
    loop = Loop({50: SPIKE}, lag=lag, rate=1e-7).run(80)
    steps = list(range(50 + lag, 57 + lag))  # the spike's own, or the next, and patience further ones
    assert loop.clipped == steps
    loop.guard.close()
    assert loop.guard.clip_spans == (ClipSpan(steps[0], steps[-1], ("spike",)),)
    assert loop.guard.counts["clipped"] == len(steps)
    history = loop.guard.history.table()
    in_force = ~torch.tensor(history["threshold"]).isnan()
    assert history["step"][in_force].tolist() == steps
    assert (history["clipped_norm"][in_force] <= history["threshold"][in_force]).all()
    assert (history["scale"] < 1).tolist() == in_force.tolist()


def test_a_further_spike_extends_the_span():
    loop = Loop({50: SPIKE, 55: SPIKE}).run(80)
    assert loop.clipped == list(range(50, 62))
    assert loop.guard.clip_spans == (ClipSpan(50, 61, ("spike",)),)


def test_a_lasting_fault_is_clipped_from_its_warning_on_and_never_halts():
    policy = Policy(respond={"exploding": "clip"}, patience=6)
    loop = Loop(dict.fromkeys(range(50, 75), SPIKE), rate=1e-7, policy=policy).run(120)
    found = [r for r in loop.reports if any(f.fault == Fault.EXPLODING for f in r.findings)]
    assert [f.severity.name for r in found for f in r.findings if f.fault == Fault.EXPLODING] == [
        "WARNING",
        "CRITICAL",
    ]
    (span,) = loop.guard.clip_spans
    assert span.first == found[0].step
    assert span.faults == ("exploding",)
    assert 75 < span.last < 110
    assert loop.clipped == list(range(span.first, span.last + 1))


def test_other_faults_do_not_put_it_in_force():
    loop = Loop({50: SPIKE}, policy=Policy(respond={"exploding": "clip"}), rate=1e-7).run(60)
    assert any(f.fault == Fault.SPIKE for f in loop.guard.findings)
    assert loop.clipped == []


def test_with_no_patience_only_the_spike_itself_is_clipped():
    loop = Loop({50: SPIKE}, policy=Policy(respond={"spike": "clip"}, patience=0)).run(60)
    assert loop.clipped == [50]
    assert loop.guard.clip_spans == (ClipSpan(50, 50, ("spike",)),)


def test_without_a_clipper_it_is_the_recommended_one(monkeypatch):
    monkeypatch.setattr(guard_module, "recommended_clipper", lambda: TIGHT)
    loop = Loop({50: SPIKE}, clipper=None).run(60)
    assert loop.guard.clipper is TIGHT
    assert loop.clipped == list(range(50, 57))
    monkeypatch.undo()
    assert Loop(clipper=None).guard.clipper == recommended_clipper() == SteadyClip(soft_start=False)
    assert Loop(clipper=None, policy=None).guard.clipper is None


def test_a_spike_that_is_skipped_for_another_reason_is_not_clipped():
    loop = Loop({50: math.nan, 55: SPIKE}).run(80)
    assert [r.step for r in loop.reports if r.skip] == [50]
    assert loop.guard.clip_spans == (ClipSpan(55, 61, ("spike",)),)


def test_a_step_that_is_not_finite_does_not_count_for_its_end():
    loop = Loop({50: SPIKE, 52: math.nan}).run(80)
    assert loop.guard.clip_spans == (ClipSpan(50, 57, ("spike",)),)
    assert loop.guard.counts["clipped"] == 7
    assert loop.reports[52].threshold is None


@pytest.mark.parametrize(
    "clipper",
    [
        SpikeClip(),
        SteadyClip(),
        SteadyClip(soft_start=False),
        AutoClip(),
        ZClip(warmup_steps=5),
        AdaGC(warmup_steps=5),
    ],
)
@settings(max_examples=5)
@given(seed=st.integers(0, 1000), spikes=st.sets(st.integers(30, 79), max_size=3))
def test_it_learns_as_if_it_had_clipped_all_along(clipper, seed, spikes):
    """The norms that a clipper sees are those before clipping; also where steps take the fast path."""

    def run(policy):
        parameters = [nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
        named = [(f"layer{i}.weight", p) for i, p in enumerate(parameters)]
        guard, accepted = Guard(named, clipper=clipper, policy=policy), 0
        gradients = torch.Generator().manual_seed(seed)
        for step in range(80):
            for parameter in parameters:
                parameter.grad = torch.randn(4, 4, generator=gradients) * (SPIKE if step in spikes else 1.0)
            report = guard.step(loss=torch.tensor(1 / (1 + step / 50)))
            accepted += "_fields" in vars(report)
        return guard.state.clipper, accepted

    always, _ = run(None)
    on_a_fault, accepted = run(CLIP)
    same(on_a_fault, always)
    assert accepted > 0


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("cut", [49, 50, 51, 53, 56, 57, 58, 60])
def test_a_resumed_run_clips_as_the_uninterrupted_one(lag, cut):
    whole = Loop({50: SPIKE}, lag=lag, rate=1e-5).run(70)
    first = Loop({50: SPIKE}, lag=lag, rate=1e-5).run(cut)
    second = Loop({50: SPIKE}, lag=lag, rate=1e-5)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.guard.load_state_dict(copy.deepcopy(first.guard.state_dict()))
    second.run(70, cut)
    same(second.model.state_dict(), whole.model.state_dict())
    assert second.norms == whole.norms[cut:]
    assert plain(second.guard.state_dict()) == plain(whole.guard.state_dict())


def test_a_state_of_before_it_was_saved_is_one_that_clips_nothing():
    loop = Loop({50: SPIKE}).run(53)
    state = loop.guard.state_dict()
    del state["judge"]["clip_response"]
    loop.guard.load_state_dict(state)
    loop.run(60, 53)
    assert loop.clipped == [50, 51, 52]
    assert loop.guard.clip_spans == ()


def test_a_policy_without_the_response_takes_over_nothing_of_it():
    other = Loop(policy=None)
    other.guard.load_state_dict(Loop({50: SPIKE}).run(53).guard.state_dict())
    assert other.guard.clip_spans == ()
    other.run(60, 53)
    assert other.guard.counts["clipped"] == 3 + 7  # its clipper clips all along


@pytest.mark.parametrize("from_start", [True, False])
def test_a_rollback_ends_it_and_keeps_the_span(from_start):
    loop = Loop({50: SPIKE})
    loop.run(40)
    state = None if from_start else loop.guard.state_dict()
    loop.run(53, 40)
    loop.guard.roll_back(state)
    assert loop.guard.clip_spans == (ClipSpan(50, 52, ("spike",)),)
    loop.run(60, 53)
    assert loop.clipped == [50, 51, 52]


def test_with_a_scaler_the_unscaled_gradients_are_clipped():
    loop = Loop({50: SPIKE})
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(60):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
        loop.optimizer.zero_grad()
        loss = (loop.model(x) - x.sum(1, keepdim=True)).square().mean()
        scaler.scale(loss * loop.factors.get(step, 1.0)).backward()
        report = loop.guard.step(loss=loss, scaler=scaler)
        loop.norms.append(norm_of(loop.model))
        assert loop.norms[-1] == pytest.approx(report.clipped_norm, rel=1e-3)
        scaler.step(loop.optimizer)
        scaler.update()
    assert loop.clipped == list(range(50, 57))


def test_the_warning_says_from_when_to_when():
    policy = Policy(respond={"exploding": "clip", "spike": "clip"}, patience=6)
    with pytest.warns(GradientWarning) as caught:
        loop = Loop(dict.fromkeys(range(50, 75), SPIKE), policy=policy).run(100)
    assert loop.guard.clip_spans[0].first == 50
    texts = [str(w.message) for w in caught]
    assert len(texts) >= 2
    for text in texts:
        assert "Gradients are clipped from step 50 on, until 6 steps have passed without this fault." in text
        assert '"halt"' not in text


def test_one_step_late_the_warning_speaks_of_the_next_step():
    # Without a loss a spike is a warning.
    loop = Loop(lag=1)
    with pytest.warns(GradientWarning, match="Gradients are clipped from the next step on, until 6 steps"):
        for step in range(55):
            for p in loop.model.parameters():
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                p.grad = noise * (SPIKE if step == 50 else 1.0)
            loop.guard.step(graph=sum(p.sum() for p in loop.model.parameters()))


def test_a_diagnosis_names_the_clipper_only_while_it_is_in_force(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lightning_gradguard.diagnosis.diagnose.diagnose",
        lambda facts, finding, *_: seen.append((finding.fault.value, facts.clipper)) or 1 / 0,
    )
    bare = Policy(respond={"spike": "clip"}, patience=6)
    Loop(dict.fromkeys(range(50, 75), SPIKE), policy=bare, rate=1e-7).run(60)
    Loop(dict.fromkeys(range(50, 75), SPIKE), policy=Policy(), clipper=None, rate=1e-7).run(60)
    assert ("exploding", repr(TIGHT)) in seen
    assert ("exploding", "") in seen


def test_a_guard_prints_its_clipper_and_policy():
    assert "clipper=SpikeClip()" in repr(Loop(clipper=SpikeClip()).guard)
    assert "'exploding': 'clip'" in repr(Loop().guard)
