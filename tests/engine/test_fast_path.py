"""FastPath steps are passed over, and everything is as if each step had been judged."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard import Fault, Guard, Policy, SpikeClip
from lightning_gradguard.clippers.fixed import NormClip
from lightning_gradguard.detectors import default_detectors
from lightning_gradguard.detectors.base import NoState, reading
from lightning_gradguard.detectors.explosion import Spike
from lightning_gradguard.engine.readback import Readback

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

TENSORS, STEPS = 6, 130


class Twins:
    """Two guards that are given the same gradients, of which one judges each step.

    Attributes:
        guards: The one that passes quiet steps over, and the one that passes none over.
        passed: Steps that the first has passed over.
    """

    def __init__(self, **kwargs):
        self.weights = [{f"w{i}": nn.Parameter(torch.ones(2, 2)) for i in range(TENSORS)} for _ in range(2)]
        self.guards = [Guard(weights.items(), **kwargs) for weights in self.weights]
        self.guards[1].fast_path._is_able = False
        self.passed, self.reports = [], ([], [])

    def step(self, norms, loss=None, **kwargs):
        """One step, with a norm for each tensor or None."""
        steps = self.guards[0].steps
        for weights, guard, reports in zip(self.weights, self.guards, self.reports, strict=True):
            for i, (weight, norm) in enumerate(zip(weights.values(), norms, strict=True)):
                with torch.no_grad():
                    weight.fill_(1 + 1e-3 * (steps % (7 + i)))
                weight.grad = None if norm is None else torch.full_like(weight, norm / 2)
            was = guard.fast_path.accepted
            reports.append(guard.step(loss=loss, **kwargs))
            if guard.fast_path.accepted > was:
                self.passed.append(steps)

    def agree(self, states=True):
        """Asserts that both have come to the same."""
        (a, b), (quiet, judged) = self.guards, self.reports
        assert [plain(asdict(report)) for report in quiet] == [plain(asdict(report)) for report in judged]
        assert [list(report.norms) for report in quiet] == [list(report.norms) for report in judged]
        if states:
            assert plain(a.state) == plain(b.state)
        assert plain(a.findings) == plain(b.findings)
        assert plain(a.history.table()) == plain(b.history.table())
        assert a.counts == b.counts
        assert a.fault_tracker.state_dict() == b.fault_tracker.state_dict()
        known = [guard.tracker.schedule.state_dict() | {"alert": None, "alarm": None} for guard in (a, b)]
        assert known[0] == known[1]


def plain(value):
    """As text, to the last bit, in which NaN is like NaN."""
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
    """Noise, with a value in some places: steps, tensors."""
    rows = noise().astype(object)
    for steps, tensors in places:
        rows[steps, tensors] = value
    return rows


def falling(step):
    return 3.0 / (1 + 0.01 * step)


STREAMS = {
    "quiet": noise,
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
}


def go(stream, loss=LOSSES["falls"], **kwargs):
    twins = Twins(**kwargs)
    for step, row in enumerate(stream):
        twins.step(row, loss(step))
    twins.agree()
    return twins


#: Streams and clippers that `make test` has; all of both are left to `make test-long`.
QUICK = {
    "default": STREAMS.keys() - {"all x1.5", "all x10", "all x0.4", "one x2.5", "one x1000", "small one x10000",
                                 "nearly constant", "thaws from zero", "scaled up"},
    "none": {"quiet", "loud", "all x2.5", "one x10000", "nan", "thaws"},
    "exclude": {"all x2.5", "one x10000", "zeros"},
}  # fmt: skip


def slow_unless(quick):
    return () if quick else pytest.mark.slow


@pytest.mark.parametrize(
    ("stream", "clipper"),
    [pytest.param(s, c, marks=slow_unless(s in QUICK[c])) for c in QUICK for s in STREAMS],
)
def test_a_stream_gives_what_it_would_step_by_step(stream, clipper):
    go(STREAMS[stream](), clipper=CLIPPERS[clipper])


@pytest.mark.parametrize("clipper", [c for c in CLIPPERS if c not in ("none", "default", "exclude")])
@pytest.mark.parametrize(
    "stream",
    [pytest.param(s, marks=slow_unless(s == "all x2.5")) for s in ("quiet", "all x2.5", "one x10000")],
)
def test_so_it_does_with_any_spike_clip(stream, clipper):
    go(STREAMS[stream](), clipper=CLIPPERS[clipper])


@pytest.mark.parametrize("clipper", [pytest.param("none", marks=pytest.mark.slow), "default"])
@pytest.mark.parametrize("loss", LOSSES)
def test_so_it_does_with_any_loss(loss, clipper):
    go(noise(), LOSSES[loss], clipper=CLIPPERS[clipper])


@given(
    seed=st.integers(0, 2**20),
    sigma=st.floats(0.005, 0.6),
    often=st.floats(0, 0.1),
    loss=st.sampled_from(sorted(LOSSES)),
    clipper=st.sampled_from(sorted(CLIPPERS)),
)
def test_so_it_does_whatever_comes(seed, sigma, often, loss, clipper):
    rng, rows = np.random.default_rng(seed), noise(sigma, 100, seed).astype(object)
    for step in np.flatnonzero(rng.random(100) < often):
        tensors = slice(None) if rng.random() < 0.5 else rng.integers(TENSORS)
        odds = [None, 0.0, math.nan] if clipper != "none" else [None, math.nan]
        rows[step : step + rng.integers(1, 12), tensors] *= rng.choice([0.6, 1.5, 3, 10, 1e3, 1e-3])
        if rng.random() < 0.3:
            rows[step, tensors] = rng.choice(odds)
    go(rows, LOSSES[loss], clipper=CLIPPERS[clipper])


def test_of_the_quiet_steps_seven_in_eight_are_passed_over():
    """From the first steps on of which each is a closer look, or at which a level is not sure."""
    for name, first in (("none", 33), ("default", 33), ("exclude", 33), ("quick", 33), ("slow", 57)):
        passed = go(noise(), clipper=CLIPPERS[name]).passed
        assert set(range(first, STEPS)) - set(passed) == set(range(first, STEPS, 8)), name
    assert len(go(STREAMS["one x1000"](), clipper=SpikeClip()).passed) > 60
    assert len(go(STREAMS["drift down"](), clipper=SpikeClip()).passed) > 60


def test_a_loss_far_above_its_start_is_judged():
    """At 1.5 times its start the mean would be an alarm, and each step a closer look."""
    for factor, expected in ((1.3, 11), (1.45, 0), (-1.0, 11)):
        passed = go(noise(), lambda step, factor=factor: factor if 50 <= step < 62 else 1.0).passed
        assert sum(50 <= step < 62 for step in passed) == expected, factor


class Wordy:
    """A detector that has to be asked at each step."""

    fault, measures = Fault.STALLED, ("nothing",)

    def __init__(self):
        self.asked = 0

    def init(self, stats):
        return NoState()

    def update(self, stats, state):
        self.asked += 1
        return reading(stats, stats.loss < 0, stats.total, 0.0), state


class Mute(Wordy):
    """One that says it need not be."""

    fast_path_safe = True


@pytest.mark.parametrize(
    "options",
    [
        {"detectors": (*default_detectors(), Wordy())},
        {"detectors": (Spike(ratio=2.0),)},
        {"clipper": NormClip(1e6)},
        {"policy": Policy(respond={"vanishing": "skip"})},
        {"lag": 1},
    ],
    ids=["detector", "ratio", "clipper", "policy", "lag"],
)
def test_no_step_is_passed_over_where_each_has_to_be_judged(options):
    assert go(noise(), **options).passed == []


def test_nor_is_one_with_a_gradient_scaler():
    twins, scaler = Twins(), torch.amp.GradScaler("cpu")
    for row in noise():
        twins.step(row, 1.0, scaler=scaler)
    twins.agree()
    assert twins.passed == []


def test_a_detector_that_says_so_is_asked_less():
    mute = Mute()
    twins = go(noise(), detectors=(mute,))
    assert len(twins.passed) > 60
    assert mute.asked == 2 * STEPS - len(twins.passed)


@pytest.mark.parametrize("stream", ["nan", "all x10", "one x10000", "none", "zeros"])
@pytest.mark.parametrize("clipper", ["none", "default"])
def test_what_stands_out_is_judged(stream, clipper):
    """Whatever is skipped, clipped or found; where another tensor has a gradient; and at the looks after it."""
    twins, rows = Twins(clipper=CLIPPERS[clipper]), STREAMS[stream]()
    for step, row in enumerate(rows):
        schedule, before = twins.guards[1].tracker.schedule, len(twins.passed)
        twins.step(row, 1.0)
        was_passed, said = len(twins.passed) > before, twins.reports[1][-1]
        looked_at = schedule.last_full == schedule.good - 1 and not said.skip
        if looked_at or said.skip or said.scale < 1 or said.findings:
            assert not was_passed, step
        if step not in (0, 76) and [x is None for x in row] != [x is None for x in rows[step - 1]]:
            assert not was_passed, step
    assert len(twins.passed) > 20


def test_hot_steps_are_forgotten_in_quiet_ones_also_before_a_step_that_is_not_taken():
    """`Exploding` counts down at each step, passed over or not."""
    rows = noise()
    rows[42:46] *= 1e4
    rows[48] = math.nan
    twins = Twins()
    for step, row in enumerate(rows[:52]):
        twins.step(row, falling(step))
        if step == 47:
            assert twins.passed[-1] == 47
    twins.agree()


class Grave(Wordy):
    """A slow detector of a condition that lasts, and that is grave from a step on."""

    fault, slow = Fault.VANISHING, True

    def update(self, stats, state):
        grave = torch.where(stats.trends.steps > 60, 2.0, 1.0)
        return reading(stats, stats.total > 0, stats.total, 0.0, ceiling=grave), state


def test_for_how_long_a_condition_is_held_counts_quiet_steps():
    assert len(go(noise(), detectors=(Grave(),), policy=Policy(patience=50)).guards[0].findings) == 2


@pytest.mark.parametrize("clipper", ["none", "default"])
def test_the_host_reads_once_at_a_quiet_step_and_once_at_a_look(clipper, monkeypatch):
    import lightning_gradguard.engine.readback as module

    reads, plainly = [], module.read_array
    monkeypatch.setattr(module, "read_array", lambda vector: reads.append(len(vector)) or plainly(vector))
    letters, exchange = [], Readback.exchange
    monkeypatch.setattr(Readback, "exchange", lambda *args: letters.append(0) or exchange(*args))
    twins, counts = Twins(clipper=CLIPPERS[clipper]), []
    guard = twins.guards[0]
    twins.weights, twins.guards = twins.weights[:1], twins.guards[:1]
    twins.reports = twins.reports[:1]
    for step, row in enumerate(STREAMS["all x10"]()):
        waiting, before = len(guard.fast_path.deferred), len(twins.passed)
        reads.clear(), letters.clear()
        twins.step(row, falling(step))
        quiet = len(twins.passed) > before
        assert len(letters) == (not quiet)
        counts.append((waiting, quiet, len(reads)))
        assert len(guard.fast_path.deferred) == (waiting + 1 if quiet else 0)
    assert {reads for _, quiet, reads in counts if quiet} == {1}
    assert {reads for waiting, quiet, reads in counts if waiting == 7} == {1}
    # What stands out has been glanced at before.
    assert max(reads for *_, reads in counts) == 2
