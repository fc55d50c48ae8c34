"""Running statistics on synthetic streams and against SciPy."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from torch import nn

from lightning_gradguard.stats import trends
from lightning_gradguard.stats.grad_stats import measure
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.norms import weight_norms


class Stream:
    """Trends of a model with gradients set by hand."""

    def __init__(self, layers=6, order=None):
        self.weights = {f"w{i}": nn.Parameter(torch.randn(4, 4)) for i in range(layers)}
        self.layout = Layout.of(self.weights, order=order)
        self.unknown = torch.full((layers,), torch.nan)
        self.state = None

    def feed(self, norms, loss=1.0):
        for weight, norm in zip(self.weights.values(), norms, strict=True):
            weight.grad = None if norm is None else torch.full((4, 4), norm / 4)
        loss = None if loss is None else torch.tensor(float(loss))
        stats = measure(self.layout, weight_norms(self.layout), self.unknown, loss)
        self.state = trends.init(stats) if self.state is None else self.state
        seen, new = trends.update(stats, self.state)
        if stats.finite:
            self.state = new
        return seen


def noisy(rng, layers=6, sigma=0.2):
    return [math.exp(rng.normal(0, sigma)) for _ in range(layers)]


def test_tilt_is_the_theil_sen_slope_times_depth():
    rng = np.random.default_rng(0)
    profile = rng.normal(0, 1, 20) + np.arange(20) * 0.3
    layout = Layout.of({f"w{i}": torch.ones(2, 2) for i in range(20)})
    tilt = trends.depth_tilt(
        torch.tensor(profile, dtype=torch.float32), torch.ones(20, dtype=torch.bool), layout
    )
    slope = scipy_stats.theilslopes(profile, np.arange(20)).slope
    assert tilt.item() == pytest.approx(19 * slope, rel=0.02)


def test_tilt_excludes_dead_layers_and_closes_the_gap():
    profile = torch.arange(10.0)
    live = torch.ones(10, dtype=torch.bool)
    live[3:5] = False
    layout = Layout.of({f"w{i}": torch.ones(2, 2) for i in range(10)})
    values = torch.where(live, torch.cumsum(live, 0).float() - 1, torch.full_like(profile, 99.0))
    assert trends.depth_tilt(values, live, layout).item() == pytest.approx(7.0)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_tilt_of_few_layers_is_unknown(layers):
    parameters = {"b": torch.ones(3), **{f"w{i}": torch.ones(2, 2) for i in range(layers)}}
    layout = Layout.of(parameters)
    profile = torch.arange(float(layers + 1))
    assert trends.depth_tilt(profile, torch.ones(layers + 1, dtype=torch.bool), layout).isnan()


def test_tilt_follows_the_order_given_not_the_names():
    stream = Stream(order=[5, 4, 3, 2, 1, 0])
    seen = [stream.feed([10.0**-i for i in range(6)]) for _ in range(30)][-1]
    assert seen.tilt.item() == pytest.approx(5.0, abs=0.5)


@given(st.sampled_from([65536.0, 1e-6, 1e4]))
def test_everything_is_scale_free(factor):
    rng = np.random.default_rng(1)
    torch.manual_seed(0)
    plain = Stream()
    torch.manual_seed(0)
    scaled = Stream()
    for step in range(60):
        norms, loss = noisy(rng), math.exp(-step / 40)
        a, b = plain.feed(norms, loss), scaled.feed([n * factor for n in norms], loss * factor)
        torch.testing.assert_close(a.spike_score, b.spike_score, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(a.tilt, b.tilt, rtol=1e-3, atol=1e-3, equal_nan=True)
        assert a.no_progress == b.no_progress


def test_a_healthy_stream_has_no_spike():
    rng = np.random.default_rng(2)
    stream = Stream()
    assert max(stream.feed(noisy(rng)).spike_score.item() for _ in range(2000)) < trends.ALARM_Z


@pytest.mark.parametrize("at", [30, 100, 400])
def test_a_spike_stands_out_and_does_not_last(at):
    rng = np.random.default_rng(3)
    stream = Stream()
    scores = [
        stream.feed([n * (100 if s == at else 1) for n in noisy(rng)]).spike_score.item() for s in range(500)
    ]
    assert scores[at] > trends.ALARM_Z
    assert max(scores[at + 1 :]) < trends.ALARM_Z
    assert stream.feed([100 * n for n in noisy(rng)]).spike_score > trends.ALARM_Z


@pytest.mark.parametrize(("before", "counts"), [(trends.WARM_UP - 1, False), (trends.WARM_UP, True)])
def test_a_score_means_something_after_the_warm_up(before, counts):
    rng, stream = np.random.default_rng(3), Stream()
    for _ in range(before):
        stream.feed(noisy(rng))
    score = stream.feed([1000 * n for n in noisy(rng)]).spike_score
    assert score > trends.ALARM_Z if counts else score == 0


def test_an_outlier_among_the_first_losses_is_forgotten_by_all_means_of_the_loss():
    stream = Stream()
    for loss in (1.0, 1.0, 1e6, 1.0, 1.0):
        seen = stream.feed([1.0] * 6, loss)
    assert seen.state.loss_start == 1
    # Limited to 30 times their median: (4 + 31) / 5.
    assert seen.state.loss.item() == seen.state.slow_loss.item() == 7
    assert seen.state.loss_spread.item() == pytest.approx((4 * 6 + 24) / 5)


def test_the_best_loss_is_the_lowest_mean_and_counts_from_the_fifth_loss_on():
    stream, best = Stream(), []
    for loss in (4.0, 3.0, 2.0, 2.0, 1.0, 1.0, *[8.0] * 20):
        best.append(stream.feed([1.0] * 6, loss).state.best_loss.item())
    assert best[:4] == [math.inf] * 4
    assert best[4] == pytest.approx(12 / 5)
    assert best[-1] == min(best) < 12 / 5


def test_one_huge_step_in_warm_up_does_not_hide_later_spikes():
    rng = np.random.default_rng(4)
    stream = Stream()
    for step in range(60):
        stream.feed([n * (1e8 if step == 3 else 1) for n in noisy(rng)])
    assert stream.feed([50 * n for n in noisy(rng)]).spike_score > trends.ALARM_Z


def test_a_layer_that_thaws_is_no_spike():
    rng = np.random.default_rng(5)
    stream = Stream()
    scores = []
    for step in range(120):
        norms = noisy(rng)
        norms[0] = 50.0 * norms[0] if step >= 60 else None
        scores.append(stream.feed(norms).spike_score.item())
    assert max(scores) < trends.ALARM_Z


def test_a_nan_leaves_no_trace():
    rng_a, rng_b = np.random.default_rng(6), np.random.default_rng(6)
    torch.manual_seed(0)
    clean = Stream()
    torch.manual_seed(0)
    hit = Stream()
    for step in range(60):
        a = clean.feed(noisy(rng_a))
        if step == 40:
            hit.feed([math.nan] * 6)
        b = hit.feed(noisy(rng_b))
        assert torch.equal(a.spike_score, b.spike_score)
        assert all(torch.equal(x, y) for x, y in zip(a.state, b.state, strict=True) if not x.isnan().any())


@pytest.mark.parametrize(("end", "no_progress"), [(0.5, False), (0.97, True), (1.2, True)])
def test_progress_is_ten_per_cent_of_the_start(end, no_progress):
    stream = Stream()
    seen = [stream.feed([1.0] * 6, 2.0 + (end - 1) * 2.0 * min(1, s / 100)) for s in range(300)][-1]
    assert bool(seen.no_progress) is no_progress
    assert seen.loss_start.item() == pytest.approx(2.0, rel=0.02)


def test_one_outlier_moves_the_loss_little():
    stream = Stream()
    rng = np.random.default_rng(7)
    for step in range(200):
        seen = stream.feed([1.0] * 6, 1e6 if step == 150 else 1.0 + 0.1 * rng.normal())
    assert seen.loss.item() == pytest.approx(1.0, abs=0.2)


def test_without_a_loss_no_progress_is_false():
    stream = Stream()
    for _ in range(40):
        seen = stream.feed([1.0] * 6, None)
    assert seen.loss.isnan()
    assert not seen.no_progress
    assert stream.feed([1.0] * 6, 3.0).loss.item() == pytest.approx(3.0)


def test_trends_must_be_set():
    stream = Stream()
    for weight in stream.weights.values():
        weight.grad = torch.ones(4, 4)
    stats = measure(stream.layout, weight_norms(stream.layout), stream.unknown)
    with pytest.raises(ValueError, match=r"stats\.trends must be set"):
        stats.trends  # noqa: B018


def columns_of_six():
    """Three layers each of two nets side by side, in one order of first use."""
    return Layout.of({f"w{i}": torch.ones(2, 2) for i in range(8)}, columns=[(0, 1, 2, 3), (4, 5, 6, 7)])


def test_nets_side_by_side_have_tilts_of_their_own():
    layout, live = columns_of_six(), torch.ones(8, dtype=torch.bool)
    profile = torch.tensor([0.0, 0.0, 0.0, 0.0, -5.0, -5.0, -5.0, -5.0])
    assert trends.depth_tilt(profile, live, layout).item() == 0
    profile = torch.tensor([0.0, 0.0, 0.0, 0.0, -6.0, -4.0, -2.0, 0.0])
    offset, tilt, worst = trends.offsets_and_tilt(profile, live, layout)
    assert tilt.item() == pytest.approx(6)
    assert worst.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert offset.tolist() == [0, 0, 0, 0, -2, 0, 2, 4]


def test_a_head_that_counts_little_does_not_make_its_trunk_explode():
    trunk = (0, 1, 2)
    layout = Layout.of({f"w{i}": torch.ones(2, 2) for i in range(5)}, columns=[(*trunk, 3), (*trunk, 4)])
    live, profile = torch.ones(5, dtype=torch.bool), torch.tensor([0.0, 0.0, 0.0, 0.0, -6.0])
    assert trends.depth_tilt(profile, live, layout).item() == pytest.approx(0)


def test_columns_without_enough_layers_have_no_tilt():
    layout = Layout.of({f"w{i}": torch.ones(2, 2) for i in range(6)}, columns=[(0, 1, 2), (3, 4, 5)])
    assert trends.depth_tilt(torch.arange(6.0), torch.ones(6, dtype=torch.bool), layout).isnan()


def cliff_of(profile, live=None, tiny=(), columns=()):
    layout = Layout.of({f"w{i}": torch.ones(2, 2) for i in range(len(profile))}, columns=columns)
    live = torch.tensor([True] * len(profile) if live is None else live)
    small = torch.tensor([i in tiny for i in range(len(profile))])
    return trends.find_cliff(torch.tensor(profile), live, layout, small)


@pytest.mark.parametrize("starved", [2, 5, 9])
def test_a_cliff_has_the_height_of_its_step(starved):
    found = cliff_of([-6.0] * starved + [0.0] * (10 - starved))
    assert found.height.item() == 6
    assert found.below.tolist() == [6.0] * starved + [0.0] * (10 - starved)


def test_an_odd_layer_neither_hides_nor_makes_a_cliff():
    assert cliff_of([-6.0, -6.0, 1.0, -6.0, -6.0, -6.0, 0.0]).height.item() == 6
    assert cliff_of([0.0, 0.0, -6.0, 0.0, 0.0, 0.0, 0.0]).height.item() == 0


def test_layers_that_rest_do_not_count():
    found = cliff_of([-6.0, -6.0, 9.0, -6.0, 0.0, 0.0], live=[True, True, False, True, True, True])
    assert found.height.item() == 6


def test_what_lies_before_a_layer_of_nearly_zero_is_no_cliff():
    assert cliff_of([-6.0, -6.0, -6.0, 0.0], tiny=[3]).height.item() == 0


def test_a_cliff_may_stand_in_any_column():
    profile = [0.0, 0.0, 0.0, -6.0, -6.0, 0.0]
    assert cliff_of(profile, columns=[(0, 1, 2), (3, 4, 5)]).height.item() == 6
    assert cliff_of([-6.0, -6.0, -6.0, 0.0, 0.0, 0.0], columns=[(0, 1, 2), (3, 4, 5)]).height.item() == 0


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_few_layers_have_no_cliff(layers):
    assert cliff_of([float(i) for i in range(layers)] + [0.0] * (not layers)).height.item() == -math.inf


@pytest.mark.parametrize(
    ("start", "best", "now", "relapsed"),
    [
        (2.0, 0.8, 2.4, True),
        (2.0, 0.8, 2.1, False),  # not above its start by a tenth
        (2.0, 1.34, 2.4, False),  # it had not fallen by half, as in a net that wavers
        (2.0, math.inf, 2.4, False),
        (-2.0, -4.0, -1.0, False),
    ],
)
def test_a_loss_that_had_fallen_by_half_and_rose(start, best, now, relapsed):
    seen = SimpleNamespace(
        loss_start=torch.tensor(start),
        before=SimpleNamespace(best_loss=torch.tensor(best)),
        state=SimpleNamespace(loss=torch.tensor(now)),
    )
    assert bool(trends.Trends.fell_and_rose.func(seen)) == relapsed


@pytest.mark.parametrize(
    ("quantity", "start", "first", "expected"),
    [
        ("no_progress", 5.0, 1.0, True),
        ("no_progress", 5.0, 5.0, False),
        ("plateau", 5.0, 1.0, True),
        ("plateau", 5.0, 5.0, False),
        ("falling", 5.0, 1.0, False),
        ("falling", 5.0, 5.0, True),
    ],
)
def test_the_first_loss_is_the_start_if_it_was_lower(quantity, start, first, expected):
    """It is of weights that no bad step has changed."""
    slow = 2.0 if quantity == "falling" else 0.95
    state = {"loss": 0.95, "slow_loss": slow, "loss_spread": 0.1, "loss_steps": 100.0}
    seen = SimpleNamespace(
        loss_start=torch.tensor(start),
        first_loss=torch.tensor(first),
        state=SimpleNamespace(**{name: torch.tensor(value) for name, value in state.items()}),
    )
    assert bool(vars(trends.Trends)[quantity].func(seen)) == expected


@given(
    layers=st.integers(1, 40),
    count=st.integers(1, 7),
    cut=st.integers(0, 7),
    sigma=st.sampled_from([0.05, 0.3, 2.0]),
    zeros=st.sampled_from([0.0, 0.2]),
    without=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_steps_are_folded_in_together_to_the_bit(layers, count, cut, sigma, zeros, without, seed):
    """Whatever their norms and losses, and in however many parts."""
    rng, stream = np.random.default_rng(seed), Stream(layers)
    for _ in range(12):
        stream.feed(noisy(rng, layers), 1 + 0.1 * rng.normal())
    rows, one_by_one = [], stream.state
    for _ in range(count):
        norms = [0.0 if rng.random() < zeros else norm for norm in noisy(rng, layers, sigma)]
        loss = None if rng.random() < without else torch.tensor(float(1 + rng.normal()))
        for weight, norm in zip(stream.weights.values(), norms, strict=True):
            weight.grad = torch.full((4, 4), norm / 4)
        stats = measure(stream.layout, weight_norms(stream.layout), stream.unknown, loss).replace(elapsed=0)
        rows.append(stats.replace(gradients=()))
        one_by_one = trends.update(stats, one_by_one)[1]
    in_parts = stream.state
    for part in (rows[:cut], rows[cut:]):
        in_parts = trends.fold_in(part, in_parts) if part else in_parts
    for together in (trends.fold_in(rows, stream.state), in_parts):
        for name, ours, expected in zip(together._fields, together, one_by_one, strict=True):
            assert repr(ours.tolist()) == repr(expected.tolist()), name
