"""Laws for all detectors, then each one's own."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradguard.detectors import default_detectors
from lightning_gradguard.detectors.base import DetectorTraits, reading, traits_of
from lightning_gradguard.detectors.depth import DepthTilt, TimeTilt
from lightning_gradguard.detectors.explosion import Exploding, NonFinite, Spike
from lightning_gradguard.detectors.inactivity import DeadUnits, Disconnected, Underflow
from lightning_gradguard.detectors.updates import Stalled, UpdateRatio
from lightning_gradguard.engine.evaluate import GuardParts, evaluate, init_state
from lightning_gradguard.results import Fault
from lightning_gradguard.stats.grad_stats import measure
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.norms import weight_norms

DETECTORS = default_detectors()


class Stream:
    """Detectors on gradients that are set by hand.

    ``facts`` replaces measured values.
    """

    def __init__(self, *detectors, layers=6, device="cpu"):
        self.detectors = detectors
        self.weights = {f"w{i}": nn.Parameter(torch.ones(4, 4, device=device)) for i in range(layers)}
        self.layout = Layout.of(self.weights)
        self.updates = torch.full((layers,), 1e-3, device=device)
        self.states = None

    def feed(self, norms, loss=1.0, **facts):
        for weight, norm in zip(self.weights.values(), norms, strict=True):
            weight.grad = None if norm is None else torch.full_like(weight, norm / 4)
        loss = None if loss is None else torch.tensor(float(loss))
        stats = measure(self.layout, weight_norms(self.layout), self.updates, loss)
        stats = dataclasses.replace(stats, **facts)
        if self.states is None:
            self.states = init_state(stats, GuardParts.of(self.detectors, None))
        outcome, new = evaluate(stats, self.states, GuardParts.of(self.detectors, None))
        if stats.finite:
            self.states = new
        return outcome.readings


def healthy(rng, layers=6):
    return [math.exp(rng.normal(0, 0.2)) for _ in range(layers)]


@pytest.mark.parametrize("detector", DETECTORS, ids=repr)
class TestEveryDetector:
    def test_is_frozen_configuration_with_a_fault_and_measures(self, detector):
        assert dataclasses.is_dataclass(detector)
        assert detector == dataclasses.replace(detector)
        assert isinstance(detector.fault, Fault)
        assert all(detector.measures)

    def test_is_silent_on_a_healthy_stream(self, detector):
        rng, stream = np.random.default_rng(0), Stream(detector)
        assert not any(stream.feed(healthy(rng), 2 / (1 + s / 50))[0].raised for s in range(500))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_bad_step_leaves_no_trace(self, detector, bad):
        rng_a, rng_b = np.random.default_rng(1), np.random.default_rng(1)
        clean, hit = Stream(detector), Stream(detector)
        for step in range(60):
            if step == 40:
                hit.feed([1.0, bad, 1.0, 1.0, 1.0, 1.0])
            a, b = clean.feed(healthy(rng_a)), hit.feed(healthy(rng_b))
            for x, y in zip(a[0], b[0], strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)

    def test_reading_has_the_shapes_it_promises(self, detector):
        seen = Stream(detector).feed([1.0] * 6)[0]
        assert seen.score.shape == (6,)
        numbers = [getattr(seen, field) for field in seen._fields if field != "score"]
        assert all(number.shape == () for number in numbers if number is not None)
        assert None not in numbers[:-1]
        assert seen.near is None or seen.near.dtype == torch.bool
        assert not (seen.raised & seen.cleared)

    def test_reads_nothing_on_the_host(self, detector):
        weights = {f"w{i}": nn.Parameter(torch.ones(4, 4, device="meta")) for i in range(6)}
        for weight in weights.values():
            weight.grad = torch.ones(4, 4, device="meta")
        layout = Layout.of(weights)
        updates = torch.full((6,), 1.0, device="meta")
        stats = measure(layout, weight_norms(layout), updates, torch.tensor(1.0, device="meta"))
        states = init_state(stats, GuardParts.of((detector,), None))
        for _ in range(2):
            _, states = evaluate(stats, states, GuardParts.of((detector,), None))

    @pytest.mark.parametrize("norms", [[0.0] * 6, [None, 1.0, None, 2.0, 1.0, 1.0], [1e-30] * 6, [1e18] * 6])
    def test_odd_gradients_raise_no_alarm(self, detector, norms):
        if isinstance(detector, Stalled) and norms[0] is not None and norms[0] < 1e-20:
            # Without any gradient (norms whose squares are below float32 are none), and with a high loss, it is right.
            norms = [*norms[:-1], 1.0]
        stream = Stream(detector)
        assert not any(stream.feed(norms)[0].raised for _ in range(60))

    def test_few_layers_do_not_matter(self, detector):
        stream = Stream(detector, layers=1)
        assert not any(stream.feed([1.0])[0].raised for _ in range(60))


def test_nonfinite_names_the_tensors_in_backward_order():
    seen = Stream(NonFinite()).feed([1.0, math.nan, 1.0, math.inf, 1.0, 1.0])[0]
    assert seen.raised
    assert seen.value == 2
    assert torch.topk(seen.score, 2).indices.tolist() == [3, 1]
    assert torch.isneginf(seen.score).sum() == 4


def vanishing(decades, layers=6):
    return [10 ** (-decades * (1 - i / (layers - 1))) for i in range(layers)]


def test_tilt_raises_from_step_thirty_on_without_progress():
    stream = Stream(DepthTilt())
    raised = [bool(stream.feed(vanishing(8))[0].raised) for _ in range(60)]
    assert raised.index(True) == 29
    assert all(raised[29:])


def test_tilt_names_the_first_layers_and_its_decades():
    stream = Stream(DepthTilt())
    seen = [stream.feed(vanishing(8))[0] for _ in range(40)][-1]
    assert torch.topk(seen.score, 3).indices.tolist() == [0, 1, 2]
    assert seen.value.item() == pytest.approx(8, abs=0.3)


def test_tilt_is_silent_while_the_loss_falls():
    stream = Stream(DepthTilt())
    assert not any(stream.feed(vanishing(4), loss=2 * 0.98**s)[0].raised for s in range(100))


def test_a_steep_tilt_is_a_warning_even_while_the_loss_falls():
    stream = Stream(DepthTilt())
    stream.updates = torch.full((6,), 1e-9)
    seen = [stream.feed(vanishing(8), loss=2 * 0.98**s)[0] for s in range(100)][-1]
    assert seen.raised
    assert seen.ceiling == 1


@pytest.mark.parametrize(("steep", "raised"), [(8, True), (4, False)])
def test_a_steep_tilt_of_few_layers_counts_only_without_progress(steep, raised):
    """The other net beside them learns in their place."""
    stream = Stream(DepthTilt(), layers=12)
    stream.layout = Layout.of(stream.weights, columns=[tuple(range(steep)), tuple(range(steep, 12))])
    norms = [*vanishing(8, steep), *[1.0] * (12 - steep)]
    seen = [stream.feed(norms, loss=2 * 0.98**s)[0] for s in range(60)]
    assert seen[-1].raised == raised
    stuck = Stream(DepthTilt(), layers=12)
    stuck.layout = stream.layout
    assert [stuck.feed(norms)[0].raised for _ in range(40)][-1]


def test_a_tilt_counts_on_a_plateau_below_the_start():
    stream = Stream(DepthTilt())
    losses = [3.0] * 5 + [2.0] * 250
    assert [stream.feed(vanishing(4), loss)[0].raised for loss in losses][-1]
    converged = Stream(DepthTilt())
    losses = [3.0] * 5 + [0.5] * 250
    assert not any(converged.feed(vanishing(4), loss)[0].raised for loss in losses)


def test_tilt_is_a_warning_while_the_layers_still_move():
    stream = Stream(DepthTilt())
    assert [stream.feed(vanishing(5))[0] for _ in range(40)][-1].ceiling == 1
    stream.updates = torch.full((6,), 1e-8)
    assert stream.feed(vanishing(5))[0].ceiling == 2


def test_a_tilt_of_twice_the_limit_is_critical_even_if_the_layers_move():
    stream = Stream(DepthTilt())
    assert [stream.feed(vanishing(8))[0] for _ in range(40)][-1].ceiling == 2


@pytest.mark.parametrize("starved", [2, 3, 5])
def test_a_cliff_is_found_wherever_it_stands(starved):
    stream = Stream(DepthTilt())
    norms = [1e-5] * starved + [1.0] * (6 - starved)
    seen = [stream.feed(norms)[0] for _ in range(30)]
    assert [bool(r.raised) for r in seen].index(True) == 29
    assert seen[-1].value.item() >= 4.9
    assert torch.argmax(seen[-1].score) < starved


def test_a_cliff_counts_only_while_the_loss_makes_no_progress():
    stream = Stream(DepthTilt())
    losses = [3.0 * 0.97**i for i in range(60)]
    assert not any(stream.feed([1e-5] * 5 + [1.0], loss)[0].raised for loss in losses)


def starving(decades, at, layers=6):
    return [10**-decades if i == at else 1.0 for i in range(layers)]


@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_single_layer_far_below_the_middle_is_named(at):
    stream = Stream(DepthTilt())
    stream.updates[at] = 1e-7
    seen = [stream.feed(starving(4, at))[0] for _ in range(110)]
    assert [bool(r.raised) for r in seen].index(True) == 99
    assert seen[-1].measure == 1
    assert seen[-1].value.item() == pytest.approx(4, abs=0.1)
    assert torch.argmax(seen[-1].score) == at


def test_a_single_layer_may_be_low_while_the_loss_falls():
    stream = Stream(DepthTilt())
    stream.updates[2] = 1e-7
    assert not any(stream.feed(starving(6, 2), loss=2 * 0.98**s)[0].raised for s in range(150))
    milder = Stream(DepthTilt())
    milder.updates[2] = 1e-7
    assert not any(milder.feed(starving(2, 2))[0].raised for _ in range(150))


def test_a_single_low_layer_that_is_updated_as_the_others_are_is_healthy():
    stream = Stream(DepthTilt())
    assert not any(stream.feed(starving(6, 2))[0].raised for _ in range(150))


def test_the_last_layers_of_a_net_that_explodes_are_not_vanishing():
    stream = Stream(DepthTilt())
    stream.updates[5] = 1e-7
    assert not any(stream.feed(vanishing(-8))[0].raised for _ in range(150))


def dropping(decades, layers=6):
    return [10**-decades] * (layers - 1) + [1.0]


@pytest.mark.parametrize("profile", [vanishing, dropping, lambda decades: starving(decades, 2)])
@pytest.mark.parametrize(("decades", "raised", "cleared"), [(3.5, 1, 0), (2.75, 0, 0), (2.25, 0, 1)])
def test_vanishing_is_over_half_a_decade_below_its_limit(profile, decades, raised, cleared):
    stream = Stream(DepthTilt())
    stream.updates[2] = 1e-7
    seen = [stream.feed(profile(decades))[0] for _ in range(110)][-1]
    assert (seen.raised, seen.cleared) == (raised, cleared)


def test_vanishing_is_over_while_the_loss_falls_unless_it_is_steep():
    for decades, cleared in ((4, True), (8, False)):
        stream = Stream(DepthTilt())
        seen = [stream.feed(vanishing(decades), loss=2 * 0.98**s)[0] for s in range(100)][-1]
        assert seen.cleared == cleared


@pytest.mark.parametrize(("decades", "raised", "cleared"), [(2.2, 1, 0), (1.5, 0, 0), (1.0, 0, 1)])
def test_an_explosion_by_tilt_is_over_half_a_decade_above_its_limit(decades, raised, cleared):
    stream = Stream(Exploding())
    seen = [stream.feed(vanishing(-decades))[0] for _ in range(40)][-1]
    assert (seen.raised, seen.cleared) == (raised, cleared)


@pytest.mark.parametrize(
    ("losses", "raised", "cleared"),
    [
        ([1.0] * 5 + [3.3] * 200, 1, 0),
        ([1.0] * 5 + [2.7] * 200, 0, 0),
        ([1.0] * 5 + [2.1] * 200, 0, 1),
        ([1.0] * 5 + [0.2] * 100 + [1.3] * 200, 0, 0),
        ([1.0] * 5 + [0.2] * 100 + [1.0] * 200, 0, 1),
    ],
)
def test_an_explosion_by_loss_is_over_when_the_loss_is_not_even_near(losses, raised, cleared):
    stream, large, usual = Stream(Exploding()), torch.full((6,), 0.2), torch.full((6,), 1e-3)
    for loss in losses:
        seen = stream.feed([1.0] * 6, loss, updates=large if loss > 2 else usual)[0]
    assert (seen.raised, seen.cleared) == (raised, cleared)


def test_an_explosion_by_spikes_is_over_when_as_many_steps_were_none():
    rng, stream = np.random.default_rng(2), Stream(Exploding())
    seen = [stream.feed([n * (1000 if 100 <= s < 106 else 1) for n in healthy(rng)])[0] for s in range(115)]
    assert [bool(r.raised) for r in seen[100:109]] == [False] * 4 + [True] * 3 + [False] * 2
    assert [bool(r.cleared) for r in seen[99:]] == [True] + [False] * 11 + [True] * 4


def test_exploding_by_tilt():
    stream = Stream(Exploding())
    seen = [stream.feed(vanishing(-6))[0] for _ in range(40)][-1]
    assert seen.raised
    assert seen.measure == 0
    assert torch.argmax(seen.score) == 0


def test_exploding_by_tilt_from_step_fifteen_on_without_progress():
    stream = Stream(Exploding())
    raised = [bool(stream.feed(vanishing(-6))[0].raised) for _ in range(30)]
    assert raised.index(True) == 14
    learning = Stream(Exploding())
    assert not any(learning.feed(vanishing(-6), 0.9**s)[0].raised for s in range(100))


def test_exploding_by_repeated_spikes():
    rng, stream = np.random.default_rng(2), Stream(Exploding())
    raised = [
        bool(stream.feed([n * (1000 if s >= 100 else 1) for n in healthy(rng)])[0].raised) for s in range(110)
    ]
    assert raised.index(True) == 104


def test_exploding_by_loss():
    stream = Stream(Exploding())
    losses = [1.0] * 50 + [1.05**s for s in range(80)]
    assert not any(stream.feed([1.0] * 6, loss)[0].raised for loss in losses)
    stream = Stream(Exploding())
    stream.updates = torch.full((6,), 0.3)
    seen = [stream.feed([1.0] * 6, loss)[0] for loss in losses]
    first = next(i for i, r in enumerate(seen) if r.raised)
    assert seen[first].measure == 2
    assert seen[first].value > 3


def test_exploding_by_a_loss_without_a_lower_bound():
    stream = Stream(Exploding())
    seen = [stream.feed([1.1**s] * 6, 0.1 - 1.1**s)[0] for s in range(120)]
    assert seen[-1].raised
    assert seen[-1].measure == 2
    steady = Stream(Exploding())
    assert not any(steady.feed([1.0] * 6, 0.1 - 1.1**s)[0].raised for s in range(120))
    bounded = Stream(Exploding())
    assert not any(bounded.feed([1.1**s] * 6, 1 - 0.005 * s)[0].raised for s in range(120))


def test_single_spikes_do_not_add_up_to_an_explosion():
    rng, stream = np.random.default_rng(3), Stream(Exploding(), Spike())
    spikes = explosions = 0
    for step in range(400):
        exploding, spike = stream.feed(
            [n * (100 if step > 30 and step % 20 == 0 else 1) for n in healthy(rng)]
        )
        spikes += bool(spike.raised)
        explosions += bool(exploding.raised)
    assert spikes == 18
    assert explosions == 0


def test_a_small_change_in_a_deterministic_run_is_no_spike():
    stream = Stream(Spike())
    assert not any(stream.feed([2.0 if s == 80 else 1.0] * 6)[0].raised for s in range(100))
    assert stream.feed([10.0] * 6)[0].raised


def test_a_spike_after_convergence_to_zero_is_info():
    rng, stream = np.random.default_rng(5), Stream(Spike())
    for step in range(200):
        stream.feed([n * 10 ** -(step / 20) for n in healthy(rng)], loss=10 ** -(step / 10))
    assert stream.feed([1.0] * 6, loss=1e-9)[0].ceiling == 0
    assert stream.feed([100.0] * 6, loss=1e-9)[0].ceiling == 1


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (Spike, {"z": 0}, "z must be positive and finite, got 0"),
        (Spike, {"ratio": 1.0}, "ratio must be a finite number above 1, got 1.0"),
        (Exploding, {"tilt": 2.0}, "tilt must be negative and finite, got 2.0"),
        (Exploding, {"hot_steps": 0}, "hot_steps must be positive and finite, got 0"),
        (Exploding, {"loss_ratio": math.nan}, "loss_ratio must be"),
        (DepthTilt, {"limit": 2.0}, "limit must be a finite number above 2.5, got 2.0"),
        (DepthTilt, {"clear": -1.0}, "clear must be positive"),
        (DepthTilt, {"moving": math.inf}, "moving must be positive"),
        (TimeTilt, {"limit": 0}, "limit must be positive"),
        (Exploding, {"time_tilt": 1.0}, "time_tilt must be negative"),
        (DeadUnits, {"limit": 1.5}, "limit must be above 0 and at most 1, got 1.5"),
        (DeadUnits, {"steps": 0}, "steps must be positive and finite, got 0"),
        (Disconnected, {"steps": -1}, "steps must be"),
        (Underflow, {"limit": 0}, "limit must be above 0"),
        (UpdateRatio, {"limit": -0.1}, "limit must be positive"),
        (UpdateRatio, {"steps": 0}, "steps must be"),
        (Stalled, {"limit": math.nan}, "limit must be positive"),
        (Stalled, {"steps": 0}, "steps must be"),
    ],
)
def test_wrong_arguments(kind, arguments, words):
    with pytest.raises(ValueError, match=words):
        kind(**arguments)


@pytest.mark.parametrize("raised", [True, False])
def test_what_a_detector_leaves_out_of_its_reading(raised):
    stream = Stream()
    stream.feed([1.0] * 6)
    stats = measure(stream.layout, weight_norms(stream.layout), stream.updates, torch.tensor(1.0))
    seen = reading(stats, torch.tensor(raised), torch.tensor(2.0), 3.0)
    assert seen.cleared == (not raised)
    assert (seen.limit, seen.ceiling, seen.measure) == (3, 2, 0)
    assert torch.isneginf(seen.score).tolist() == [True] * 6


class Inherits(Spike):
    pass


class Declares(Spike):
    fast_path_safe = True


class Bare:
    pass


def test_traits_are_those_declared_and_defaults_for_the_rest():
    assert traits_of(Bare()) == DetectorTraits()
    assert not any(DetectorTraits())
    assert traits_of(Spike()) == DetectorTraits(event=True, fast_path_safe=True)
    assert traits_of(DepthTilt()) == DetectorTraits(
        slow=True, needs_loss=True, quantities=DepthTilt.quantities
    )
    assert all(traits_of(d).slow or traits_of(d).fast_path_safe for d in DETECTORS)


def test_only_the_own_class_of_a_detector_declares_it_safe_on_the_fast_path():
    assert traits_of(Inherits()) == DetectorTraits(event=True)
    assert traits_of(Declares()).fast_path_safe
    assert not traits_of(Spike(ratio=2.5)).fast_path_safe


def mask(*indices, layers=6):
    return torch.tensor([i in indices for i in range(layers)])


def test_disconnected_after_forty_steps_without_a_gradient():
    stream = Stream(Disconnected())
    seen = [stream.feed([None, None, 1.0, 1.0, 1.0, 1.0], cut=mask(0, 1))[0] for _ in range(50)]
    assert [bool(r.raised) for r in seen].index(True) == 39
    assert seen[-1].value == 2
    assert seen[-1].ceiling == 2
    assert torch.topk(seen[-1].score, 2).indices.tolist() == [1, 0]


def test_a_part_that_is_used_now_and_then_is_not_disconnected():
    stream = Stream(Disconnected())
    for step in range(200):
        norm = 1.0 if step % 30 == 0 else None
        assert not stream.feed([norm, 1.0, 1.0, 1.0, 1.0, 1.0], cut=mask(0))[0].raised


def test_a_part_that_once_had_a_gradient_is_never_counted_again():
    stream = Stream(Disconnected())
    for step in range(150):
        norm = 1.0 if step == 20 else None
        assert not stream.feed([norm, 1.0, 1.0, 1.0, 1.0, 1.0], cut=mask(0))[0].raised


def test_an_unused_part_is_info():
    stream = Stream(Disconnected())
    seen = [stream.feed([None, 1.0, 1.0, 1.0, 1.0, 1.0], unused=mask(0))[0] for _ in range(50)][-1]
    assert seen.raised
    assert seen.ceiling == 0
    assert seen.measure == 1


def test_a_bias_alone_may_have_no_path():
    stream = Stream(Disconnected())
    stream.weights["w5"] = nn.Parameter(torch.ones(16))
    stream.layout = Layout.of(stream.weights)
    seen = [stream.feed([1.0] * 5 + [None], cut=mask(5))[0] for _ in range(50)][-1]
    assert seen.raised
    assert seen.ceiling == 0


def test_layers_that_get_nothing_are_dead_although_those_behind_them_learn():
    stream = Stream(DeadUnits())
    norms, shares = [0.0] * 4 + [1.0] * 2, torch.tensor([1.0] * 4 + [0.0] * 2)
    seen = [stream.feed(norms, 0.97**s, dead=shares)[0] for s in range(40)]
    assert [bool(r.raised) for r in seen].index(True) == 19
    assert torch.argmax(seen[-1].score) == 3
    middle = Stream(DeadUnits())
    norms, shares = [1.0, 0.0] + [1.0] * 4, torch.tensor([0.0, 1.0] + [0.0] * 4)
    assert not any(middle.feed(norms, 0.97**s, dead=shares)[0].raised for s in range(40))


def test_dead_units_need_ninety_per_cent_for_twenty_steps_and_no_progress():
    shares = torch.tensor([0.0, 0.95, 0.95, 0.5, 0.0, 0.0])
    stream = Stream(DeadUnits())
    seen = [stream.feed([1.0] * 6, dead=shares)[0] for _ in range(30)]
    assert [bool(r.raised) for r in seen].index(True) == 19
    assert torch.topk(seen[-1].score, 2).indices.tolist() == [2, 1]
    learning = Stream(DeadUnits())
    assert not any(learning.feed([1.0] * 6, 0.97**s, dead=shares)[0].raised for s in range(60))
    half = Stream(DeadUnits())
    assert not any(half.feed([1.0] * 6, dead=shares / 2)[0].raised for s in range(60))


def test_outputs_that_the_loss_does_not_use_are_not_dead():
    stream = Stream(DeadUnits())
    shares = torch.tensor([0.0] * 5 + [0.95])
    assert not any(stream.feed([1.0] * 6, dead=shares)[0].raised for _ in range(60))
    assert [stream.feed([1.0] * 5 + [0.0], dead=shares)[0].raised for _ in range(30)][-1]


def test_an_optimizer_of_another_model_is_more_than_unused_tensors():
    stream = Stream(Disconnected())
    seen = [stream.feed([None] * 6, unused=mask(*range(6)))[0] for _ in range(50)][-1]
    assert seen.raised
    assert seen.ceiling == 2


def with_biases(*detectors):
    """Return a stream of three layers with a bias each."""
    stream = Stream(*detectors)
    names = ("a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias")
    stream.weights = dict(zip(names, stream.weights.values(), strict=True))
    for name in names[1::2]:
        stream.weights[name] = nn.Parameter(torch.ones(16))
    stream.layout = Layout.of(stream.weights)
    return stream


@pytest.mark.parametrize("detector", [DeadUnits(), Disconnected()], ids=repr)
@pytest.mark.parametrize("first", [0, 2], ids=["at the input", "in the middle"])
def test_a_live_bias_acquits_a_layer_whose_input_is_zero(detector, first):
    stream = with_biases(detector)
    norms, shares = [1.0] * 6, torch.zeros(6)
    norms[first], shares[first] = 0.0, 1.0
    ran = torch.ones(6, dtype=torch.bool)
    seen = [stream.feed(norms, dead=shares, ran=ran)[0] for _ in range(50)][-1]
    assert not (seen.raised and seen.ceiling > 0)
    if isinstance(detector, Disconnected):
        assert detector.measures[int(seen.measure)] == "layers whose input is exactly zero"
        assert seen.value == 1


def test_a_dead_bias_acquits_nothing():
    stream = with_biases(DeadUnits())
    norms, shares = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0], torch.tensor([1.0] + [0.0] * 5)
    assert [stream.feed(norms, dead=shares)[0].raised for _ in range(30)][-1]


def test_a_layer_without_a_bias_is_acquitted_if_its_input_was_seen_to_be_zero():
    shares = torch.tensor([1.0] + [0.0] * 5)
    stream, blind = Stream(DeadUnits()), Stream(DeadUnits())
    assert not any(stream.feed([0.0] + [1.0] * 5, dead=shares, hollow=mask(0))[0].raised for _ in range(40))
    assert [blind.feed([0.0] + [1.0] * 5, dead=shares)[0].raised for _ in range(40)][-1]


def test_a_softmax_over_one_element_is_info():
    shares = torch.tensor([0.0, 1.0] + [0.0] * 4)
    stream = Stream(DeadUnits(), Disconnected())
    readings = [stream.feed([1.0, 0.0] + [1.0] * 4, dead=shares, constant=mask(1)) for _ in range(50)]
    assert not any(dead.raised for dead, _ in readings)
    info = readings[-1][1]
    assert info.raised
    assert info.ceiling == 0
    assert Disconnected.measures[int(info.measure)].startswith("tensors behind a softmax")


def test_a_result_that_the_loss_does_not_use_is_info():
    stream = Stream(Disconnected())
    facts = {"cut": mask(4, 5), "idle": mask(4, 5)}
    seen = [stream.feed([1.0] * 4 + [None] * 2, **facts)[0] for _ in range(50)][-1]
    assert seen.raised
    assert seen.ceiling == 0
    assert seen.value == 2
    assert (
        Disconnected.measures[int(seen.measure)]
        == "tensors whose result the loss does not use, or takes as a target"
    )


def test_a_cut_outweighs_what_is_not_used():
    stream = Stream(Disconnected())
    facts = {"cut": mask(0, 5), "idle": mask(5), "unused": mask(4)}
    seen = [stream.feed([None] + [1.0] * 3 + [None] * 2, **facts)[0] for _ in range(50)][-1]
    assert seen.ceiling == 2
    assert seen.value == 1
    assert torch.topk(seen.score, 1).indices.tolist() == [0]


def test_a_zero_gradient_is_not_a_missing_path():
    stream = Stream(Disconnected())
    ran = torch.ones(6, dtype=torch.bool)
    seen = [stream.feed([0.0, 0.0] + [1.0] * 4, 0.97**s, ran=ran)[0] for s in range(50)][-1]
    assert seen.ceiling == 2
    assert "exactly zero" in Disconnected.measures[int(seen.measure)]


def test_a_nonfinite_loss_is_a_measure_of_its_own():
    seen = Stream(NonFinite()).feed([1.0] * 6, math.nan)[0]
    assert (seen.raised, seen.measure, seen.value) == (True, 1, 1)


def test_underflow_is_measured_at_the_output_layer():
    early, late = torch.tensor([1.0] * 5 + [0.2]), torch.tensor([0.0] * 5 + [1.0])
    stream = Stream(Underflow())
    assert not any(stream.feed([1.0] * 6, lost=early)[0].raised for _ in range(30))
    raised = [bool(stream.feed([1.0] * 6, lost=late)[0].raised) for _ in range(12)]
    assert raised.index(True) == 9
    solved = Stream(Underflow())
    assert not any(solved.feed([1.0] * 6, 0.0, lost=late)[0].raised for _ in range(30))


def test_oversized_updates_must_last():
    large = torch.tensor([1e-3] * 5 + [0.5])
    stream = Stream(UpdateRatio())
    raised = [bool(stream.feed([1.0] * 6, updates=large, sampled_steps=1)[0].raised) for _ in range(60)]
    assert raised.index(True) == 20
    first = Stream(UpdateRatio())
    for step in range(40):
        facts = {
            "updates": large if step < 3 else large / 10,
            "sampled_steps": 1 if step < 8 else 8 * (step % 8 == 0),
        }
        assert not first.feed([1.0] * 6, **facts)[0].raised


def test_oversized_updates_of_normalised_layers_count_from_the_last_of_the_steps_on():
    stream, facts = Stream(UpdateRatio()), {"sampled_steps": 1, "normalised": mask(*range(6))}
    large, usual = torch.full((6,), 0.5), torch.full((6,), 1e-3)
    raised = [bool(stream.feed([1.0] * 6, updates=large, **facts)[0].raised) for _ in range(30)]
    assert raised.index(True) == 20
    # Their direction alone matters, and it recovers.
    assert not stream.feed([1.0] * 6, updates=usual, **facts)[0].raised


def test_large_updates_are_remembered_for_a_hundred_steps_however_rare_the_evaluations_are():
    stream, large, usual = Stream(UpdateRatio()), torch.full((6,), 0.5), torch.full((6,), 1e-3)
    for _ in range(4):
        seen = stream.feed([1.0] * 6, None, updates=large, sampled_steps=1)[0]
    assert seen.raised
    raised = [bool(stream.feed([1.0] * 6, None, updates=usual, elapsed=8)[0].raised) for _ in range(20)]
    assert raised == [True] * 12 + [False] * 8


def test_large_updates_are_healthy_while_the_loss_falls():
    stream = Stream(UpdateRatio())
    large = torch.full((6,), 0.5)
    seen = [stream.feed([1.0] * 6, 0.9**s, updates=large, sampled_steps=1)[0] for s in range(60)]
    assert not any(r.raised for r in seen[20:])


def test_oversized_updates_are_over_when_the_layer_stops_moving():
    stream = Stream(UpdateRatio())
    large, frozen = torch.full((6,), 0.5), torch.full((6,), 1e-9)
    seen = [
        stream.feed([1.0] * 6, updates=large if s < 10 else frozen, sampled_steps=1)[0] for s in range(60)
    ]
    assert not any(r.raised for r in seen)
    assert seen[-1].cleared


def test_large_updates_during_progress_do_not_count_on_a_later_plateau():
    stream = Stream(UpdateRatio())
    large, usual = torch.full((6,), 0.5), torch.full((6,), 1e-3)
    for step in range(100):
        stream.feed([1.0] * 6, 0.95**step, updates=large, sampled_steps=1)
    later = [stream.feed([1.0] * 6, 1.0, updates=usual, sampled_steps=1)[0] for _ in range(12)]
    assert not any(r.raised for r in later)


def test_a_weight_that_begins_at_zero_may_grow():
    stream = Stream(UpdateRatio())
    with torch.no_grad():
        stream.weights["w5"].zero_()
    growing = [torch.tensor([1e-3] * 5 + [1 / (s + 1)]) for s in range(100)]
    assert not any(stream.feed([1.0] * 6, updates=u, sampled_steps=1)[0].raised for u in growing)
    assert stream.states.detectors[0].solid.tolist() == [True] * 5 + [False]


def test_large_updates_are_remembered_for_a_while():
    large, usual = torch.full((6,), 0.5), torch.full((6,), 1e-3)
    stream = Stream(UpdateRatio())
    seen = [stream.feed([1.0] * 6, updates=large if s < 5 else usual, sampled_steps=1)[0] for s in range(300)]
    assert seen[25].raised
    assert seen[-1].raised  # the loss never moved, and what ruined it is known


def test_stalled_unless_the_learning_rate_is_low():
    stream = Stream(Stalled())
    still = torch.full((6,), 1e-9)
    raised = [bool(stream.feed([1.0] * 6, updates=still)[0].raised) for _ in range(60)]
    assert raised.index(True) == 29
    assert not stream.feed([1.0] * 6, updates=still, rest=1.0)[0].raised
    assert stream.feed([1.0] * 6, updates=still, rest=3.0)[0].raised  # a schedule that has ended
    assert not stream.feed([1.0] * 6, updates=still * 1e4)[0].raised


@pytest.mark.parametrize(("scale", "norm", "found"), [(65536.0, 1 / 65536, True), (10.0, 1.0, False)])
def test_gradients_that_were_clipped_before_they_were_unscaled(scale, norm, found):
    """A norm that is itself a short number was clipped after that, which is as it should be."""
    stream = Stream(Stalled())
    norms, scaled = [norm / math.sqrt(6)] * 6, {"loss_scale": torch.tensor(scale)}
    seen = [stream.feed(norms, **scaled)[0] for _ in range(40)][-1]
    assert seen.raised == found
    assert seen.measure == (2 if found else 0)


def test_a_converged_net_that_moves_now_and_then_has_not_stalled():
    stream = Stream(Stalled())
    for step in range(200):
        ratio = 1e-7 if step // 8 % 3 else 1e-5
        assert not stream.feed([1.0] * 6, updates=torch.full((6,), ratio))[0].raised


def test_most_layers_may_stand_still_while_one_moves():
    stream = Stream(Stalled())
    updates = torch.tensor([1e-9] * 5 + [1e-3])
    assert not any(stream.feed([1.0] * 6, updates=updates)[0].raised for _ in range(60))


def test_gradients_that_grow_over_a_sequence_explode():
    stream = Stream(Exploding())
    unknown, growing = torch.tensor(math.nan), torch.tensor(-5.0)
    seen = stream.feed([1.0] * 6, time_tilt=growing, recurrent=mask(2))[0]
    assert seen.raised
    assert seen.measure == 3
    assert seen.value == -5
    assert seen.score.argmax() == 2
    assert stream.feed([1.0] * 6, time_tilt=unknown)[0].raised
    assert not stream.feed([1.0] * 6, time_tilt=torch.tensor(-1.0))[0].raised
    learning = Stream(Exploding())
    losses = [3 * 0.95**i for i in range(60)]
    assert not [learning.feed([1.0] * 6, loss, time_tilt=growing)[0].raised for loss in losses][-1]


def test_time_tilt_keeps_the_newest_measurement():
    stream = Stream(TimeTilt())
    unknown, steep = torch.tensor(math.nan), torch.tensor(16.0)
    assert not stream.feed([1.0] * 6, time_tilt=unknown)[0].raised
    seen = stream.feed([1.0] * 6, time_tilt=steep, recurrent=mask(2))[0]
    assert seen.raised
    assert seen.score.argmax() == 2
    assert stream.feed([1.0] * 6, time_tilt=unknown)[0].raised
    assert not stream.feed([1.0] * 6, time_tilt=torch.tensor(3.0))[0].raised


@pytest.mark.parametrize(
    ("start", "now", "ratio", "found"),
    [
        (0.02, 0.4, 0.15, False),  # 3 % of a usual weight
        (0.0, 0.1, 0.9, False),
        (0.02, 0.4, 0.6, True),
        (0.02, 4.0, 0.15, True),
        (0.4, 0.4, 0.15, True),
    ],
)
def test_a_weight_that_began_small_counts_as_a_usual_one(start, now, ratio, found):
    stream = Stream(UpdateRatio())
    updates = torch.tensor([1e-3] * 5 + [ratio])
    first = stream.layout.zeros + 4
    for step in range(150):
        weights = first.clone()
        weights[5] = start if step == 0 else now  # a usual 4 x 4 weight has a norm of 2
        seen = stream.feed([1.0] * 6, updates=updates, weights=weights, sampled_steps=1)[0]
    assert bool(seen.raised) == found


FALLING = [53.0, 49, 45, 42, 36, 30, 25, 21, 17, 14]


@pytest.mark.parametrize(
    ("jump", "loss", "found"),
    [
        (FALLING, 0.05, False),
        (FALLING[:4] + [1.0] * 20 + FALLING, 0.3, False),
        ([5e3 * 0.8**i for i in range(14)], 0.1, False),
        (FALLING, 0.9, True),
        (FALLING, None, True),
        (FALLING[::-1], 0.05, True),
        ([50.0, 55] * 10, 0.05, True),
    ],
)
def test_a_jump_that_falls_while_the_loss_is_low_is_no_explosion(jump, loss, found):
    rng, stream = np.random.default_rng(0), Stream(Exploding())
    for step in range(100):
        low = None if loss is None else max(0.97**step, loss)
        stream.feed(healthy(rng), low)
    raised = []
    for j in jump:
        now = None if loss is None else loss * (1 if j == 1 else 1 + j / 10)
        raised.append(bool(stream.feed([j] * 6, now)[0].raised))
    assert any(raised) == found


@pytest.mark.parametrize(("rises", "found"), [(False, False), (True, True)])
def test_a_jump_whose_norm_falls_while_its_loss_rises_is_an_explosion(rises, found):
    rng, stream = np.random.default_rng(0), Stream(Exploding())
    for step in range(100):
        stream.feed(healthy(rng), max(0.97**step, 0.05))
    losses = [0.1 + 0.02 * i for i in range(len(FALLING))]
    raised = [
        bool(stream.feed([norm] * 6, loss)[0].raised)
        for norm, loss in zip(FALLING, losses if rises else losses[::-1], strict=True)
    ]
    assert any(raised) == found


def test_a_step_that_could_change_the_loss_as_much_as_it_is_is_forgotten_in_sixteen_others():
    stream, driven = Stream(Exploding()), []
    large, usual = torch.full((6,), 0.3), torch.full((6,), 1e-3)
    for step in range(3 + 48):
        stream.feed([1.0] * 6, updates=large if step < 3 else usual)
        driven.append(stream.states.detectors[0].driven.item())
    assert driven[:3] == [1, 2, 3]
    assert driven[18::16] == [2, 1, 0]


#: The first step ruined the weights: the loss of the untrained net is the first one, not the median of the first five.
RUINED = [1.0, *[5.0] * 4, *[1.2] * 120]


def test_no_update_is_healthy_because_the_first_one_raised_the_loss():
    stream, large = Stream(UpdateRatio()), torch.full((6,), 0.5)
    seen = [stream.feed([1.0] * 6, loss, updates=large, sampled_steps=1)[0] for loss in RUINED]
    assert seen[-1].raised


def test_a_loss_above_that_of_the_untrained_net_has_something_to_teach():
    stream = Stream(Stalled())
    seen = [stream.feed([0.0 if s % 5 == 0 else 1.0] * 6, loss)[0] for s, loss in enumerate(RUINED)]
    assert any(r.raised and r.measure == 3 for r in seen)


def test_a_sample_without_any_gradient_is_outdated_by_a_step_with_one():
    shares = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    for norms, found in (([0.0, 0.0, 1, 1, 1, 1], True), ([1.0] * 6, False)):
        stream = Stream(DeadUnits())
        for _ in range(60):
            (seen,) = stream.feed(norms, dead=shares)
        assert bool(seen.raised) == found


@pytest.mark.parametrize(("share", "found"), [(0.97, False), (1.0, True)])
def test_units_that_a_selection_leaves_out_are_not_dead(share, found):
    shares = torch.tensor([share, 0.0, 0.0, 0.0, 0.0, 0.0])
    selected = torch.tensor([True] + [False] * 5)
    stream = Stream(DeadUnits())
    for _ in range(60):
        (seen,) = stream.feed([0.0 if share == 1 else 1.0, 1, 1, 1, 1, 1], dead=shares, selected=selected)
    assert bool(seen.raised) == found


def test_steps_without_any_gradient_after_a_usual_one_make_it_no_spike():
    stream = Stream(Spike())
    for step in range(20):
        (seen,) = stream.feed(
            [1.0] * 6 if step in (4, 12) else [0.0] * 6, loss=1.0 if step in (4, 12) else 0.0
        )
        assert not bool(seen.raised)


@pytest.mark.parametrize(("loss", "found"), [(1.0, True), (0.0, False)])
def test_a_batch_with_a_loss_of_nothing_has_nothing_to_teach(loss, found):
    stream = Stream(Stalled())
    for step in range(80):
        empty = step % 3 == 0
        (seen,) = stream.feed([0.0 if empty else 1.0] * 6, loss=loss if empty else 1.0)
    assert bool(seen.raised) == found
