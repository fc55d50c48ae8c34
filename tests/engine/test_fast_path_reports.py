"""Reports of accepted steps are like any other; a guard may be copied, saved or changed while steps are deferred."""

import copy
import dataclasses
import gc
import io
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradguard import Guard, NormClip, SpikeClip, SteadyClip
from lightning_gradguard.detectors import default_detectors
from lightning_gradguard.detectors.base import NoState, reading
from lightning_gradguard.detectors.explosion import Spike
from lightning_gradguard.results import Fault, Report

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

TENSORS, FIRST = 4, 33


class Hand:
    """A guard over gradients set by hand, the same at each call.

    Args:
        judged: Whether each step is judged.
        kind: Class of the optimizer.
    """

    def __init__(self, judged=False, kind=torch.optim.SGD, **kwargs):
        self.weights = {f"w{i}": nn.Parameter(torch.ones(2, 2)) for i in range(TENSORS + 1)}
        kept = [w for n, w in self.weights.items() if n != "w4"]
        self.optimizer = kind(kept, lr=0.1)
        options = {"optimizer": self.optimizer, "clipper": SpikeClip(), **kwargs}
        self.guard = Guard(self.weights.items(), **options)
        self.guard.fast_path._is_able &= not judged

    def step(self, step, factor=1.0):
        norms = np.exp(np.random.default_rng(step).normal(0, 0.1, TENSORS + 1)) * factor
        for i, (weight, norm) in enumerate(zip(self.weights.values(), norms, strict=True)):
            with torch.no_grad():
                weight.fill_(1 + 1e-3 * (step % (7 + i)))
            weight.grad = torch.full_like(weight, norm / 2)
        self.weights["w2"].grad = None
        return self.guard.step(loss=3 / (1 + 0.01 * step))

    def go(self, begin, end):
        return [self.step(step) for step in range(begin, end)]


def same(a, b):
    """Return True if two nested values are equal to the bit, where NaN equals NaN."""
    if isinstance(a, torch.Tensor | np.ndarray):
        return repr(a.tolist()) == repr(b.tolist())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def values(reports):
    return [dataclasses.asdict(report) for report in reports]


def results(hand):
    """Return all results of a guard, except what it may know a few steps late."""
    guard = hand.guard
    kept = (
        guard.state,
        guard.findings,
        guard.counts,
        guard.fault_tracker.state_dict(),
        guard.history.table(),
    )
    return [*kept, guard.tracker.schedule.state_dict()]


#: Clips nothing on ordinary steps, and learns later; clips them, and is asked at once.
each_way = pytest.mark.parametrize("clipper", [SpikeClip(), SteadyClip()], ids=["later", "at once"])


@pytest.fixture
def quiet():
    """Return the report of a deferred step, and the same report with every field."""
    hands = Hand(), Hand(judged=True)
    reports = [hand.go(0, FIRST + 4)[-1] for hand in hands]
    assert len(hands[0].guard.fast_path.deferred) == 3
    return hands[0], *reports


def test_a_report_works_out_deferred_fields_on_request(quiet):
    hand, report, like = quiet
    assert "threshold" not in vars(report)
    assert "norms" not in vars(report)
    assert list(report.norms) == ["w0", "w1", "w3"]
    assert report.norms == like.norms
    assert hand.guard.fast_path.deferred
    assert report.threshold == like.threshold
    assert not hand.guard.fast_path.deferred
    with pytest.raises(AttributeError, match="'Report' object has no attribute 'treshold'"):
        report.treshold  # noqa: B018
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.step = 1


LOOKS = {
    "==": lambda report: report == dataclasses.replace(report),
    "repr": repr,
    "asdict": dataclasses.asdict,
    "astuple": dataclasses.astuple,
    "replace": lambda report: dataclasses.asdict(dataclasses.replace(report, skip=True)),
    "copy": lambda report: dataclasses.asdict(copy.copy(report)),
    "deepcopy": lambda report: dataclasses.asdict(copy.deepcopy(report)),
    "pickle": lambda report: dataclasses.asdict(pickle.loads(pickle.dumps(report))),
}


@pytest.mark.parametrize(
    ("look", "when"),
    [
        pytest.param(
            look, when, marks=() if when == "at once" or look in ("==", "pickle") else pytest.mark.slow
        )
        for when in ("at once", "later", "alone")
        for look in LOOKS
    ],
)
def test_a_deferred_report_behaves_like_any_other(quiet, look, when):
    """At once, after further steps, and after its guard is gone."""
    hand, report, like = quiet
    if when == "later":
        hand.go(FIRST + 4, FIRST + 20)
    if when == "alone":
        del hand
        gc.collect()
    assert type(report) is type(like) is Report
    assert LOOKS[look](report) == LOOKS[look](like)
    assert report == like
    assert like == report


CLIPPED = {
    "SteadyClip, Adam": {"clipper": SteadyClip(), "kind": torch.optim.Adam},
    "SteadyClip, SGD": {"clipper": SteadyClip()},
    "NormClip": {"clipper": NormClip(1.0)},
}


@pytest.fixture(params=CLIPPED.values(), ids=CLIPPED)
def clipped(request):
    """Return the guard of a deferred step that was clipped, its report, and the same report with every field."""
    hand = Hand(**request.param)
    reports = hand.go(0, FIRST)
    while reports[-1].scale == 1 or len(hand.guard.fast_path.deferred) < 2:
        assert len(reports) < 100
        reports.append(hand.step(len(reports)))
    return hand, reports[-1], Hand(judged=True, **request.param).go(0, len(reports))[-1]


def test_what_a_clip_did_is_known_without_any_flush(clipped):
    hand, report, like = clipped
    waiting = len(hand.guard.fast_path.deferred)
    assert waiting > 0
    assert "threshold" not in vars(report)
    assert (report.scale, report.clipped_norm, report.total_norm) == (
        like.scale,
        like.clipped_norm,
        like.total_norm,
    )
    assert report.threshold == like.threshold
    assert 0 < report.scale < 1
    assert report.clipped_norm == pytest.approx(report.scale * report.total_norm)
    assert report.clipped_norm <= report.threshold * (1 + 1e-5)
    left = [w.grad.norm() for n, w in hand.weights.items() if w.grad is not None and n != "w4"]
    assert torch.stack(left).norm().item() == pytest.approx(report.clipped_norm, rel=1e-5)
    # Norms are those before.
    assert report.norms == like.norms
    assert math.hypot(*report.norms.values()) == pytest.approx(report.total_norm)
    assert len(hand.guard.fast_path.deferred) == waiting


@pytest.mark.parametrize("when", ["at once", "later", "alone"])
@pytest.mark.parametrize("look", LOOKS)
def test_a_report_of_a_clipped_step_behaves_like_any_other(clipped, look, when):
    hand, report, like = clipped
    if when == "later":
        hand.go(like.step + 1, like.step + 20)
    if when == "alone":
        del hand
        gc.collect()
    assert LOOKS[look](report) == LOOKS[look](like)
    assert report == like


@pytest.mark.parametrize("options", CLIPPED.values(), ids=CLIPPED)
def test_clipped_steps_are_counted_at_once(options):
    hand, plain, deferred = Hand(**options), Hand(judged=True, **options), 0
    for step in range(80):
        report = hand.step(step)
        plain.step(step)
        assert hand.guard.counts == plain.guard.counts
        deferred += bool(hand.guard.fast_path.deferred) and report.scale < 1
    assert deferred > 10
    scales = hand.guard.history.table()["scale"]
    assert hand.guard.counts["clipped"] == (scales < 1).sum()


@each_way
@pytest.mark.parametrize("later", [0, 3, 20])
@pytest.mark.parametrize("order", [1, -1])
def test_thresholds_may_be_asked_for_in_any_order(order, later, clipper):
    hands = Hand(clipper=clipper), Hand(judged=True, clipper=clipper)
    asked, expected = [hand.go(0, FIRST + 8) for hand in hands]
    hands[0].go(FIRST + 8, FIRST + 8 + later)
    asked = [report.threshold for report in asked[::order]][::order]
    assert asked == [report.threshold for report in expected]
    assert len(set(asked)) > 30


def test_without_a_clipper_there_is_no_threshold():
    reports = Hand(clipper=None).go(0, FIRST + 5)
    assert [report.threshold for report in reports] == [None] * len(reports)


def test_a_copy_of_a_report_keeps_no_guard(quiet):
    copied = copy.copy(quiet[1])
    assert vars(copied).keys() == {field.name for field in dataclasses.fields(Report)}


@each_way
def test_a_deferred_step_keeps_no_gradient(clipper):
    hand = Hand(clipper=clipper)
    hand.go(0, FIRST + 3)
    marks = [weakref.ref(w.grad) for w in hand.weights.values() if w.grad is not None]
    assert hand.guard.fast_path.deferred
    for weight in hand.weights.values():
        weight.grad = None
    assert [mark() for mark in marks] == [None] * TENSORS


def through_a_file(hand):
    buffer, second = io.BytesIO(), Hand()
    torch.save(hand.guard.state_dict(), buffer)
    buffer.seek(0)
    second.guard.load_state_dict(torch.load(buffer, weights_only=True))
    return second


def copied(hand):
    return copy.deepcopy(hand)


def pickled(hand):
    return pickle.loads(pickle.dumps(hand))


@pytest.mark.parametrize("way", [copied, pickled, through_a_file])
def test_a_guard_continues_exactly_from_any_step_of_a_window(way):
    plain = Hand(judged=True)
    expected = values(plain.go(0, FIRST + 30))
    states, hand = results(plain), Hand()
    hand.go(0, FIRST)
    for step in range(FIRST, FIRST + 9):
        second = way(hand)
        if step > FIRST:
            assert second.guard.fast_path.accepted == hand.guard.fast_path.accepted == step - FIRST - 1
        assert values(second.go(step, FIRST + 30)) == expected[step:]
        last = results(second)
        if way is through_a_file:  # history is not saved
            last[4] = states[4]
        assert same(last, states)
        hand.step(step)


@each_way
def test_asking_for_deferred_fields_changes_nothing(clipper):
    plain, hand = Hand(judged=True, clipper=clipper), Hand(clipper=clipper)
    expected, reports = values(plain.go(0, 80)), []
    for step in range(80):
        reports.append(hand.step(step))
        assert len(hand.guard.history) == step + 1
        assert hand.guard.history.table()["threshold"][-1] == np.float32(reports[-1].threshold)
    assert values(reports) == expected
    assert same(results(hand), results(plain))


@pytest.mark.parametrize("spoil", ["watch", "judge", "quiet", "states", "few states", "bounds", "sights"])
def test_a_bad_state_changes_nothing(spoil):
    hand, plain = Hand(), Hand(judged=True)
    hand.go(0, FIRST + 4)
    state = copy.deepcopy(hand.guard.state_dict())
    hand.go(FIRST + 4, FIRST + 6)
    state["steps"] = 9999
    if spoil == "few states":
        state["states"].pop()
    elif spoil == "bounds":
        state["quiet"]["_bounds"] = {"low": torch.ones(4)}
    elif spoil == "sights":
        state["sights"][0][1] = "no fault"
    else:
        state[spoil] = {}
    with pytest.raises(ValueError, match="state must be"):
        hand.guard.load_state_dict(state)
    expected = values(plain.go(0, FIRST + 20))
    assert hand.guard.steps == FIRST + 6
    assert values(hand.go(FIRST + 6, FIRST + 20)) == expected[FIRST + 6 :]
    assert same(results(hand), results(plain))


@pytest.mark.parametrize("options", [{"detectors": (Spike(ratio=2.0),)}, {"lag": 1}], ids=str)
def test_a_restored_state_does_not_open_the_fast_path_for_parts_that_need_full_evaluations(options):
    """Parts of the same classes may have other options, and the guard another lag."""
    first = Hand(detectors=(Spike(),))
    first.go(0, FIRST + 3)
    assert first.guard.fast_path._is_open
    second = Hand(**{"detectors": (Spike(),), **options})
    second.guard.load_state_dict(first.guard.state_dict())
    for step in range(FIRST + 3, FIRST + 12):
        second.step(step)
        assert not second.guard.fast_path.deferred
    assert second.guard.fast_path.accepted == 0


@each_way
@pytest.mark.parametrize("cut", [None, FIRST + 4, FIRST + 8])
def test_a_guard_that_rolls_back_has_no_deferred_steps(cut, clipper):
    ways = []
    for hand in (Hand(clipper=clipper), Hand(judged=True, clipper=clipper)):
        reports = hand.go(0, cut or 0)
        state = None if cut is None else hand.guard.state_dict()
        reports += hand.go(cut or 0, FIRST + 11)
        hand.guard.roll_back(state)
        assert not hand.guard.fast_path.deferred
        # A guard without a fast path still has none.
        reports += hand.go(FIRST + 11, FIRST + 50)
        ways.append((values(reports), results(hand)))
    assert same(*ways)


@each_way
def test_a_parameter_group_added_in_a_window_starts_the_statistics_anew(clipper):
    ways = []
    for hand in (Hand(clipper=clipper), Hand(judged=True, clipper=clipper)):
        reports = hand.go(0, FIRST + 4)
        hand.optimizer.add_param_group({"params": [hand.weights["w4"]]})
        assert bool(hand.guard.fast_path.deferred) == hand.guard.fast_path._is_able
        reports += hand.go(FIRST + 4, FIRST + 50)
        assert list(reports[-1].norms) == ["w0", "w1", "w3", "w4"]
        ways.append((values(reports), results(hand)))
    assert same(*ways)


class Raising:
    """A slow detector that fails on request."""

    fault, measures, slow, fails = Fault.STALLED, ("nothing",), True, False

    def init(self, stats):
        return NoState()

    def update(self, stats, state):
        if self.fails:
            raise OSError("no detector")
        return reading(stats, stats.total < 0, stats.total, 0.0), state


@each_way
@pytest.mark.parametrize("at", range(FIRST, FIRST + 9))
def test_a_step_that_fails_loses_no_deferred_steps(at, clipper):
    ways = []
    for judged in (False, True):
        detector = Raising()
        hand = Hand(judged, clipper=clipper, detectors=(*default_detectors(), detector))
        reports = hand.go(0, at)
        detector.fails = True
        # Asked at a full evaluation, which the step after a skipped one gets.
        hand.guard.tracker.schedule.alarm = True
        with pytest.raises(OSError, match="no detector"):
            hand.step(at, 1.01)
        detector.fails = hand.guard.tracker.schedule.alarm = False
        reports += hand.go(at + 1, at + 30)
        ways.append((values(reports), results(hand)))
        assert len(ways[-1][1][4]["step"]) == at + 29
    assert same(*ways)
    assert math.isfinite(ways[0][0][-1]["threshold"])
