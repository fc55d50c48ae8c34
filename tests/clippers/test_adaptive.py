"""Adaptive clippers against their formulas in float64.

Also the faults of the originals.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.clippers.adaptive import EXACT, AdaGC, AutoClip, ZClip
from lightning_gradguard.stats.grad_stats import measure
from lightning_gradguard.stats.layout import Layout

few = settings(max_examples=settings.default.max_examples // 5)


class Stream:
    """Tensors of one element whose gradient norms are given."""

    def __init__(self, clipper, tensors=1):
        self.clipper, self.state = clipper, None
        self.weights = {f"w{i}": nn.Parameter(torch.ones(1)) for i in range(tensors)}
        self.layout = Layout.of(self.weights)

    def feed(self, *norms):
        for weight, norm in zip(self.weights.values(), norms, strict=True):
            weight.grad = torch.tensor([float(norm)])
        stats = measure(self.layout, self.layout.floors, self.layout.floors)
        if self.state is None:
            self.state = self.clipper.init(stats)
        clip, self.state = self.clipper.update(stats, self.state)
        return clip


def healthy(seed, steps, tensors=1, sigma=0.3, spikes=0.05):
    """Return log-normal norms, float64 [steps, tensors].

    Some are spikes of x2 to x100; all are float32 values.
    """
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(0, sigma, (steps, tensors)) - rng.uniform(0, 3))
    norms *= np.where(rng.random((steps, 1)) < spikes, rng.uniform(2, 100, (steps, 1)), 1)
    return norms.astype(np.float32).astype(float)


@few
@given(
    seed=st.integers(0, 2**20),
    percentile=st.one_of(st.sampled_from([1e-3, 10, 50, 100]), st.floats(1e-3, 100)),
)
def test_autoclip_equals_numpys_percentile_of_the_history(seed, percentile):
    norms, stream = healthy(seed, 60)[:, 0], Stream(AutoClip(percentile))
    for step, norm in enumerate(norms):
        clip, limit = stream.feed(norm), np.percentile(norms[: step + 1], percentile)
        assert clip.threshold.item() == pytest.approx(limit, rel=1e-5)
        assert clip.multipliers.item() == pytest.approx(min(1, limit / norm), rel=1e-5)


def test_autoclip_is_exact_at_first_and_keeps_its_error_bound_in_a_long_run():
    norms, stream = healthy(3, EXACT + 600, sigma=2.0)[:, 0], Stream(AutoClip())
    for step, norm in enumerate(norms):
        if step in (0, 1, 999, EXACT - 2, EXACT - 1, EXACT, EXACT + 1, EXACT + 300, EXACT + 599):
            for percentile in (1e-3, 10, 50, 99.9, 100):
                # The history is the same for all percentiles.
                other = Stream(AutoClip(percentile))
                other.state = stream.state
                limit = np.percentile(norms[: step + 1], percentile)
                tolerance = 1e-5 if step < EXACT else 2**-8
                assert other.feed(norm).threshold.item() == pytest.approx(limit, rel=tolerance)
        stream.feed(norm)


@pytest.mark.parametrize("norm", [1e-38, 1e-20, 1.0, 1e18])
def test_autoclip_counts_norms_of_any_size(norm):
    stream = Stream(AutoClip())
    for _ in range(3):
        stream.feed(norm)
    stream.state = stream.state._replace(seen=stream.state.seen + EXACT, bins=stream.state.bins * 1000)
    assert stream.feed(norm).threshold.item() == pytest.approx(norm, rel=2**-8)


def test_autoclip_has_no_threshold_before_the_first_gradient():
    stream = Stream(AutoClip())
    assert stream.feed(math.nan).threshold.item() == math.inf
    assert stream.feed(0.0).threshold.item() == math.inf


def test_autoclip_does_not_freeze_after_a_dead_start():
    stream = Stream(AutoClip())
    for _ in range(50):
        stream.feed(0.0)
    assert stream.feed(2.0).multipliers.item() == 1.0


class ZClipOriginal:
    """Arithmetic of ``zclip`` 1.0.0, in float64."""

    def __init__(self, alpha=0.97, z_thresh=2.5, max_grad_norm=1.0, eps=1e-6, warmup_steps=25):
        self.alpha, self.z_thresh, self.max_grad_norm, self.eps = alpha, z_thresh, max_grad_norm, eps
        self.warmup_steps, self.buffer, self.mean, self.var = warmup_steps, [], None, None

    def step(self, norm):
        top = math.inf if self.max_grad_norm is None else self.max_grad_norm
        if self.mean is None:
            self.buffer.append(norm)
            if len(self.buffer) >= self.warmup_steps:
                self.mean, self.var = np.mean(self.buffer), np.var(self.buffer)
            return min(1.0, top / (norm + 1e-6))
        std = self.var**0.5
        z = (norm - self.mean) / (std + self.eps)
        adaptive = self.mean + (self.z_thresh * std) / (z / self.z_thresh) if z > self.z_thresh else norm
        self.mean = self.alpha * self.mean + (1 - self.alpha) * adaptive
        self.var = self.alpha * self.var + (1 - self.alpha) * (adaptive - self.mean) ** 2
        limit = min(adaptive, top)
        return limit / (norm + 1e-6) if norm > limit else 1.0


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": None}, {"max_grad_norm": 0.1, "warmup_steps": 3}], ids=str
)
@few
@given(seed=st.integers(0, 2**20))
def test_zclip_equals_the_original(options, seed):
    original, stream = ZClipOriginal(**options), Stream(ZClip(**options))
    for norm in healthy(seed, 120)[:, 0]:
        assert stream.feed(norm).multipliers.item() == pytest.approx(original.step(norm), rel=1e-5)
    assert stream.state.mean.item() == pytest.approx(original.mean, rel=1e-5)
    assert stream.state.var.item() == pytest.approx(original.var, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", [5, 40])
def test_one_bad_step_does_not_blind_zclip(bad, when):
    stream = Stream(ZClip(max_grad_norm=None))
    for step, norm in enumerate(healthy(0, 60, spikes=0)[:, 0]):
        stream.feed(bad if step == when else norm)
    assert stream.state.mean.isfinite()
    assert stream.feed(100 * norm).norms.item() < 3 * norm


def test_zclip_is_not_frozen_by_zeros():
    stream = Stream(ZClip())
    for _ in range(60):
        stream.feed(0.0)
    assert stream.feed(0.5).multipliers.item() == 1.0


def test_zclip_threshold_between_spikes_is_where_the_next_would_begin():
    stream = Stream(ZClip(max_grad_norm=None))
    for norm in healthy(1, 60, spikes=0)[:, 0]:
        stream.feed(norm)
    limit = stream.state.mean + 2.5 * (stream.state.var.sqrt() + 1e-6)
    before = stream.state
    for factor in (0.1, 0.999, 1.001, 100.0):  # the same, whether or not the step is clipped
        stream.state, clip = before, stream.feed(limit.item() * factor)
        assert clip.threshold.item() == pytest.approx(limit.item(), rel=1e-5)
        assert (clip.multipliers.item() < 1) == (factor > 1)


class AdaGCOriginal:
    """Algorithm 1 of arXiv:2502.11034 in float64."""

    def __init__(self, tensors, factor=1.05, decay=0.98, warmup_steps=100, warmup_norm=1.0):
        self.factor, self.decay, self.warmup_steps, self.warmup_norm = (
            factor,
            decay,
            warmup_steps,
            warmup_norm,
        )
        self.step_number, self.gamma = 0, np.full(tensors, np.inf)

    def step(self, norms):
        if self.step_number < self.warmup_steps:
            h = np.full_like(norms, min(1.0, self.warmup_norm / np.linalg.norm(norms)))
            self.gamma = np.minimum(self.gamma, h * norms)
        else:
            h = np.minimum(1.0, self.factor * self.gamma / norms)
            self.gamma = self.decay * self.gamma + (1 - self.decay) * h * norms
        self.step_number += 1
        return h


@pytest.mark.parametrize(
    "options", [{}, {"factor": 1.5, "decay": 0.5, "warmup_steps": 7, "warmup_norm": 0.1}], ids=str
)
@few
@given(seed=st.integers(0, 2**20))
def test_adagc_equals_the_algorithm(options, seed):
    original, stream = AdaGCOriginal(4, **options), Stream(AdaGC(**options), tensors=4)
    for norms in healthy(seed, 160, tensors=4):
        clip, h = stream.feed(*norms), original.step(norms)
        np.testing.assert_allclose(clip.multipliers.numpy(), h, rtol=1e-5)
    np.testing.assert_allclose(stream.state.gamma.numpy(), original.gamma, rtol=1e-5)


def test_adagc_threshold_is_global_in_warm_up_and_of_all_tensors_after():
    stream = Stream(AdaGC(warmup_steps=2), tensors=2)
    assert stream.feed(3.0, 4.0).threshold.item() == pytest.approx(1.0)
    assert stream.feed(0.3, 0.4).threshold.item() == pytest.approx(1.0)
    assert stream.feed(9.0, 9.0).threshold.item() == pytest.approx(1.05 * 0.5)


@pytest.mark.parametrize("warm_up_gradient", [0.0, 0.5])
def test_a_layer_whose_gradient_starts_at_zero_is_not_frozen_by_adagc(warm_up_gradient):
    stream = Stream(AdaGC(warmup_steps=5), tensors=2)
    for step in range(5):
        stream.feed(0.5, 0.0 if step < 3 else warm_up_gradient)
    assert stream.feed(0.5, 0.5).multipliers.tolist() == [1.0, 1.0]
    assert stream.feed(0.5, 5.0).norms[1].item() == pytest.approx(0.525)
