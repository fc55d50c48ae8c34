"""Behaviour of SpikeClip: cuts, unchanged norms, learning."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.clippers.spike_clip import (
    INFLUENCE,
    PRIOR_SIGMA,
    PRIOR_STEPS,
    SIGMA_FLOOR,
    SPREAD_DECAY,
    SpikeClip,
)
from lightning_gradguard.stats.grad_stats import measure
from lightning_gradguard.stats.layout import Layout

few = settings(max_examples=settings.default.max_examples // 5)


class Stream:
    """Tensors of one element whose gradient norms are given."""

    def __init__(self, clipper=SpikeClip(), tensors=1):  # noqa: B008, it is frozen
        self.clipper, self.state = clipper, None
        self.weights = {f"w{i}": nn.Parameter(torch.ones(1)) for i in range(tensors)}
        self.layout = Layout.of(self.weights)

    def feed(self, *norms):
        for weight, norm in zip(self.weights.values(), norms, strict=True):
            weight.grad = None if norm is None else torch.tensor([float(norm)])
        stats = measure(self.layout, self.layout.floors, self.layout.floors)
        if self.state is None:
            self.state = self.clipper.init(stats)
        clip, self.state = self.clipper.update(stats, self.state)
        return clip

    def clips(self, norms):
        """Return norms after clipping, shaped like ``norms``."""
        rows = np.reshape(norms, (len(norms), -1))
        return np.stack([self.feed(*row).norms.numpy() for row in rows]).reshape(norms.shape).astype(float)


def noisy(seed, *shape, sigma=0.2):
    """Return log-normal norms that float32 represents exactly."""
    return np.exp(np.random.default_rng(seed).normal(0, sigma, shape)).astype(np.float32).astype(float)


class Definition:
    """SpikeClip's definition in float64, tensor after tensor."""

    def __init__(self, tensors, z_threshold=9.0, joint_threshold=5.0, decay=0.9, patience=20):
        self.z_threshold, self.joint_threshold = z_threshold, joint_threshold
        self.decay, self.patience, self.joint_var = decay, patience, PRIOR_SIGMA**2
        start = {"seen": 0, "mean": 0.0, "var": PRIOR_SIGMA**2, "streak": 0, "last": 0.0}
        self.levels = [dict(start) for _ in range(tensors)]

    def step(self, norms):
        """Return the norms after clipping."""
        if not all(map(math.isfinite, norms)):
            return list(norms)
        counting = [(i, math.log(x)) for i, x in enumerate(norms) if x > 0]
        known = [(self.levels[i], x) for i, x in counting if self.levels[i]["seen"]]
        joint = 0.0
        for level, x in known:
            joint += short(x - level["mean"], self.z_threshold * sigma(level["var"])) / len(known)
        z = joint / sigma(self.joint_var)
        changes = [x - level["last"] for level, x in known if not self.outlier(level, x, z)]
        if changes:
            most = max(level["seen"] for level, _ in known)
            self.joint_var = spread(self.joint_var, sum(changes) / len(known), most)
        clipped = list(norms)
        for i, x in counting:
            clipped[i] = min(norms[i], self.tensor(self.levels[i], x, z))
        return clipped

    def outlier(self, level, x, joint_z):
        z = (x - level["mean"]) / sigma(level["var"])
        return abs(z) > self.z_threshold or abs(joint_z) > self.joint_threshold

    def tensor(self, level, x, joint_z):
        """Return one tensor's limit, and update its level."""
        seen, mean, now = level["seen"], level["mean"], sigma(level["var"])
        z = (x - mean) / now
        outlier = self.outlier(level, x, joint_z)
        level["streak"] = level["streak"] + 1 if outlier else 0
        if seen == 0 or level["streak"] > min(seen, self.patience):
            level.update(seen=1, mean=x, var=PRIOR_SIGMA**2, streak=0, last=x)
            return math.inf
        learnt = short(x - mean, INFLUENCE * now) if outlier else x - mean
        level["mean"] += max(1 - self.decay, 1 / (seen + 1)) * learnt
        if not outlier:
            level.update(var=spread(level["var"], x - level["last"], seen), last=x, seen=seen + 1)
        return math.exp(mean) if z > self.z_threshold or joint_z > self.joint_threshold else math.inf


def sigma(var):
    return max(math.sqrt(var), SIGMA_FLOOR)


def short(x, bound):
    return max(-bound, min(bound, x))


def spread(var, change, seen):
    square = min(change**2 / 2, (INFLUENCE * sigma(var)) ** 2)
    return var + max(1 - SPREAD_DECAY, 1 / (seen + PRIOR_STEPS)) * (square - var)


OPTIONS = [{}, {"z_threshold": 2.0, "joint_threshold": 1.5, "decay": 0.7, "patience": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tensors", [1, 7])
@few
@given(seed=st.integers(0, 2**20))
def test_equals_its_definition(options, tensors, seed):
    rng = np.random.default_rng(seed)
    norms = noisy(seed, 150, tensors, sigma=rng.uniform(0.05, 1))
    norms *= np.exp(rng.uniform(-5, 5) + 0.02 * np.arange(150))[:, None]
    # Spikes of one tensor, and of all.
    for shape in ((150, tensors), (150, 1)):
        norms *= rng.choice([1, 1e-3, 3, 1e4, 0], p=[0.9, 0.025, 0.025, 0.025, 0.025], size=shape)
    norms[60:95] *= 50
    norms[120] = math.nan
    norms = norms.astype(np.float32).astype(float)
    definition = Definition(tensors, **options)
    wanted = np.array([definition.step(row) for row in norms])
    np.testing.assert_allclose(Stream(SpikeClip(**options), tensors).clips(norms), wanted, rtol=1e-4)


@pytest.mark.parametrize("step", [1, 2, 5, 10, 50, 300])
@pytest.mark.parametrize("factor", [1e2, 1e3, 1e6])
def test_a_spike_is_cut_to_about_a_normal_norm_from_step_1(step, factor):
    norms = noisy(step, step + 1, 30)
    norms[step] *= factor
    after = Stream(tensors=30).clips(norms)[step]
    assert ((after > 0.5) & (after < 3.5)).all()


@few
@given(seed=st.integers(0, 2**20), factor=st.floats(5, 1e8))
def test_a_spike_of_any_size_is_cut_to_the_typical_norm(seed, factor):
    stream = Stream()
    stream.clips(noisy(seed, 100))
    typical = stream.state.mean.exp().item()
    assert stream.feed(factor * typical).norms.item() == pytest.approx(typical, rel=1e-5)


def test_a_rise_of_all_tensors_that_would_be_noise_in_one_is_a_spike():
    norms = noisy(0, 201, 40)
    norms[200] *= 3
    together, alone = Stream(tensors=40), Stream(tensors=40)
    assert (together.clips(norms)[200] < 0.75 * norms[200]).mean() > 0.8
    norms[200, 1:] /= 3
    assert np.array_equal(alone.clips(norms)[200], norms[200])


def test_one_wild_tensor_is_no_spike_of_all():
    norms = noisy(0, 201, 40)
    norms[200, 3] *= 1e12
    after = Stream(tensors=40).clips(norms)[200]
    assert after[3] < 2
    assert np.array_equal(np.delete(after, 3), np.delete(norms[200], 3))


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.3, 1.0])
def test_healthy_noise_is_unchanged(sigma):
    norms = noisy(0, 600, 20, sigma=sigma)
    assert (Stream(tensors=20).clips(norms) < norms).mean() < 1e-3


T = np.arange(1, 61)


@pytest.mark.parametrize(
    "course",
    [
        np.exp(-0.3 * T),  # a good start
        np.exp(0.06 * T),  # leaving a plateau
        T,  # a zero-initialised layer
        1 / T,
        np.where(T > 30, 0.1, 1.0),  # a drop of the learning rate
        1 + 0.2 * np.cos(3 * T) * (T > 20),  # full batch at the edge of stability
        1.5 - np.cos(T / 6),  # restarts
    ],
    ids=["decay", "growth", "linear", "harmonic", "drop", "wiggle", "cycle"],
)
def test_what_healthy_trainings_do_is_unchanged(course):
    norms = course.astype(np.float32).astype(float)
    assert np.array_equal(Stream().clips(norms), norms)


@pytest.mark.parametrize("course", [np.cumsum(T), np.exp(0.15 * T)], ids=["warm_up", "fast_growth"])
def test_a_norm_that_grows_fast_is_cut_for_no_longer_than_patience(course):
    # 1, 3, 6, 10: a zero-initialised layer under learning-rate warm-up; and a plateau that ends fast.
    norms = np.concatenate([course, np.full(20, course[-1])]).astype(np.float32).astype(float)
    share = Stream().clips(norms) / norms
    runs = "".join("c" if s < 1 else "." for s in share).split(".")
    assert max(map(len, runs)) <= 20
    assert (share[-5:] == 1).all()


def test_spikes_after_a_good_start_do_not_hide_in_its_fall():
    fall = np.exp(-0.15 * np.arange(25))[:, None] * noisy(0, 25, 10)
    stream = Stream(tensors=10)
    stream.clips(fall)
    after = stream.feed(*(20 * fall[-1])).norms.numpy()
    assert (after < 8 * fall[-1]).all()


@pytest.mark.parametrize("factor", [5, 10, 1000])
def test_a_level_that_rises_for_good_is_accepted(factor):
    norms = np.concatenate([noisy(0, 200, 10), factor * noisy(1, 100, 10)]).astype(np.float32).astype(float)
    share = Stream(tensors=10).clips(norms) / norms
    assert (share[200:205] < 1).all()
    assert (share[240:] == 1).all()


def test_a_level_that_falls_for_good_is_accepted():
    stream = Stream()
    stream.clips(np.concatenate([noisy(0, 200), 0.01 * noisy(1, 60)]))
    assert stream.feed(1.0).norms.item() < 0.03


def test_a_spike_at_step_0_does_not_set_the_level():
    stream = Stream()
    stream.clips(np.array([1e3, 1.0, 1.1, 0.9]))
    assert stream.feed(1e3).norms.item() < 3


def test_frequent_spikes_do_not_widen_sigma():
    norms = noisy(0, 1000)
    spikes = np.random.default_rng(1).random(1000) < 0.1
    spikes[:5] = False
    clipped = Stream().clips(np.where(spikes, 100 * norms, norms))
    assert clipped[spikes].max() < 4


def test_empty_batches_do_not_widen_sigma():
    norms = noisy(0, 400)
    norms[::10] *= 1e-6
    stream = Stream()
    stream.clips(norms)
    assert stream.feed(100.0).norms.item() < 2


def test_each_tensor_has_its_own_level():
    stream = Stream(tensors=3)
    for a, b in zip(noisy(0, 50), noisy(1, 50), strict=True):
        stream.feed(a, 1e-4 * b, None)
    clip = stream.feed(1.0, 1.0, 1.0)
    assert clip.multipliers[0] == 1
    assert clip.norms[1] < 2e-4
    assert clip.multipliers[2] == 1
    assert clip.threshold == math.inf  # the third has no past


def test_threshold_is_where_a_step_would_be_cut_however_large_it_is():
    stream = Stream(tensors=9)
    norms = [3.0, 4.0, *[0.01] * 7]
    for _ in range(200):
        stream.feed(*norms)
    before, total = stream.state, math.hypot(*norms)

    def clip(*norms):
        stream.state = before
        return stream.feed(*norms)

    # All tensors together are cut from 5 sigma on.
    limit = total * math.exp(5 * SIGMA_FLOOR)
    for factor in (1e-2, 0.5, 1.0, 2.0, 3.0, 1e3):
        threshold = clip(*(factor * norm for norm in norms)).threshold.item()
        assert threshold == pytest.approx(limit, rel=1e-4)
    for factor, cut in ((0.999, False), (1.001, True)):
        multipliers = clip(*(factor * limit / total * norm for norm in norms)).multipliers
        assert (multipliers < 1).all() if cut else (multipliers == 1).all()
    # A tensor alone is cut from 9 sigma on; the others stay, so the threshold is at least their norm.
    spike = clip(3.0, 4.0, *[0.01] * 6, 1.0)
    assert spike.threshold.item() == pytest.approx(math.hypot(*norms), rel=1e-4)
    assert (spike.multipliers < 1).tolist() == [False] * 8 + [True]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_has_a_threshold_too(bad):
    stream = Stream(tensors=2)
    for _ in range(200):
        stream.feed(3.0, 4.0)
    assert stream.feed(3.0, bad).threshold.item() == pytest.approx(5 * math.exp(5 * SIGMA_FLOOR), rel=1e-4)


@few
@given(seed=st.integers(0, 2**20), tensors=st.integers(1, 6))
def test_threshold_separates_cut_steps_from_others_at_any_size(seed, tensors):
    stream = Stream(tensors=tensors)
    for row in noisy(seed, 30, tensors):
        stream.feed(*row)
    before, shape = stream.state, noisy(seed + 1, tensors, sigma=0.5)
    threshold = stream.feed(*shape).threshold.item()
    for factor in (0.98, 1.02):
        stream.state = before
        scaled = shape * (factor * threshold / np.linalg.norm(shape))
        cut = bool((stream.feed(*scaled).multipliers < 1).any())
        assert cut == (factor > 1) or threshold == pytest.approx(np.linalg.norm(shape), rel=1e-6)


@pytest.mark.parametrize("start", [0.0, None, math.nan])
def test_a_layer_that_starts_without_a_gradient_is_not_frozen(start):
    stream = Stream(tensors=2)
    for _ in range(30):
        stream.feed(1.0, start)
    course = [0.01 * 3**k for k in range(3)] + [0.1] * 10
    assert all(stream.feed(1.0, norm).multipliers[1] == 1 for norm in course)


def test_rare_zeros_and_missing_gradients_leave_no_trace():
    norms = noisy(0, 60)
    plain, holey = Stream(), Stream()
    for step, norm in enumerate(norms):
        if step % 7 == 3:
            holey.feed(None if step % 2 else 0.0)
        assert torch.equal(plain.feed(norm).threshold, holey.feed(norm).threshold)


@pytest.mark.parametrize("scale", [65536.0, 1e-6, 3e-12, 1e15])
@few
@given(seed=st.integers(0, 2**20))
def test_is_scale_free(scale, seed):
    norms = noisy(seed, 80)
    norms[[3, 40, 60]] *= [50, 10, 1e4]
    plain, scaled = Stream(), Stream()
    for norm in norms:
        a, b = plain.feed(norm), scaled.feed(scale * norm)
        assert b.multipliers.item() == pytest.approx(a.multipliers.item(), rel=1e-4)
        assert (a.multipliers == 1) == (b.multipliers == 1)


def test_saves_a_training_from_a_corrupt_batch():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 10, generator=generator)
    targets = inputs @ torch.randn(10, 1, generator=generator)

    def train(clip, corrupt):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        layout, state, clipper = Layout.of(dict(model.named_parameters())), None, SpikeClip()
        for step in range(100):
            rows = torch.randint(0, 256, (32,), generator=generator)
            optimizer.zero_grad()
            loss = (model(inputs[rows]) - targets[rows]).square().mean()
            (loss * (1e6 if corrupt and step == 60 else 1)).backward()
            stats = measure(layout, layout.floors, layout.floors, loss)
            state = clipper.init(stats) if state is None else state
            decided, state = clipper.update(stats, state)
            if clip:
                for parameter, factor in zip(model.parameters(), decided.multipliers, strict=True):
                    parameter.grad *= factor
            optimizer.step()
        return (model(inputs) - targets).square().mean().item()

    clean = train(clip=False, corrupt=False)
    assert train(clip=True, corrupt=True) < 1.5 * clean
    assert not train(clip=False, corrupt=True) < 3 * clean
