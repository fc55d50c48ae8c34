"""Bounds of SpikeClip: steps within them are not clipped, and folding them in at once equals doing it step by step."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard import Guard, SpikeClip
from lightning_gradguard.clippers.base import WINDOW
from lightning_gradguard.stats.grad_stats import measure
from lightning_gradguard.stats.layout import Layout


class Stream:
    """Tensors of one element with given gradient norms; None for no gradient."""

    def __init__(self, clipper, tensors):
        self.clipper, self.state = clipper, None
        self.weights = [nn.Parameter(torch.ones(1)) for _ in range(tensors)]
        self.layout = Layout.of({f"w{i}": weight for i, weight in enumerate(self.weights)})

    def stats(self, norms):
        for weight, norm in zip(self.weights, norms, strict=True):
            weight.grad = None if norm is None else torch.tensor([float(norm)])
        return measure(self.layout, self.layout.floors, self.layout.floors)

    def feed(self, stats):
        self.state = self.clipper.init(stats) if self.state is None else self.state
        clip, self.state = self.clipper.update(stats, self.state)
        return clip


def lies_within(bounds, stats):
    outside, joint = bounds.compare(stats)
    return bool((outside == 0) & (joint.abs() <= 1))


def past(stream, rng, steps, sigma, late):
    """Feed noise with occasional jumps to tensors that join one by one; return the last statistics."""
    tensors = len(stream.weights)
    base, level = np.exp(rng.normal(0, 3, tensors)), 1.0
    for step in range(steps):
        level *= np.exp(rng.normal(0, 2)) if rng.random() < 0.05 else 1
        row = base * level * np.exp(rng.normal(0, sigma, tensors))
        stats = stream.stats([None if step < late * i else x for i, x in enumerate(row)])
        stream.feed(stats)
    return stats


def edge(stream, bounds, signs, shrink):
    """Return statistics at an edge of the bounds, or as near as the joint bound allows; None if there is none."""
    low, high = bounds.low.double().log().numpy(), bounds.high.double().log().numpy()
    middle, half = (low + high) / 2, (high - low) / 2
    for part in (shrink, shrink * (1 - 1e-5), *np.linspace(shrink, 0, 100)[1:]):
        stats = stream.stats(np.exp(middle + part * half * signs))
        if lies_within(bounds, stats):
            return stats
    return None


@given(
    seed=st.integers(0, 2**20),
    tensors=st.integers(1, 6),
    decay=st.sampled_from([0.1, 0.5, 0.9, 0.95]),
    thresholds=st.tuples(st.floats(0.05, 50), st.floats(0.05, 50)),
    sigma=st.floats(0.001, 2),
    steps=st.integers(17, 60),
    late=st.integers(0, 4),
    turn=st.integers(0, WINDOW - 1),
    shrink=st.sampled_from([1.0, 1.0, 0.9, 0.5]),
    data=st.data(),
)
def test_steps_within_the_bounds_are_not_clipped(
    seed, tensors, decay, thresholds, sigma, steps, late, turn, shrink, data
):
    """Also if all steps of a window lie at one edge, and the last at the other."""
    stream = Stream(SpikeClip(*thresholds, decay=decay), tensors)
    stats = past(stream, np.random.default_rng(seed), steps, sigma, late)
    bounds = stream.clipper.bounds(stats, stream.state)
    assume(not bounds.low.isnan().any())
    signs = np.array([data.draw(st.sampled_from([-1, 1])) for _ in range(tensors)])
    for step in range(WINDOW - 1):
        stats = edge(stream, bounds, signs if step < turn else -signs, shrink)
        assert stats is not None
        assume(stats.finite)  # a non-finite step is never folded in nor accepted
        before, clip = stream.state, stream.feed(stats)
        assert (clip.multipliers == 1).all()
        assert torch.equal(clip.norms, stats.norms)
        assert (stream.state.streak == 0).all()
        assert torch.equal(stream.state.seen, before.seen + 1)
        assert torch.equal(stream.state.last, stats.norms.log())


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.98])
def test_there_are_no_bounds_before_a_level_has_settled(decay):
    stream, seen = Stream(SpikeClip(decay=decay), 2), []
    for step in range(70):
        stats = stream.stats([1.0, None if step < 7 else 1.0])
        stream.feed(stats)
        seen.append(lies_within(stream.clipper.bounds(stats, stream.state), stats))
    settled = 7 + max(16, round(1 / (1 - decay))) - 1
    # A tensor without a gradient does not matter.
    assert seen[7:] == [step >= settled for step in range(7, 70)]


def test_a_gradient_on_another_tensor_is_out_of_bounds():
    stream = Stream(SpikeClip(exclude=("w2", "w3")), 4)
    for _ in range(20):
        stats = stream.stats([1.0, None, 1.0, None])
        stream.feed(stats)
    bounds = stream.clipper.bounds(stats, stream.state)
    for norms, expected in {
        (1.0, None, 1.0, None): True,
        (1.0, None, 1e9, None): True,
        (1.0, 1.0, 1.0, None): False,
        (1.0, None, 1.0, 1.0): False,
        (None, None, 1.0, None): False,
        (0.0, None, 1.0, None): False,
        (float("nan"), None, 1.0, None): False,
        (50.0, None, 1.0, None): False,
        (0.02, None, 1.0, None): False,
    }.items():
        assert lies_within(bounds, stream.stats(norms)) == expected, norms


@pytest.mark.parametrize("tensors", [1, 2, 7, 15, 16, 31, 32, 100])
@pytest.mark.parametrize("options", [{}, {"decay": 0.5}, {"z_threshold": 30.0, "exclude": ("w0",)}], ids=str)
def test_a_window_is_folded_in_at_once_to_the_bit(tensors, options):
    """For any number of tensors: a vector register holds several of them."""
    rng, learnt = np.random.default_rng(tensors), 0
    stream = Stream(SpikeClip(**options), tensors)
    stats = past(stream, rng, 20, 0.2, 0)
    for length in (1, 3, 7, 7):
        before, bounds = stream.state, stream.clipper.bounds(stats, stream.state)
        rows, thresholds = [], []
        while len(rows) < length:
            stats = stream.stats(stats.norms.double().numpy() * np.exp(rng.normal(0, 0.05, tensors)))
            if not lies_within(bounds, stats):
                break
            rows.append(stats)
            thresholds.append(stream.feed(stats).threshold)
        if not rows:
            stream.feed(stats)
            continue
        at_once, after = stream.clipper.fold_in(rows, before)
        assert at_once.tolist() == [threshold.item() for threshold in thresholds]
        for name in after._fields:
            assert torch.equal(getattr(after, name), getattr(stream.state, name)), name
        learnt += len(rows)
    assert learnt >= 3


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_a_norm_whose_square_overflows_is_not_accepted_however_near_to_the_baseline():
    weight = nn.Parameter(torch.ones(1))
    guard = Guard({"w": weight}.items())
    accepted = []
    for step in range(56):
        weight.grad = torch.tensor([2e19 if step == 53 else 1.2e19])
        before = guard.fast_path.accepted
        report = guard.step(loss=torch.tensor(1.0))
        accepted.append(guard.fast_path.accepted > before)
        assert report.skip == (step == 53)
    assert accepted[50:54] == [True] * 3 + [False]
