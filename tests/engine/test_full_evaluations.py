"""Slow detectors in a guard: late faults are found soon, and a result stands until the next full evaluation."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_gradguard import Fault, GradientHalt, Guard, Policy, Severity
from lightning_gradguard.detectors import default_detectors
from lightning_gradguard.detectors.base import NoState, reading
from lightning_gradguard.detectors.depth import DepthTilt
from lightning_gradguard.detectors.explosion import Exploding
from lightning_gradguard.detectors.inactivity import DeadUnits, Disconnected, Underflow
from lightning_gradguard.detectors.updates import Stalled, UpdateRatio
from lightning_gradguard.engine.sampling_schedule import LATER, REFRESH, SETTLED, SamplingSchedule

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

ONSET, LAYERS, ROWS = 300, 6, 16
WATCH = Policy(respond={fault.value: "warn" for fault in Fault}, patience=10**6)


class Weights(nn.Module):
    """Weights that the loss is computed with; the first so many are detached."""

    def forward(self, cut):
        weights = [w.detach() if i < cut else w for i, w in enumerate(self.parameters())]
        return sum((weight * 0).sum() for weight in weights) + 1.0


class Hand:
    """A guard over weights and gradients set by hand; the loss makes no progress.

    Args:
        sick: Whether something is wrong at a step.
        fault: What is.
    """

    def __init__(self, fault, sick=lambda step: step >= ONSET, **kwargs):
        self.fault, self.sick = fault, sick
        dtype = torch.float16 if fault == "underflow" else torch.float32
        self.model = Weights()
        for i in range(LAYERS):
            self.model.register_parameter(f"w{i}", nn.Parameter(torch.ones(ROWS, ROWS, dtype=dtype)))
        self.kwargs = {"policy": WATCH, "lag": 0, **kwargs}
        self.guard = Guard(self.model.named_parameters(), **self.kwargs)
        self.moved = 0.0
        self.evaluated = []  # steps that were evaluated in full

    def set(self, step):
        """Set weights and gradients of a step; return its loss."""
        sick = self.sick(step)
        wave = 1 + 0.1 * math.sin(step)
        self.moved += {"stalled": 0.0, "large": 0.3}.get(self.fault, 1e-3) if sick else 1e-3
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for i, weight in enumerate(named.values()):
                weight.fill_(1 + self.moved % 8)
                size = wave
                if sick and self.fault in ("vanishing", "exploding"):
                    decades = 6 if self.fault == "vanishing" else -6
                    size = wave * 10 ** (-decades * (1 - i / (LAYERS - 1)))
                if sick and self.fault == "underflow":
                    size = 1e-6
                weight.grad = torch.full_like(weight, size / ROWS)
                if sick and self.fault == "dead" and i == 2:
                    weight.grad[1:] = 0
        if self.fault == "disconnected":
            # Cut off: it takes part in the pass, but no path leads to it from the loss.
            if sick:
                named["w0"].grad = None
            return self.model(int(sick))
        return torch.tensor(1.0)

    def step(self, step):
        report = self.guard.step(loss=self.set(step))
        if self.guard.tracker.schedule.last_full == self.guard.tracker.schedule.good - 1 and not report.skip:
            self.evaluated.append(step)
        return report

    def first(self, steps, fault=None):
        """Return the first step with a warning."""
        for step in steps:
            for finding in self.step(step).findings:
                if finding.severity >= Severity.WARNING and fault in (None, finding.fault):
                    return step
        return None


class Always(SamplingSchedule):
    """Evaluates every step in full, as if no detector were slow; samples are as frequent as usual."""

    def due(self, has_loss, rate=-1.0):
        due = super().due(has_loss, rate)
        self._is_usual = due.elapsed > 0
        return due._replace(elapsed=1)

    def observe(self, shown):
        super().observe(shown._replace(full=self._is_usual))


#: What is wrong, the detectors that find it, and how many looks later they may than if they were asked at each step.
#: One that waits for 40 steps waits for five looks, since a look stands for eight steps at most.
LATE = {
    "vanishing": (DepthTilt(), Fault.VANISHING, 1),
    "stalled": (Stalled(), Fault.STALLED, 3),
    "large": (UpdateRatio(), Fault.OVERSIZED_UPDATE, 3),
    "dead": (DeadUnits(), Fault.DEAD, 3),
    "underflow": (Underflow(), Fault.UNDERFLOW, 2),
    "exploding": (None, Fault.EXPLODING, 1),
}


@pytest.mark.parametrize("fault", LATE)
@pytest.mark.parametrize("alone", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_late_fault_is_found_within_a_few_full_evaluations(fault, alone):
    detector, expected, allowed = LATE[fault]
    detectors = (detector,) if alone and detector is not None else default_detectors()
    plain, always = (Hand(fault, detectors=detectors) for _ in range(2))
    always.guard.tracker.schedule = Always()
    soon = always.first(range(ONSET + 6 * LATER), expected)
    found = plain.first(range(ONSET + 6 * LATER), expected)
    assert soon is not None
    assert found is not None
    # A full evaluation stands for eight steps, so the count may be reached some steps early.
    assert ONSET <= soon <= found + REFRESH
    assert sum(soon <= step <= found for step in plain.evaluated) <= allowed


@pytest.mark.parametrize("fault", [*LATE, "disconnected"])
def test_a_fault_from_the_start_is_found_as_early_as_with_full_evaluations_alone(fault):
    """Or a few steps later, if that lies beyond the very first steps, which are all evaluated in full."""
    plain, always = (Hand(fault, lambda step: True) for _ in range(2))
    always.guard.tracker.schedule = Always()
    soon, found = (hand.first(range(80)) for hand in (always, plain))
    assert soon is not None
    assert soon == found or (soon >= 10 and soon <= found < soon + (4 if soon < 32 else 10))


def test_a_tensor_cut_off_late_is_found_six_full_evaluations_later():
    """At the first of them it has had a gradient since the one before."""
    hand = Hand("disconnected", detectors=(Disconnected(),))
    found = hand.first(range(ONSET + 6 * LATER))
    assert found is not None
    assert sum(ONSET < step <= found for step in hand.evaluated) == 6
    assert found <= ONSET + 7 * REFRESH, "a lost gradient makes evaluations frequent"


def test_a_result_stands_so_that_patience_counts_steps():
    """The critical finding comes exactly that many steps after the warning, evaluated in full or not."""
    patience = 10
    policy = Policy(respond={"stalled": "halt"}, patience=patience)
    hand = Hand("stalled", detectors=(Stalled(),), policy=policy)
    warned = hand.first(range(ONSET + 6 * LATER))
    due = [copy.copy(hand.guard.tracker.schedule).due(True).elapsed]
    for step in range(warned + 1, warned + patience):
        assert hand.step(step).findings == ()
        due.append(copy.copy(hand.guard.tracker.schedule).due(True).elapsed)
    assert not all(due)
    with pytest.raises(GradientHalt) as caught:
        hand.step(warned + patience)
    assert caught.value.findings[-1].severity == Severity.CRITICAL
    assert caught.value.step == warned + patience


class Counting:
    """A detector that records when it was asked, and for how many steps its answer stands."""

    fault, measures = Fault.STALLED, ("nothing",)

    def __init__(self, slow):
        self.slow, self.asked = slow, []

    def init(self, stats):
        return NoState()

    def update(self, stats, state):
        self.asked.append(stats.elapsed)
        return reading(stats, stats.loss < 0, stats.total, 0.0), state


def test_slow_detectors_are_asked_at_full_evaluations_only():
    slow, fast = Counting(slow=True), Counting(slow=False)
    hand, due = Hand("", detectors=(slow, fast)), []
    for step in range(SETTLED + 2 * LATER):
        due.append(copy.copy(hand.guard.tracker.schedule).due(True).elapsed)
        hand.step(step)
    assert fast.asked == due
    assert slow.asked == [elapsed for elapsed in due if elapsed]
    assert len(slow.asked) < 0.25 * len(fast.asked)


def test_the_depth_profile_stands_too():
    """A diagnosis uses it at whatever step it is made."""
    hand = Hand("vanishing", lambda step: True)
    for step in range(SETTLED + 2):
        hand.step(step)
    look = hand.guard.record
    assert look.tilt == pytest.approx(6.0, abs=0.1)
    hand.sick = lambda step: False
    hand.step(SETTLED + 2)
    assert hand.guard.record.tilt == look.tilt
    offset = hand.guard.state[0].offset
    assert offset.isfinite().all()
    assert offset[0] < offset[-1] - 5


def test_a_fault_that_is_over_stands_until_the_next_full_evaluation():
    healed = ONSET + 3 * LATER + 5
    hand = Hand("vanishing", lambda step: ONSET <= step < healed, detectors=(DepthTilt(),))
    states = []
    for step in range(healed + 2 * LATER):
        hand.step(step)
        states.append((hand.guard._results[0].raised, hand.guard._results[0].value))
    changes = [step for step in range(SETTLED + 2, len(states)) if states[step] != states[step - 1]]
    # Numbers and verdict change at full evaluations only.
    assert changes
    assert set(hand.evaluated).issuperset(changes)
    assert states[healed][0]
    assert not states[-1][0]


@pytest.mark.parametrize("bad", ["nan", "spike"])
def test_a_full_evaluation_follows_a_skipped_step_or_a_spike(bad):
    hand = Hand("", detectors=default_detectors())
    for step in range(280):
        hand.step(step)
    before = hand.guard._results
    loss = hand.set(280)
    for weight in hand.model.parameters():
        weight.grad.mul_(1e6 if bad == "spike" else math.nan)
    hand.guard.step(loss=loss)
    hand.step(281)
    assert hand.guard.tracker.schedule.last_full == hand.guard.tracker.schedule.good - 1
    slow = [i for i, detector in enumerate(hand.guard.detectors) if getattr(detector, "slow", False)]
    assert all(hand.guard._results[i] is not before[i] for i in slow)
    hand.step(282)
    settled = hand.guard._results
    hand.step(283)
    assert all(hand.guard._results[i] is settled[i] for i in slow)


@pytest.mark.parametrize("fault", ["vanishing", "exploding", "dead", "underflow"])
@pytest.mark.parametrize("lasts", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_skipped_fault_is_evaluated_at_every_step_until_it_is_over(fault, lasts):
    """A skipped step leaves no trace, so the first good step is seen to be good."""
    expected = LATE[fault][1]
    policy = Policy(respond={f.value: "skip" if f == expected else "ignore" for f in Fault})
    hand = Hand(fault, policy=policy)
    step, skipped = 0, 0
    while skipped < lasts:
        assert step < ONSET + 6 * LATER
        skipped += hand.step(step).skip
        if skipped:
            assert copy.copy(hand.guard.tracker.schedule).due(True).elapsed
        step += 1
    hand.sick = lambda _: False
    seen = [hand.step(step + i).skip for i in range(LATER)]
    assert not any(seen[1:])


def test_a_skipped_fault_that_lasts_halts():
    policy = Policy(respond={"vanishing": "skip"}, max_consecutive_skips=5)
    hand = Hand("vanishing", policy=policy, detectors=(DepthTilt(),))
    reports = []
    with pytest.raises(GradientHalt):
        for step in range(ONSET + 3 * LATER):
            reports.append(hand.step(step))
    assert [r.skip for r in reports[-5:]] == [True] * 5
    assert not any(r.skip for r in reports[:-5])


class Experts(nn.Module):
    """A mixture of experts; each step uses one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        self.head = nn.Linear(4, 1)

    def forward(self, x, chosen):
        return self.head(sum(expert(x) * float(i == chosen) for i, expert in enumerate(self.experts)))


def test_an_expert_that_is_used_now_and_then_is_not_reported_as_cut_off():
    """It may be used between two full evaluations, and at none of them."""
    torch.manual_seed(0)
    net = Experts()
    guard = Guard(net.named_parameters(), detectors=(Disconnected(),))
    turns = [
        step % 8 for step in range(700)
    ]  # so that full evaluations see the same expert each time, or none
    for step, turn in enumerate(turns):
        net.zero_grad()
        loss = net(torch.ones(2, 4), turn if step >= 100 else 0).square().mean() + 700 / (step + 1)
        loss.backward()
        guard.step(loss=loss)
    assert not [f for f in guard.findings if f.severity >= Severity.WARNING]


def test_results_do_not_stand_for_long_while_something_is_wrong():
    """Otherwise two full evaluations would use up the patience for a fault that was soon over."""
    hand = Hand("exploding", lambda step: 284 <= step < 313, policy=Policy.strict(), detectors=(Exploding(),))
    for step in range(400):
        hand.step(step)
    assert [finding.severity for finding in hand.guard.findings] == [Severity.WARNING]


@pytest.mark.parametrize("at", range(278, 292))
def test_what_a_spike_did_to_the_weights_is_seen_wherever_it_falls(at):
    """Also shortly after a regular sample, which shows nothing of it."""
    hand = Hand("", detectors=default_detectors())
    for step in range(at):
        hand.step(step)
    loss = hand.set(at)
    for weight in hand.model.parameters():
        weight.grad.mul_(1e6)
    hand.guard.step(loss=loss)
    hand.moved += 3.0  # what the step did
    hand.step(at + 1)
    assert hand.guard.tracker.updates.min() > 0.1
    assert hand.guard.tracker.schedule.last_full == hand.guard.tracker.schedule.good - 1


@pytest.mark.parametrize("restores", [False, True])
def test_weights_that_are_half_precision_no_more_are_judged_by_what_they_do_now(restores):
    net = nn.Linear(32, 32).to(torch.bfloat16)
    guard = Guard(net.named_parameters(), detectors=(Stalled(),))
    for step in range(100):
        if step == 20:
            net.float()
            if restores:
                state, guard = guard.state_dict(), Guard(net.named_parameters(), detectors=(Stalled(),))
                guard.load_state_dict(state)
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(1e-6 if step < 20 else 1e-3)  # lost to rounding, then not
                weight.grad = torch.ones_like(weight)
        guard.step(loss=1.0)
    assert not guard.findings
