"""Behaviour of SteadyClip: its formula, soft start, bounds of its level, what it leaves alone, and resuming."""

import copy
import io
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard import Guard, SpikeClip, SteadyClip
from lightning_gradguard.engine.parameter_tracker import StateError
from lightning_gradguard.stats.grad_stats import measure
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.moments import moment_norms

many = settings(max_examples=3 * settings.default.max_examples)
few = settings(max_examples=settings.default.max_examples // 3)
both_kinds = pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "other"])


class Stream:
    """Tensors of one element whose gradient norms are given.

    Args:
        clipper: What is tried.
        tensors: Number of tensors, w0 and so on.
        adaptive: Whether the optimizer is.
        moments: Norms that its second moments tell; unknown if None.
    """

    def __init__(self, clipper=SteadyClip(), tensors=1, *, adaptive=True, moments=None):  # noqa: B008, it is frozen
        self.clipper, self.state, self.adaptive, self.moments = clipper, None, adaptive, moments
        self.weights = {f"w{i}": nn.Parameter(torch.ones(1)) for i in range(tensors)}
        self.layout = Layout.of(self.weights)

    def feed(self, *norms):
        """Take one step and return its clip."""
        for weight, norm in zip(self.weights.values(), norms, strict=True):
            weight.grad = None if norm is None else torch.tensor([float(norm)])
        stats = measure(self.layout, self.layout.floors, self.layout.floors).replace(adaptive=self.adaptive)
        if self.state is None:
            known = stats if self.moments is None else stats.replace(moments=torch.tensor(self.moments))
            self.state = self.clipper.init(known)
        clip, self.state = self.clipper.update(stats, self.state)
        return clip

    def multipliers(self, norms):
        """Take a step for each row, and return all multipliers."""
        return np.array([self.feed(*row).multipliers.tolist() for row in norms])

    @property
    def levels(self):
        return self.state.level.exp().tolist()


def noisy(seed, *shape, sigma=0.2):
    """Return log-normal norms that float32 represents exactly."""
    return np.exp(np.random.default_rng(seed).normal(0, sigma, shape)).astype(np.float32).astype(float)


# The formula.


class Level:
    """Level of one norm in float64, by the words of the docstring.

    Args:
        start: Part of the first norm at which it begins.
        rise: Largest rise of its logarithm in a step.
        begun: Where it begins, if that is known before.
        rises_early: Whether it may rise faster in the first steps.
    """

    def __init__(self, start, rise, begun=None, *, rises_early=False):
        self.start, self.rise, self.level, self.rises_early = start, rise, begun, rises_early
        self.steps, self.low = math.inf if begun else 0, 0

    def limit(self, norm):
        """Return the level in force at this norm, then follow the norm."""
        level = self.start * norm if self.level is None else self.level
        early = 2 / (self.steps + 1)
        rise = max(early, self.rise) if self.rises_early else self.rise
        move = max(-max(early, 0.05), min(rise, math.log(norm / level) / 5))
        self.low = self.low + 1 if norm < 0.01 * level else 0
        if 0 < self.low <= 10 and self.steps >= 20:
            move = 0
        self.level, self.steps = level * math.exp(move), self.steps + 1
        return level


class Definition:
    """SteadyClip in float64: a level for each tensor, or one for all."""

    def __init__(self, tensors, *, adaptive, soft_start=True, excluded=(), moments=None):
        self.adaptive, self.excluded = adaptive, excluded
        known = moments or [math.nan] * tensors
        self.levels = [
            Level(0.03 if soft_start and math.isnan(m) else 1.0, 0.02, m if m > 0 else None) for m in known
        ]
        self.total = Level(1.0, 0.05, rises_early=True)

    def step(self, norms):
        """Return the multipliers."""
        multipliers = [1.0] * len(norms)
        if not all(map(math.isfinite, norms)):
            return multipliers
        counting = [i for i, norm in enumerate(norms) if norm > 0 and i not in self.excluded]
        if self.adaptive:
            for i in counting:
                multipliers[i] = min(1.0, self.levels[i].limit(norms[i]) / norms[i])
        elif counting:
            total = math.hypot(*(norms[i] for i in counting))
            multiplier = min(1.0, self.total.limit(total) / total)
            for i in counting:
                multipliers[i] = multiplier
        return multipliers


@both_kinds
@many
@given(
    seed=st.integers(0, 2**20),
    sigma=st.floats(0.01, 1.0),
    soft_start=st.booleans(),
    known=st.booleans(),
    kind=st.sampled_from([(1, ()), (5, ()), (5, (0, 3))]),
)
def test_equals_its_definition(adaptive, soft_start, kind, seed, sigma, known):
    (tensors, excluded), random = kind, np.random.default_rng(seed)
    norms = noisy(seed, 80, tensors, sigma=sigma)
    # Spikes, tiny gradients and zeros, of one tensor and of all; a jump; and steps that are not finite. Not at first: a
    # level far from 1 has fewer digits after the point in its logarithm.
    for columns in (tensors, 1):
        odds = [0.9, 0.025, 0.025, 0.025, 0.025]
        norms[3:] *= random.choice([1, 1e-3, 3, 1e4, 0], p=odds, size=(77, columns))
    norms[50:65] *= 5
    norms[[7, 70], 0] = math.nan, math.inf
    norms = norms.astype(np.float32).astype(float)
    moments = random.choice([0.5, 2.0, math.nan, 0.0], size=tensors).tolist() if known and adaptive else None
    definition = Definition(
        tensors, adaptive=adaptive, soft_start=soft_start, excluded=excluded, moments=moments
    )
    expected = np.array([definition.step(row) for row in norms])
    clipper = SteadyClip(soft_start, exclude=tuple(f"w{i}" for i in excluded))
    stream = Stream(clipper, tensors, adaptive=adaptive, moments=moments)
    np.testing.assert_allclose(stream.multipliers(norms), expected, rtol=1e-5)


def test_the_definition_tells_its_kinds_apart():
    """The comparison above could not fail if all of them gave the same."""
    norms = noisy(0, 120, 3)
    seen = [
        np.array([definition.step(row) for row in norms])
        for definition in (
            Definition(3, adaptive=True),
            Definition(3, adaptive=True, soft_start=False),
            Definition(3, adaptive=True, moments=[1.0, 1.0, 1.0]),
            Definition(3, adaptive=False),
            Definition(3, adaptive=False, excluded=(1,)),
        )
    ]
    for i, one in enumerate(seen):
        assert not any(np.allclose(one, other, rtol=1e-3) for other in seen[:i])


# How it begins.


@pytest.mark.parametrize("norm", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(
    ("adaptive", "soft_start", "expected"),
    [(True, True, 0.03), (True, False, 1.0), (False, True, 1.0), (False, False, 1.0)],
)
def test_the_first_step_is_scaled_to_three_percent_only_with_an_adaptive_optimizer(
    adaptive, soft_start, expected, norm
):
    stream = Stream(SteadyClip(soft_start), 2, adaptive=adaptive)
    assert stream.feed(norm, 3 * norm).multipliers.tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_a_soft_start_ends_after_some_200_steps():
    share = Stream().multipliers(np.ones((300, 1)))[:, 0]
    assert (np.diff(share) > -1e-6).all()
    assert share[100] == pytest.approx(0.03 * math.exp(0.02 * 100), rel=1e-3)
    assert share[150] < 0.7
    assert share[220] > 0.99


@pytest.mark.parametrize("soft_start", [True, False])
def test_a_tensor_that_gets_its_first_gradient_later_starts_then(soft_start):
    stream = Stream(SteadyClip(soft_start), 2)
    for _ in range(250):
        stream.feed(1.0, None)
    first, second = stream.feed(1.0, 7.0).multipliers.tolist()
    assert first > 0.99
    assert second == pytest.approx(0.03 if soft_start else 1.0, rel=1e-5)


def test_with_another_optimizer_such_a_tensor_is_part_of_the_norm_from_then_on():
    stream = Stream(tensors=2, adaptive=False)
    for _ in range(50):
        stream.feed(3.0, None)
    assert stream.feed(3.0, 4.0).multipliers.tolist() == pytest.approx([0.6, 0.6], rel=1e-5)


@pytest.mark.parametrize("soft_start", [True, False])
def test_a_level_begins_at_the_optimizers_moments_where_there_are_some(soft_start):
    stream = Stream(SteadyClip(soft_start), 4, moments=[2.0, 0.5, math.nan, 0.0])
    begin = 0.03 if soft_start else 1.0
    # Where the optimizer has taken steps without moments, at the first norm.
    assert stream.feed(1.0, 1.0, 1.0, 1.0).multipliers.tolist() == pytest.approx(
        [1.0, 0.5, begin, 1.0], rel=1e-5
    )
    # Such a level has no early steps: it falls by 5 % at once.
    assert stream.levels[0] == pytest.approx(2 * math.exp(-0.05), rel=1e-5)


def test_moments_say_nothing_of_the_global_norm():
    stream = Stream(tensors=2, adaptive=False, moments=[1e-3, 5.0])
    assert stream.feed(1.0, 1.0).multipliers.tolist() == [1.0, 1.0]


# What its level follows.


@both_kinds
def test_a_constant_norm_becomes_the_level_and_is_left_alone(adaptive):
    stream = Stream(tensors=2, adaptive=adaptive)
    for _ in range(400):
        clip = stream.feed(3.0, 4.0)
    expected = [3.0, 4.0] if adaptive else [5.0, 5.0]
    assert stream.levels == pytest.approx(expected, rel=1e-5)
    assert clip.multipliers.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert clip.threshold.item() == pytest.approx(5.0, rel=1e-5)


@both_kinds
@pytest.mark.parametrize("spike", [10.0, 1e6, 1e15])
@few
@given(seed=st.integers(0, 2**20), steps=st.integers(1, 120))
def test_a_spike_lifts_the_level_by_no_more_than_a_few_percent(adaptive, spike, seed, steps):
    stream, norms = Stream(adaptive=adaptive), noisy(seed, steps, 1)
    stream.multipliers(norms)
    (before,) = stream.levels
    clip = stream.feed(spike * before)
    assert clip.norms.item() == pytest.approx(before, rel=1e-4)
    assert clip.norms <= clip.threshold * (1 + 1e-6)
    rise = 0.02 if adaptive else max(0.05, min(2 / (steps + 1), math.log(spike) / 5))
    assert stream.levels[0] == pytest.approx(before * math.exp(rise), rel=1e-4)


@both_kinds
@pytest.mark.parametrize(("share", "expected"), [(0.02, 0.05), (1e-6, 0.0), (1e-30, 0.0)])
def test_a_batch_of_tiny_gradients_hardly_pulls_the_level_down(adaptive, share, expected):
    """By a few percent, and not at all if it is far below; but for the first steps."""
    stream = Stream(adaptive=adaptive)
    bound = []
    for step in range(120):
        stream.feed(1.0)
        (before,), kept = stream.levels, stream.state
        assert stream.feed(share * before).multipliers.item() == 1
        bound.append(math.log(before / stream.levels[0]))
        assert bound[-1] <= max(2 / (2 + step), 0.05) + 1e-5
        stream.state = kept
    assert bound[0] > 0.7
    assert bound[40:] == pytest.approx([expected] * 80, abs=1e-5)


@both_kinds
@pytest.mark.parametrize("often", [0.3, 0.5, 0.7])
def test_batches_without_a_signal_do_not_sink_the_level_however_many_there_are(adaptive, often):
    """As of a head whose task is in one batch of four, or of sparse rewards."""
    stream, random = Stream(adaptive=adaptive), np.random.default_rng(0)
    for step in range(1500):
        stream.feed(1e-6 if step > 30 and random.random() < often else 1.0)
    assert 0.2 < stream.levels[0] <= 1.01


@both_kinds
def test_norms_that_fall_for_good_are_followed(adaptive):
    stream = Stream(adaptive=adaptive)
    for step in range(600):
        stream.feed(1.0 if step < 300 else 1e-4)
    assert stream.levels[0] < 3e-4


@pytest.mark.parametrize(("first", "steps"), [(1e-6, 220), (1e-3, 70), (1e3, 70), (1e6, 250)])
def test_a_first_batch_out_of_the_ordinary_is_soon_forgotten_where_the_scale_counts(first, steps):
    stream = Stream(adaptive=False)
    stream.feed(first)
    for _ in range(steps):
        clip = stream.feed(1.0)
    assert clip.multipliers.item() > 0.9
    assert stream.levels[0] < 1.2


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_with_another_kind_of_optimizer_levels_begin_again(before, after):
    """A state may be loaded for another optimizer than it was saved with."""
    stream = Stream(tensors=2, adaptive=before)
    stream.multipliers(noisy(0, 100, 2) * [1, 30])
    stream.adaptive = after
    first = stream.feed(1.0, 30.0).multipliers
    assert first[0] == first[1]
    assert first[0] == pytest.approx(0.03 if after and stream.state.soft[0] else 1.0, rel=1e-4)


def test_with_an_adaptive_optimizer_the_level_lies_low_and_with_another_in_the_middle():
    """Norms that vary much move it by its bounds: with 2 % up and 5 % down, 5 of 7 lie above it."""
    norms = noisy(0, 4000, 1, sigma=2.0)
    share = {}
    for adaptive in (True, False):
        multipliers = Stream(adaptive=adaptive).multipliers(norms)[500:]
        share[adaptive] = (multipliers < 1).mean()
    assert share[True] == pytest.approx(5 / 7, abs=0.03)
    assert share[False] == pytest.approx(1 / 2, abs=0.03)


@both_kinds
def test_a_smaller_gradient_is_left_as_it_is(adaptive):
    stream, below = Stream(adaptive=adaptive), 0
    for norm in noisy(1, 600):
        level = math.inf if stream.state is None else stream.levels[0]
        clip = stream.feed(norm)
        if norm < level * (1 - 1e-6) and level < math.inf:
            below += 1
            assert clip.multipliers.item() == 1
            assert clip.norms.item() == np.float32(norm)
    assert below > 50


@both_kinds
@few
@given(seed=st.integers(0, 2**20), exponent=st.integers(-50, 50), factor=st.floats(0.5, 2.0))
def test_it_is_free_of_scale(adaptive, seed, exponent, factor):
    norms = noisy(seed, 80, 3)
    norms[[3, 40, 60]] *= [[50], [1e-4], [1e4]]
    plain, scaled = Stream(tensors=3, adaptive=adaptive), Stream(tensors=3, adaptive=adaptive)
    for row in norms:
        a, b = plain.feed(*row), scaled.feed(*(row * factor * 2.0**exponent))
        torch.testing.assert_close(a.multipliers, b.multipliers, rtol=1e-4, atol=0)


@both_kinds
@given(seed=st.integers(0, 2**20), bad=st.sampled_from([math.nan, math.inf, -math.inf, 1e25]))
def test_steps_that_are_not_finite_change_no_later_bit(adaptive, seed, bad):
    norms = noisy(seed, 60, 3)
    clean, hit = Stream(tensors=3, adaptive=adaptive), Stream(tensors=3, adaptive=adaptive)
    for step, row in enumerate(norms):
        if step % 7 == 3 or step == 0:
            assert hit.feed(row[0], bad, row[2]).multipliers.tolist() == [1.0] * 3
        a, b = clean.feed(*row), hit.feed(*row)
        assert torch.equal(a.threshold, b.threshold)
        assert torch.equal(a.multipliers, b.multipliers)
    assert all(map(torch.equal, clean.state, hit.state))


# What is scaled.


@few
@given(seed=st.integers(0, 2**20), sigma=st.floats(0.05, 2.0))
def test_with_another_optimizer_the_direction_is_kept(seed, sigma):
    sizes = np.exp(np.linspace(-9, 9, 7))
    stream = Stream(tensors=7, adaptive=False)
    multipliers = stream.multipliers(noisy(seed, 60, 7, sigma=sigma) * sizes)
    np.testing.assert_allclose(multipliers, multipliers[:, :1].repeat(7, 1), rtol=1e-6)
    assert (multipliers < 0.999).any()
    assert stream.state.level.unique().numel() == 1


@both_kinds
def test_excluded_tensors_are_neither_scaled_nor_counted(adaptive):
    norms = noisy(0, 80, 3)
    norms[:, 1] *= np.where(np.arange(80) % 9 == 4, 1e6, 1e-3)
    whole = Stream(SteadyClip(exclude=("w1",)), 3, adaptive=adaptive)
    without = Stream(tensors=2, adaptive=adaptive)
    for row in norms:
        clip, other = whole.feed(*row), without.feed(row[0], row[2])
        assert clip.multipliers[1] == 1
        assert clip.norms[1] == np.float32(row[1])
        torch.testing.assert_close(clip.multipliers[[0, 2]], other.multipliers, rtol=1e-6, atol=0)
        # A tensor that is excluded counts with its own norm.
        threshold = math.hypot(other.threshold.item(), row[1])
        assert clip.threshold.item() == pytest.approx(threshold, rel=1e-5)


@both_kinds
def test_all_may_be_excluded(adaptive):
    stream = Stream(SteadyClip(exclude=("*",)), 2, adaptive=adaptive)
    for _ in range(5):
        assert stream.feed(1e3, 1.0).multipliers.tolist() == [1.0, 1.0]
    assert stream.state.seen.tolist() == [0.0, 0.0]


def test_each_tensor_has_a_level_of_its_own_with_an_adaptive_optimizer():
    stream = Stream(SteadyClip(soft_start=False), 2)
    for _ in range(50):
        stream.feed(1.0, 1e-4)
    clip = stream.feed(1.0, 1.0)
    assert clip.multipliers.tolist() == pytest.approx([1.0, 1e-4], rel=1e-3)


@pytest.mark.parametrize("value", [0, 1, 1.0, None, "no", torch.tensor(True), np.True_])
def test_soft_start_must_be_true_or_false(value):
    with pytest.raises(TypeError, match=f"^soft_start must be .*{re.escape(repr(value))}"):
        SteadyClip(value)


@pytest.mark.parametrize("value", ["w0", ["w0"], None, (1,)])
def test_exclude_must_be_a_tuple_of_names(value):
    with pytest.raises(TypeError, match=f"^exclude must be .*{re.escape(repr(value))}"):
        SteadyClip(exclude=value)


def test_exclude_is_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        SteadyClip(True, ("w0",))


# In a guard.

ignore_warnings = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def backward(model, step):
    """Compute gradients of a batch; return the loss."""
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True) + torch.sin(5 * x[:, :1])).square().mean()
    loss.backward()
    return loss


@ignore_warnings
@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda p: torch.optim.Adam(p, lr=1e-3), 0.03),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), 0.03),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3), 0.03),
        (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), 1.0),
        (None, 1.0),
    ],
    ids=["Adam", "fused AdamW", "RMSprop", "SGD", "no optimizer"],
)
@pytest.mark.parametrize("lag", [0, 1])
def test_a_fresh_guard_starts_softly_with_an_adaptive_optimizer(make, first, lag):
    if lag and make is None:
        pytest.skip("lag=1 needs an optimizer")
    model = network()
    optimizer = make and make(model.parameters())
    guard = Guard(model.named_parameters(), optimizer=optimizer, clipper=SteadyClip(), lag=lag)
    loss = backward(model, 0)
    before = [p.grad.norm().item() for p in model.parameters()]
    report = guard.step(loss=loss)
    assert report.scale == pytest.approx(first, rel=1e-4)
    assert report.clipped_norm <= report.threshold * (1 + 1e-5)
    after = [p.grad.norm().item() for p in model.parameters()]
    assert after == pytest.approx([first * norm for norm in before], rel=1e-4)


@ignore_warnings
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_a_guard_of_a_trained_optimizer_begins_at_its_moments(kind):
    model = network()
    optimizer = kind(model.parameters(), lr=1e-3)
    for step in range(40):
        backward(model, step)
        optimizer.step()
    known = moment_norms(Layout.of(dict(model.named_parameters())), optimizer)
    guard = Guard(model.named_parameters(), optimizer=optimizer, clipper=SteadyClip())
    loss = backward(model, 40)
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    report = guard.step(loss=loss)
    assert report.scale > 0.5
    assert report.threshold == pytest.approx(known.norm().item(), rel=1e-4)
    left = torch.stack([p.grad.norm() for p in model.parameters()])
    torch.testing.assert_close(left, torch.minimum(norms, known), rtol=1e-4, atol=0)


@ignore_warnings
def test_a_parameter_group_that_is_added_starts_softly_and_the_others_go_on():
    model, extra = network(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    guard = Guard([*model.named_parameters(), ("extra", extra)], optimizer=optimizer, clipper=SteadyClip())
    for step in range(250):
        guard.step(loss=backward(model, step))
        optimizer.step()
    optimizer.add_param_group({"params": [extra]})
    loss = backward(model, 250) + extra.sum()
    extra.grad = torch.ones(3)
    before = [p.grad.norm().item() for p in model.parameters()]
    guard.step(loss=loss)
    assert extra.grad.tolist() == pytest.approx([0.03] * 3, rel=1e-4)
    for parameter, norm in zip(model.parameters(), before, strict=True):
        assert parameter.grad.norm().item() > 0.1 * norm


class Loop:
    """A guard over gradients set by hand, the same at each call."""

    STEPS, FIRST = 75, 33  # of the fast path

    def __init__(self, kind, clipper=SteadyClip()):  # noqa: B008, it is frozen
        self.weights = {f"w{i}": nn.Parameter(torch.ones(2, 2)) for i in range(3)}
        self.guard = Guard(
            self.weights.items(), optimizer=kind(self.weights.values(), lr=0.1), clipper=clipper
        )

    def run(self, begin, end):
        """Take steps; return of each its report, threshold first, and the gradients as they were left."""
        results = []
        for step in range(begin, end):
            norms = noisy(step, 3, sigma=0.1) * (1e4 if step == 60 else 1)
            for i, (weight, norm) in enumerate(zip(self.weights.values(), norms, strict=True)):
                with torch.no_grad():
                    weight.fill_(1 + 1e-3 * (step % (7 + i)))
                weight.grad = torch.full_like(weight, math.nan if step == 65 else norm / 2)
            report = self.guard.step(loss=3 / (1 + 0.01 * step))
            left = [w.grad.tolist() if w.grad is not None else None for w in self.weights.values()]
            results.append((report.threshold, report.scale, report.clipped_norm, report.skip, left))
        return results


def through_a_file(loop, kind):
    buffer, second = io.BytesIO(), Loop(kind)
    torch.save(loop.guard.state_dict(), buffer)
    buffer.seek(0)
    second.guard.load_state_dict(torch.load(buffer, weights_only=True))
    return second


KINDS = pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])


@ignore_warnings
@KINDS
@pytest.mark.parametrize(
    "way",
    [through_a_file, lambda loop, _: copy.deepcopy(loop), lambda loop, _: pickle.loads(pickle.dumps(loop))],
    ids=["file", "copy", "pickle"],
)
def test_a_guard_continues_exactly_from_any_step(way, kind):
    whole, loop = Loop(kind), Loop(kind)
    expected = repr(whole.run(0, Loop.STEPS))
    results, deferred = [], set()
    for step in range(Loop.STEPS):
        results += loop.run(step, step + 1)
        waiting = len(loop.guard.fast_path.deferred)
        deferred.add(waiting)
        if step in (0, 1, *range(Loop.FIRST, Loop.FIRST + 9), 60, 61, 65, 66):
            second = way(loop, kind)
            assert repr([*results, *second.run(step + 1, Loop.STEPS)]) == expected
            assert repr(second.guard.state) == repr(whole.guard.state)
            assert second.guard.counts == whole.guard.counts
            assert len(loop.guard.fast_path.deferred) == 0
    assert {0, 1} <= deferred
    assert whole.guard.counts["clipped"] > 20


@ignore_warnings
@KINDS
def test_saving_between_deferred_steps_changes_nothing(kind):
    plain, saving = Loop(kind), Loop(kind)
    expected, waiting = plain.run(0, Loop.STEPS), 0
    for step in range(Loop.STEPS):
        assert repr(saving.run(step, step + 1)) == repr(expected[step : step + 1])
        waiting += len(saving.guard.fast_path.deferred)
        saving.guard.state_dict()
    assert waiting > 20
    assert repr(saving.guard.state) == repr(plain.guard.state)


def test_a_state_belongs_to_a_guard_with_the_same_clipper():
    loop = Loop(torch.optim.Adam)
    loop.run(0, 40)
    state = loop.guard.state_dict()
    for other in (SpikeClip(), None):
        guard = Loop(torch.optim.Adam, other).guard
        with pytest.raises(StateError, match="same detectors and clipper"):
            guard.load_state_dict(state)
        with pytest.raises(StateError, match="same detectors and clipper"):
            loop.guard.load_state_dict(guard.state_dict())
    assert repr(loop.guard.state_dict()) == repr(state)
    # Other options are no other clipper.
    same = Loop(torch.optim.Adam, SteadyClip(soft_start=False))
    same.guard.load_state_dict(state)
    assert repr(same.guard.state.clipper) == repr(loop.guard.state.clipper)
    assert not same.guard.fast_path._is_open


@ignore_warnings
def test_a_rollback_takes_the_levels_back():
    loop = Loop(torch.optim.Adam)
    loop.run(0, 40)
    state, kept = loop.guard.state_dict(), repr(loop.guard.state.clipper)
    loop.run(40, 75)
    assert repr(loop.guard.state.clipper) != kept
    loop.guard.roll_back(state)
    assert repr(loop.guard.state.clipper) == kept
    loop.guard.roll_back(None)
    assert loop.run(0, 1)[0][1] == pytest.approx(0.03, rel=1e-4)
