"""SpikeClip: what it cuts, what it lets pass, and what it learns from."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.signals.spike_clip import PRIOR_SIGMA, PRIOR_STEPS, SIGMA_FLOOR, SpikeClip
from lightning_gradguard.signals.stats import Layout, measure

few = settings(max_examples=5)


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
        """Norms after clipping, of the shape of ``norms``: [steps], or [steps, tensors]."""
        rows = np.reshape(norms, (len(norms), -1))
        return np.stack([self.feed(*row).norms.numpy() for row in rows]).reshape(norms.shape).astype(float)


def noisy(seed, *shape, sigma=0.2):
    """Log-normal norms that float32 can hold."""
    return np.exp(np.random.default_rng(seed).normal(0, sigma, shape)).astype(np.float32).astype(float)


def in_float64(norms, z_threshold=4.0, decay=0.97, patience=20):
    """The definition, step by step, for one tensor."""
    seen, mean, var, streak, clipped = 0, 0.0, PRIOR_SIGMA**2, 0, []
    for norm in norms:
        if norm == 0 or not math.isfinite(norm):
            clipped.append(norm)
            continue
        x, sigma = math.log(norm), max(math.sqrt(var), SIGMA_FLOOR)
        z = (x - mean) / sigma
        streak = streak + 1 if abs(z) > z_threshold else 0
        if seen == 0 or streak > min(seen, patience):
            seen, mean, var, streak = 1, x, PRIOR_SIGMA**2, 0
            clipped.append(norm)
            continue
        counted = mean + (z if streak == 0 else z_threshold**2 / z) * sigma
        clipped.append(math.exp(min(x, counted)))
        gain, evidence = (max(1 - decay, 1 / (seen + k)) for k in (1, PRIOR_STEPS))
        var += evidence * ((counted - mean) ** 2 * (1 - gain) - var)
        mean += gain * (counted - mean)
        seen += streak == 0
    return np.array(clipped)


@pytest.mark.parametrize("options", [{}, {"z_threshold": 2.0, "decay": 0.9, "patience": 3}], ids=str)
@few
@given(seed=st.integers(0, 2**20))
def test_equals_its_definition(options, seed):
    rng = np.random.default_rng(seed)
    norms = noisy(seed, 150, sigma=rng.uniform(0.05, 1)) * np.exp(rng.uniform(-5, 5) + 0.02 * np.arange(150))
    norms *= rng.choice([1, 1e-3, 3, 1e4, 0], p=[0.8, 0.05, 0.05, 0.05, 0.05], size=150)
    norms[60:95] *= 50
    norms = norms.astype(np.float32).astype(float)
    np.testing.assert_allclose(
        Stream(SpikeClip(**options)).clips(norms), in_float64(norms, **options), rtol=1e-4
    )


@pytest.mark.parametrize("step", [1, 2, 5, 10, 50, 300])
@pytest.mark.parametrize("factor", [1e2, 1e3, 1e6])
def test_a_spike_is_cut_to_about_a_normal_norm_from_step_1(step, factor):
    norms = noisy(step, step + 1, 30)
    norms[step] *= factor
    after = Stream(tensors=30).clips(norms)[step]
    assert ((after > 0.5) & (after < 3.5)).all()


@few
@given(seed=st.integers(0, 2**20), factor=st.floats(5, 1e8))
def test_a_bigger_spike_is_cut_closer_and_never_below_the_typical_norm(seed, factor):
    stream = Stream()
    stream.clips(noisy(seed, 100))
    typical, before = stream.state.mean.exp().item(), stream.state
    small = stream.feed(factor * typical).norms.item()
    stream.state = before
    big = stream.feed(2 * factor * typical).norms.item()
    assert typical * (1 - 1e-5) <= big < small


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.3, 1.0])
def test_healthy_noise_is_let_through(sigma):
    norms = noisy(0, 600, 20, sigma=sigma)
    assert (Stream(tensors=20).clips(norms) < norms).mean() < 1e-3


T = np.arange(1, 61)


@pytest.mark.parametrize(
    "course",
    [
        np.exp(-0.3 * T),  # a good start
        np.exp(0.15 * T),  # leaving a plateau
        np.cumsum(T),  # a zero-initialised layer under learning-rate warm-up: 1, 3, 6, 10
        T,  # the same at a constant rate
        1 / T,
        np.where(T > 30, 0.1, 1.0),  # a drop of the learning rate
        1 + 0.2 * np.cos(3 * T) * (T > 20),  # full batch at the edge of stability
        1.5 - np.cos(T / 6),  # restarts
    ],
    ids=["decay", "growth", "warm_up", "linear", "harmonic", "drop", "wiggle", "cycle"],
)
def test_what_healthy_trainings_do_is_let_through(course):
    norms = course.astype(np.float32).astype(float)
    assert np.array_equal(Stream().clips(norms), norms)


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


def test_a_spike_at_step_0_is_outvoted_by_what_follows():
    stream = Stream()
    stream.clips(np.array([1e3, 1.0, 1.1, 0.9]))
    assert stream.feed(1e3).norms.item() < 3


def test_frequent_spikes_do_not_blunt_it():
    norms = noisy(0, 1000)
    spikes = np.random.default_rng(1).random(1000) < 0.1
    spikes[:5] = False
    clipped = Stream().clips(np.where(spikes, 100 * norms, norms))
    assert clipped[spikes].max() < 4


def test_empty_batches_do_not_blunt_it():
    norms = noisy(0, 400)
    norms[::10] *= 1e-6
    stream = Stream()
    stream.clips(norms)
    assert stream.feed(100.0).norms.item() < 2


def test_each_tensor_is_judged_by_itself():
    stream = Stream(tensors=3)
    for a, b in zip(noisy(0, 50), noisy(1, 50), strict=True):
        stream.feed(a, 1e-4 * b, None)
    clip = stream.feed(1.0, 1.0, 1.0)
    assert clip.multipliers[0] == 1
    assert clip.norms[1] < 2e-4
    assert clip.multipliers[2] == 1
    assert clip.threshold == math.inf  # the third has no past


def test_threshold_is_that_of_all_tensors():
    stream = Stream(tensors=2)
    for _ in range(200):
        clip = stream.feed(3.0, 4.0)
    reach = 4 * SIGMA_FLOOR
    assert clip.threshold.item() == pytest.approx(5 * math.exp(reach), rel=1e-4)
    clip = stream.feed(3.0, 4e4)
    wanted = math.hypot(3 * math.exp(reach), 4 * math.exp(reach**2 / math.log(1e4)))
    assert clip.threshold.item() == pytest.approx(wanted, rel=1e-4)


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
