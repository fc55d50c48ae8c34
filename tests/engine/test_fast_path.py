"""Accepting steps on the fast path gives what evaluating every step in full would give, to the bit."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    Fault,
    Guard,
    NormClip,
    Policy,
    SpikeClip,
    SteadyClip,
    ZClip,
)
from lightning_gradguard import guard as guard_module
from lightning_gradguard.detectors import default_detectors
from lightning_gradguard.detectors.base import NoState, reading
from lightning_gradguard.detectors.explosion import Spike
from lightning_gradguard.engine.readback import Readback

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

TENSORS, STEPS = 6, 130


class Twins:
    """Two guards that get the same gradients; the second evaluates every step in full.

    Args:
        optimizer: Class of their optimizers, or None.
        **kwargs: Options of both guards.

    Attributes:
        guards: The one with a fast path, and the one without.
        accepted_steps: Steps that the first accepted without a full evaluation.
    """

    def __init__(self, optimizer=None, **kwargs):
        self.weights = [{f"w{i}": nn.Parameter(torch.ones(2, 2)) for i in range(TENSORS)} for _ in range(2)]
        self.guards = [
            Guard(weights.items(), optimizer=optimizer and optimizer(weights.values()), **kwargs)
            for weights in self.weights
        ]
        self.guards[1].fast_path._is_able = False
        self.accepted_steps, self.reports = [], ([], [])

    def step(self, norms, loss=None, **kwargs):
        """Take one step, with a norm for each tensor or None."""
        steps = self.guards[0].steps
        for weights, guard, reports in zip(self.weights, self.guards, self.reports, strict=True):
            for i, (weight, norm) in enumerate(zip(weights.values(), norms, strict=True)):
                with torch.no_grad():
                    weight.fill_(1 + 1e-3 * (steps % (7 + i)))
                weight.grad = None if norm is None else torch.full_like(weight, norm / 2)
            was = guard.fast_path.accepted
            reports.append(guard.step(loss=loss, **kwargs))
            if guard.fast_path.accepted > was:
                self.accepted_steps.append(steps)
        gradients = [[plain(w.grad) for w in weights.values()] for weights in self.weights]
        assert gradients[0] == gradients[-1]

    def agree(self, states=True):
        """Assert that both guards agree in everything."""
        (a, b), (fast, full) = self.guards, self.reports
        assert [plain(asdict(report)) for report in fast] == [plain(asdict(report)) for report in full]
        assert [list(report.norms) for report in fast] == [list(report.norms) for report in full]
        if states:
            assert plain(a.state) == plain(b.state)
        assert plain(a.findings) == plain(b.findings)
        assert plain(a.history.table()) == plain(b.history.table())
        assert a.counts == b.counts
        assert a.fault_tracker.state_dict() == b.fault_tracker.state_dict()
        assert plain(a.tracker.schedule.state_dict()) == plain(b.tracker.schedule.state_dict())


def plain(value):
    """Return a value as text, exact to the bit, in which NaN equals NaN."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return repr(value.tolist())
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else repr(value)


def noise(sigma=0.1, steps=STEPS, seed=0):
    sizes = np.exp(np.linspace(-3, 3, TENSORS))
    return sizes * np.exp(np.random.default_rng(seed).normal(0, sigma, (steps, TENSORS)))


def spikes(size, tensors, sigma=0.1):
    rows = noise(sigma)
    for step in (45, 61, 62, 63, 64, 68, 83, 100, 101):
        rows[step, tensors] *= size
    return rows


def drift(rate):
    return noise() * np.exp(rate * np.arange(STEPS))[:, None]


def jump(size):
    rows = noise()
    rows[60:] *= size
    return rows


def odd(value, *places):
    """Return noise with a factor at some places (steps, tensors)."""
    rows = noise().astype(object)
    for steps, tensors in places:
        rows[steps, tensors] = value
    return rows


def falling(step):
    return 3.0 / (1 + 0.01 * step)


STREAMS = {
    "plain noise": noise,
    "loud": lambda: noise(0.8),
    "nearly constant": lambda: noise(0.001),
    **{f"all x{s:g}": lambda s=s: spikes(s, slice(None)) for s in (1.5, 2.5, 10, 1e4, 0.4, 1e-3)},
    **{f"one x{s:g}": lambda s=s: spikes(s, 5) for s in (1.5, 2.5, 1e3, 1e4, 1e-3)},
    **{f"small one x{s:g}": lambda s=s: spikes(s, 0) for s in (2.5, 1e4)},
    "drift up": lambda: drift(0.01),
    "drift down": lambda: drift(-0.03),
    "curriculum up": lambda: jump(30.0),
    "curriculum down": lambda: jump(0.2),
    "nan": lambda: odd(math.nan, (46, 2), (70, slice(None)), (71, 1)),
    "none": lambda: odd(None, (slice(44, 48), 1), (slice(60, None, 9), 4), (75, slice(None))),
    "zeros": lambda: odd(0.0, (slice(44, 48), 1), (slice(60, None, 9), 4), (75, slice(None))),
    "thaws": lambda: odd(None, (slice(0, 53), slice(0, 2))),
    "thaws from zero": lambda: odd(0.0, (slice(0, 53), slice(0, 2))),
    "scaled down": lambda: noise() * 1e-6,
    "scaled up": lambda: noise() * 65536,
}
LOSSES = {
    "none": lambda step: None,
    "falls": falling,
    "alternates": lambda step: falling(step) if step % 2 else None,
    "comes and goes": lambda step: falling(step) if step % 50 < 25 else None,
    "rises": lambda step: falling(step) * (1 if step < 50 else 1.03 ** (step - 50)),
    "leaps": lambda step: falling(step) * (1.45 if step % 20 == 7 else 1),
    "negative": lambda step: -falling(step) if step < 60 else -0.5,
    "nan": lambda step: math.nan if step == 69 else 1.0,
}
CLIPPERS = {
    "none": None,
    "default": SpikeClip(),
    "quick": SpikeClip(decay=0.5),
    "slow": SpikeClip(decay=0.98),
    "strict": SpikeClip(z_threshold=3.0, joint_threshold=2.0),
    "generous": SpikeClip(z_threshold=30.0, joint_threshold=20.0),
    "exclude": SpikeClip(exclude=("w0", "w5")),
    "impatient": SpikeClip(patience=2),
    "SteadyClip": SteadyClip(),
    "SteadyClip, exclude": SteadyClip(exclude=("w0", "w5")),
    "NormClip": NormClip(10.0),
    "AutoClip": AutoClip(),
    "ZClip": ZClip(),
    "AdaGC": AdaGC(warmup_steps=20),
    "AGC": AGC(),
    "AGC, generous": AGC(clip_factor=4.0, exclude=("w0",)),
}


def go(stream, loss=LOSSES["falls"], **kwargs):
    twins = Twins(**kwargs)
    for step, row in enumerate(stream):
        twins.step(row, loss(step))
    twins.agree()
    return twins


#: Streams and clippers that `make test` has; all of both are left to `make test-long`.
QUICK = {
    "default": STREAMS.keys() - {"all x1.5", "all x10", "all x0.4", "small one x2.5", "small one x10000", "one x2.5",
                                 "one x1000", "nearly constant", "thaws from zero", "scaled up"},
    "none": {"plain noise", "loud", "all x2.5", "one x10000", "nan", "thaws"},
    "exclude": {"all x2.5", "one x10000", "zeros"},
    "SteadyClip": {"plain noise", "loud", "all x2.5", "one x10000", "nan", "none", "zeros", "thaws"},
}  # fmt: skip


def slow_unless(quick):
    return () if quick else pytest.mark.slow


@pytest.mark.parametrize(
    ("stream", "clipper"),
    [pytest.param(s, c, marks=slow_unless(s in QUICK[c])) for c in QUICK for s in STREAMS],
)
def test_streams_give_the_results_of_full_evaluations(stream, clipper):
    go(STREAMS[stream](), clipper=CLIPPERS[clipper])


@pytest.mark.parametrize("clipper", [c for c in CLIPPERS if c not in QUICK])
@pytest.mark.parametrize(
    "stream",
    [pytest.param(s, marks=slow_unless(s == "all x2.5")) for s in ("plain noise", "all x2.5", "one x10000")],
)
def test_so_does_any_clipper(stream, clipper):
    go(STREAMS[stream](), clipper=CLIPPERS[clipper])


@pytest.mark.parametrize("stream", ["plain noise", "loud", "nan", "thaws"])
def test_so_does_a_clipper_that_knows_of_an_adaptive_optimizer(stream):
    twins = go(STREAMS[stream](), clipper=SteadyClip(), optimizer=torch.optim.Adam)
    assert twins.guards[0].counts["clipped"] > STEPS // 2
    assert len(twins.accepted_steps) > STEPS // 3 or stream != "plain noise"


@pytest.mark.parametrize("clipper", [pytest.param("none", marks=pytest.mark.slow), "default"])
@pytest.mark.parametrize("loss", LOSSES)
def test_so_does_any_loss(loss, clipper):
    go(noise(), LOSSES[loss], clipper=CLIPPERS[clipper])


@given(
    seed=st.integers(0, 2**20),
    sigma=st.floats(0.005, 0.6),
    often=st.floats(0, 0.1),
    loss=st.sampled_from(sorted(LOSSES)),
    clipper=st.sampled_from(sorted(CLIPPERS)),
)
def test_so_does_any_stream(seed, sigma, often, loss, clipper):
    rng, rows = np.random.default_rng(seed), noise(sigma, 100, seed).astype(object)
    for step in np.flatnonzero(rng.random(100) < often):
        tensors = slice(None) if rng.random() < 0.5 else rng.integers(TENSORS)
        odds = [None, 0.0, math.nan] if clipper != "none" else [None, math.nan]
        rows[step : step + rng.integers(1, 12), tensors] *= rng.choice([0.6, 1.5, 3, 10, 1e3, 1e-3])
        if rng.random() < 0.3:
            rows[step, tensors] = rng.choice(odds)
    go(rows, LOSSES[loss], clipper=CLIPPERS[clipper])


def test_unremarkable_steps_are_accepted_but_for_full_evaluations():
    """After the first steps, among which are many full evaluations, and as soon as a level has settled."""
    for name, first in (("none", 33), ("default", 33), ("exclude", 33), ("quick", 33), ("slow", 57)):
        twins, looked_at = Twins(clipper=CLIPPERS[name]), set()
        for step, row in enumerate(noise()):
            twins.step(row, falling(step))
            if twins.guards[0].tracker.schedule.last_full == step:
                looked_at.add(step)
        assert set(range(first, STEPS)) - set(twins.accepted_steps) == looked_at & set(range(first, STEPS)), (
            name
        )
        assert len(looked_at & set(range(first, STEPS))) < (STEPS - first) // 8
    assert len(go(STREAMS["one x1000"](), clipper=SpikeClip()).accepted_steps) > 60
    assert len(go(STREAMS["drift down"](), clipper=SpikeClip()).accepted_steps) > 60


def test_a_loss_far_above_its_start_is_evaluated_in_full():
    """A mean of 1.5 times the start would be an alarm, and every step would be evaluated in full."""
    for factor, expected in ((1.3, 11), (1.45, 0), (-1.0, 11)):
        passed = go(noise(), lambda step, factor=factor: factor if 50 <= step < 62 else 1.0).accepted_steps
        assert sum(50 <= step < 62 for step in passed) == expected, factor


class Wordy:
    """A detector that must be asked at every step."""

    fault, measures = Fault.STALLED, ("nothing",)

    def __init__(self):
        self.asked = 0

    def init(self, stats):
        return NoState()

    def update(self, stats, state):
        self.asked += 1
        return reading(stats, stats.loss < 0, stats.total, 0.0), state


class Mute(Wordy):
    """The same, declared safe on the fast path."""

    fast_path_safe = True


class Recalling(AGC):
    """A clipper that declares nothing: a subclass may do anything."""


@pytest.mark.parametrize(
    "options",
    [
        {"detectors": (*default_detectors(), Wordy())},
        {"detectors": (Spike(ratio=2.0),)},
        {"clipper": Recalling()},
        {"policy": Policy(respond={"vanishing": "skip"})},
        {"lag": 1},
    ],
    ids=["detector", "ratio", "clipper", "policy", "lag"],
)
def test_no_step_is_accepted_if_a_part_needs_full_evaluations(options):
    assert go(noise(), **options).accepted_steps == []


@pytest.mark.parametrize("stream", ["plain noise", "one x10000", "nan", "none"])
@pytest.mark.parametrize("clipper", ["default", "SteadyClip"])
def test_a_gradient_scaler_changes_nothing_about_it(stream, clipper):
    """Gradients have been unscaled by then, and an overflow is not accepted."""
    twins, scaler = Twins(clipper=CLIPPERS[clipper]), torch.amp.GradScaler("cpu")
    for row in STREAMS[stream]():
        twins.step(row, 1.0, scaler=scaler)
    twins.agree()
    assert len(twins.accepted_steps) > STEPS // 3


def test_a_detector_that_is_safe_on_the_fast_path_is_asked_less():
    mute = Mute()
    twins = go(noise(), detectors=(mute,))
    assert len(twins.accepted_steps) > 60
    assert mute.asked == 2 * STEPS - len(twins.accepted_steps)


@pytest.mark.parametrize("stream", ["nan", "all x10", "one x10000", "none", "zeros"])
@pytest.mark.parametrize("clipper", [pytest.param("none", marks=pytest.mark.slow), "default"])
def test_remarkable_steps_are_evaluated_in_full(stream, clipper):
    """Steps that are skipped, clipped or found, steps at which another tensor has a gradient, and those after them."""
    twins, rows = Twins(clipper=CLIPPERS[clipper]), STREAMS[stream]()
    for step, row in enumerate(rows):
        schedule, before = twins.guards[1].tracker.schedule, len(twins.accepted_steps)
        twins.step(row, 1.0)
        was_passed, said = len(twins.accepted_steps) > before, twins.reports[1][-1]
        looked_at = schedule.last_full == schedule.good - 1 and not said.skip
        if looked_at or said.skip or said.scale < 1 or said.findings:
            assert not was_passed, step
        if step not in (0, 76) and [x is None for x in row] != [x is None for x in rows[step - 1]]:
            assert not was_passed, step
    assert len(twins.accepted_steps) > 20


def test_large_steps_are_forgotten_during_accepted_ones_also_before_a_skipped_step():
    """`Exploding` counts down at every step, accepted or evaluated."""
    rows = noise()
    rows[42:46] *= 1e4
    rows[48] = math.nan
    twins = Twins()
    for step, row in enumerate(rows[:52]):
        twins.step(row, falling(step))
        if step == 47:
            assert twins.accepted_steps[-1] == 47
    twins.agree()


class Grave(Wordy):
    """A slow detector of a lasting fault that may become critical from some step on."""

    fault, slow = Fault.VANISHING, True

    def update(self, stats, state):
        grave = torch.where(stats.trends.steps > 60, 2.0, 1.0)
        return reading(stats, stats.total > 0, stats.total, 0.0, ceiling=grave), state


def test_patience_counts_accepted_steps():
    assert len(go(noise(), detectors=(Grave(),), policy=Policy(patience=50)).guards[0].findings) == 2


@pytest.mark.parametrize("clipper", ["none", "default"])
def test_the_host_reads_once_at_an_accepted_step_and_once_at_a_full_evaluation(clipper, monkeypatch):
    import lightning_gradguard.engine.readback as module

    reads, plainly = [], module.read
    for place in (module, guard_module):
        monkeypatch.setattr(place, "read", lambda vector: reads.append(len(vector)) or plainly(vector))
    letters, exchange = [], Readback.exchange
    monkeypatch.setattr(Readback, "exchange", lambda *args: letters.append(0) or exchange(*args))
    twins, counts = Twins(clipper=CLIPPERS[clipper]), []
    guard = twins.guards[0]
    twins.weights, twins.guards = twins.weights[:1], twins.guards[:1]
    twins.reports = twins.reports[:1]
    for step, row in enumerate(STREAMS["all x10"]()):
        waiting, before = len(guard.fast_path.deferred), len(twins.accepted_steps)
        reads.clear(), letters.clear()
        twins.step(row, falling(step))
        quiet = len(twins.accepted_steps) > before
        assert len(letters) == (not quiet)
        counts.append((waiting, quiet, len(reads)))
        assert len(guard.fast_path.deferred) == (waiting + 1 if quiet else 0)
    assert {reads for _, quiet, reads in counts if quiet} == {1}
    assert {reads for waiting, quiet, reads in counts if waiting == 7} == {1}
    # A step that is not accepted takes a short read first.
    assert max(reads for *_, reads in counts) == 2


@pytest.mark.parametrize(("clipper", "accepted"), [(SpikeClip(), True), (SpikeClip(z_threshold=3.0), False)])
def test_a_restored_fast_path_is_open_for_the_same_clipper_alone(clipper, accepted):
    """The bounds of other options say nothing about this clipper."""
    rows = noise()
    state = go(rows[:36], clipper=SpikeClip()).guards[0].state_dict()
    twins = Twins(clipper=clipper)
    for guard in twins.guards:
        guard.load_state_dict(state)
    twins.step(rows[36], falling(36))
    assert (twins.accepted_steps == [36]) == accepted
