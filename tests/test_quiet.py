"""Quiet steps are passed over, and everything is as if each step had been judged."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard import Fault, Guard, Policy, SpikeClip
from lightning_gradguard.mailbox import Mailbox
from lightning_gradguard.parts import default_detectors
from lightning_gradguard.signals.clippers import NormClip
from lightning_gradguard.signals.detectors import Spike
from lightning_gradguard.signals.reading import Nothing, reading

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

TENSORS, STEPS = 6, 130


class Twins:
    """Two guards that are given the same gradients, of which one judges each step.

    Attributes:
        guards: The one that passes quiet steps over, and the one that passes none over.
        passed: Steps that the first has passed over.
    """

    def __init__(self, **kwargs):
        self.weights = [
            {f"w{i}": nn.Parameter(torch.ones(2, 2)) for i in range(TENSORS)} for _ in range(2)
        ]
        self.guards = [Guard(weights.items(), **kwargs) for weights in self.weights]
        self.guards[1].quiet._is_able = False
        self.passed, self.reports = [], ([], [])

    def step(self, norms, loss=None, **kwargs):
        """One step, with a norm for each tensor or None."""
        steps = self.guards[0].steps
        for weights, guard, reports in zip(self.weights, self.guards, self.reports, strict=True):
            for i, (weight, norm) in enumerate(zip(weights.values(), norms, strict=True)):
                with torch.no_grad():
                    weight.fill_(1 + 1e-3 * (steps % (7 + i)))
                weight.grad = None if norm is None else torch.full_like(weight, norm / 2)
            was = guard.quiet.passed
            reports.append(guard.step(loss=loss, **kwargs))
            if guard.quiet.passed > was:
                self.passed.append(steps)

    def agree(self, states=True):
        """Asserts that both have come to the same."""
        (a, b), (quiet, judged) = self.guards, self.reports
        assert [plain(asdict(report)) for report in quiet] == [plain(asdict(report)) for report in judged]
        assert [list(report.norms) for report in quiet] == [list(report.norms) for report in judged]
        if states:
            assert plain(a.states) == plain(b.states)
        assert plain(a.findings) == plain(b.findings)
        assert plain(a.history.table()) == plain(b.history.table())
        assert a.counts == b.counts
        assert a.judge.state_dict() == b.judge.state_dict()
        known = [guard.watch.schedule.state_dict() | {"alert": None, "alarm": None} for guard in (a, b)]
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
    **{f"one x{s:g}": lambda s=s: spikes(s, 5) for s in (1.5, 2.5, 1e4, 1e-3)},
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


@pytest.mark.parametrize("clipper", ["none", "default", "exclude"])
@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_gives_what_it_would_step_by_step(stream, clipper):
    go(STREAMS[stream](), clipper=CLIPPERS[clipper])


@pytest.mark.parametrize("clipper", CLIPPERS)
@pytest.mark.parametrize("stream", ["quiet", "all x2.5", "one x10000"])
def test_so_it_does_with_any_spike_clip(stream, clipper):
    go(STREAMS[stream](), clipper=CLIPPERS[clipper])


@pytest.mark.parametrize("clipper", ["none", "default"])
@pytest.mark.parametrize("loss", LOSSES)
def test_so_it_does_with_any_loss(loss, clipper):
    go(noise(), LOSSES[loss], clipper=CLIPPERS[clipper])
