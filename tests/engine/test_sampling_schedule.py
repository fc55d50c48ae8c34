"""Laws of when full evaluations are due, over all sequences of good and bad steps, losses, rates and what is shown."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.engine.sampling_schedule import (
    EAGER,
    LATER,
    REFRESH,
    SETTLED,
    SamplingSchedule,
    Shown,
)

#: What an unremarkable step shows.
SAME = Shown(
    full=False,
    norm=1.0,
    baseline=1.0,
    update=1e-3,
    tilt=0.5,
    loss_start=2.0,
    loss=1.9,
    flags=(False,) * 4,
    is_pending=False,
    is_present=False,
    has_exploded=False,
    has_news=False,
    silent=0,
)
#: Changes from one full evaluation to the next, each beyond what counts as the same.
CHANGES = {
    "norm rises": {"norm": 2.1, "baseline": 2.1},
    "norm falls": {"norm": 0.4, "baseline": 0.4},
    "updates grow": {"update": 5e-3},
    "updates are known no more": {"update": math.nan},
    "tilt": {"tilt": 1.5},
    "loss rises": {"loss": 2.3},
    "a fault": {"flags": (True, False, False, False)},
    "a fault is near": {"flags": (False, True, False, False), "is_pending": True},
    "news": {"has_news": True},
    "a tensor loses its gradient": {"silent": 1},
}
#: Changes that are none.
NOISE = {
    "norm": {"norm": 1.9, "baseline": 1.9},
    "update": {"update": 3e-3},
    "tilt": {"tilt": -0.2},
    "loss falls": {"loss": 0.01},
    "loss": {"loss": 2.05},
    "loss is unknown": {"loss": math.nan, "loss_start": math.nan},
}

STEP = st.tuples(
    st.sampled_from([True] * 7 + [False]),  # taken
    st.sampled_from([True, True, False]),  # has a loss
    st.sampled_from([False] * 9 + [True]),  # sampled out of turn
    st.sampled_from([{}, {}, {}, *CHANGES.values(), *NOISE.values(), {"is_present": True}]),
    st.sampled_from([1e-3, 1e-3, 1e-3, 1e-4, 0.0, -1.0]),
)
#: Long runs of the same step, with odd ones between.
STEPS = st.lists(
    st.tuples(
        st.integers(1, 2 * LATER),
        STEP.map(lambda s: (True, s[1], False, s[3], s[4])),
        st.integers(0, 2),
        STEP,
    ),
    max_size=10,
).map(lambda rows: [step for many, usual, few, odd in rows for step in [usual] * many + [odd] * few])


def go(schedule, steps):
    """Return what was due at each step, with the number of good steps before it."""
    seen = []
    for taken, has_loss, asked, shown, rate in steps:
        seen.append((schedule.good, schedule.due(has_loss, rate)))
        schedule.observe(SAME._replace(full=seen[-1][1].elapsed > 0, **shown))
        if asked:
            schedule.sample_now()
        schedule.commit(taken)
    return seen


def steady(count, has_loss=True, rate=1e-3, **shown):
    return [(True, has_loss, False, shown, rate)] * count


def full_evaluations(seen):
    return [good for good, due in seen if due.elapsed]


def is_early(good):
    return good < 10 or good in (12, 14, 17, 19, 22, 25, 29)


def test_full_evaluations_of_a_training_that_stays_the_same():
    every = full_evaluations(go(SamplingSchedule(), steady(SETTLED + 3 * LATER)))
    first = [good for good in range(EAGER) if is_early(good)]
    assert every[: len(first)] == first
    gaps = [
        later - earlier for earlier, later in zip(every[len(first) :], every[len(first) + 1 :], strict=False)
    ]
    assert gaps == sorted(gaps)
    assert gaps[:3] == [REFRESH] * 3
    assert set(gaps) == {REFRESH, 2 * REFRESH, 4 * REFRESH, LATER}
    settled = [good for good in every if good >= SETTLED]
    assert {later - earlier for earlier, later in zip(settled, settled[1:], strict=False)} == {LATER}


@pytest.mark.parametrize("noise", [{}, *NOISE.values()], ids=["nothing", *NOISE])
def test_full_evaluations_become_rare_whatever_the_level(noise):
    """Also where the loss makes no progress, and where none is given."""
    for has_loss in (True, False):
        seen = go(SamplingSchedule(), steady(SETTLED + 8 * LATER, has_loss, **noise))
        assert len(full_evaluations(seen[SETTLED:])) == 8


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_something_that_moves_makes_them_frequent_again(change):
    schedule = SamplingSchedule()
    go(schedule, steady(SETTLED + LATER))
    after = full_evaluations(go(schedule, steady(4 * LATER, **change)))
    first = after[0]
    if change.get("has_news"):  # at each step: as often as ever, and no more
        assert len(after) == 4 * LATER // REFRESH
    assert after[1] - first == REFRESH
    assert all(later - earlier >= REFRESH for earlier, later in zip(after[1:], after[2:], strict=False))


@pytest.mark.parametrize("rate", [1e-4, 3e-3, 0.0])
def test_a_new_learning_rate_is_looked_at_at_once(rate):
    schedule = SamplingSchedule()
    go(schedule, steady(SETTLED + LATER + 20))
    assert full_evaluations(go(schedule, steady(3, rate=rate)))[0] == SETTLED + LATER + 21
    # Back again counts too.
    go(schedule, steady(40, rate=rate))
    before = schedule.good
    assert full_evaluations(go(schedule, steady(3)))[0] == before + 1


def test_a_schedule_that_moves_the_rate_slowly_does_not_keep_them_frequent():
    schedule, every = SamplingSchedule(), []
    for step in range(20 * LATER):
        every += go(schedule, steady(1, rate=1e-3 * (1 + 0.4 * math.sin(step / 100))))
    assert len(full_evaluations(every[10 * LATER :])) <= 11


def test_a_norm_that_leaves_its_baseline_is_looked_at_at_once_unless_it_returns():
    for outside, expected in ((1, 0), (2, 1)):
        schedule = SamplingSchedule()
        go(schedule, steady(SETTLED + LATER + 20))
        go(schedule, steady(outside, norm=3.0))
        assert len(full_evaluations(go(schedule, steady(4)))) == expected


def test_a_fault_that_lasts_is_followed_at_a_bounded_price():
    for shown, interval in (
        ({"is_present": True}, LATER // 2),
        ({"is_present": True, "is_pending": True}, REFRESH),
        ({"is_pending": True}, REFRESH),
    ):
        schedule = SamplingSchedule()
        go(schedule, steady(SETTLED))
        seen = go(schedule, steady(40 * LATER, **shown))
        assert len(full_evaluations(seen[20 * LATER :])) == 20 * LATER // interval


@pytest.mark.parametrize(
    ("start", "mean", "growth", "has_exploded", "expected"),
    [
        (2.0, 3.1, 1.3, False, True),
        (2.0, 3.1, 1.0, False, False),
        (2.0, 3.1, 1.3, True, False),
        (2.0, 2.8, 1.001, False, False),
        (-2.0, -0.5, 0.7, False, True),
        (-2.0, -3.0, 0.95, False, False),
        (math.nan, math.nan, 1.1, False, False),
    ],
)
def test_each_step_is_evaluated_in_full_while_a_high_loss_rises(start, mean, growth, has_exploded, expected):
    """Until something critical has been reported: nothing graver can be said then."""
    schedule = SamplingSchedule()
    go(schedule, steady(SETTLED + 2, loss=mean, loss_start=start))
    seen = []
    for _ in range(10):
        mean *= growth
        seen += go(schedule, steady(1, loss=mean, loss_start=start, has_exploded=has_exploded))
    # The first of them shows that it rises.
    assert (len(full_evaluations(seen)) >= 9) == expected


@given(steps=STEPS)
def test_the_first_good_steps_are_evaluated_in_full(steps):
    for good, due in go(SamplingSchedule(), steps):
        assert due.elapsed or not is_early(good)
        assert due.first == (good < EAGER)


@given(steps=STEPS)
def test_at_most_the_longest_interval_lies_between_two_full_evaluations(steps):
    """A full evaluation of a bad step does not count, and the next step makes up for it."""
    last = -1
    for (good, due), (taken, *_) in zip(go(SamplingSchedule(), steps), steps, strict=True):
        assert good - last <= LATER + REFRESH
        if due.elapsed and taken:
            last = good


@given(steps=STEPS)
def test_full_evaluations_are_no_more_than_one_in_eight_but_for_bad_steps_and_a_rising_loss(steps):
    steps = [(True, has_loss, False, shown, rate) for _, has_loss, _, shown, rate in steps]
    after = [good for good in full_evaluations(go(SamplingSchedule(), steps)) if good >= 2 * EAGER + REFRESH]
    losses = sum(has_loss for _, has_loss, *_ in steps)
    if losses in (0, len(steps)):  # else the first losses come late
        assert all(later - earlier >= REFRESH for earlier, later in zip(after, after[1:], strict=False))


@given(steps=STEPS)
def test_a_full_evaluation_follows_a_bad_step(steps):
    seen = go(SamplingSchedule(), [*steps, *steady(1)])
    for (taken, *_), (_, due) in zip(steps, seen[1:], strict=True):
        assert taken or due.elapsed


@given(steps=STEPS)
def test_a_full_evaluation_follows_a_sampled_good_step(steps):
    seen = go(SamplingSchedule(), [*steps, *steady(1)])
    for (taken, _, asked, *_), (_, due), (count, after) in zip(steps, seen, seen[1:], strict=False):
        assert after.updated == (taken and (due.fresh or asked))
        assert not after.updated or after.elapsed
        # An update stands for as many steps as its sample.
        assert after.sampled_steps == ((1 if count <= REFRESH else REFRESH) if after.updated else 0)


@given(steps=STEPS)
def test_full_evaluations_stand_for_no_more_steps_than_there_were(steps):
    last, counted = -1, 0
    for (good, due), (taken, *_) in zip(go(SamplingSchedule(), steps), steps, strict=True):
        # One of a bad step changes nothing about it.
        assert due.elapsed in (0, min(good - last, REFRESH))
        assert counted + due.elapsed <= good + 1
        counted += due.elapsed * taken
        if due.elapsed and taken:
            last = good


@given(before=st.integers(0, SETTLED + LATER), bad=st.integers(0, 3))
def test_the_first_losses_are_evaluated_in_full_however_late_they_come(before, bad):
    schedule = SamplingSchedule()
    go(schedule, [*steady(before, has_loss=False), *([(False, False, False, {}, 1e-3)] * bad)])
    seen = go(schedule, steady(EAGER))
    assert {good - before for good in full_evaluations(seen)} >= {n for n in range(EAGER) if is_early(n)}
    later = go(schedule, steady(3 * REFRESH))
    assert len(full_evaluations(later)) <= 4


def test_a_loss_that_returns_is_not_a_first_one():
    schedule = SamplingSchedule()
    go(schedule, [*steady(100), *steady(5, has_loss=False)])
    assert len(full_evaluations(go(schedule, steady(2 * REFRESH)))) <= 2


@given(steps=STEPS, cut=st.integers(0, SETTLED + 3 * LATER))
def test_a_restored_schedule_continues_exactly(steps, cut):
    whole, first = SamplingSchedule(), SamplingSchedule()
    expected = go(whole, steps)
    seen = go(first, steps[:cut])
    state = first.state_dict()
    kept = json.dumps(state)
    second = SamplingSchedule()
    go(second, steady(7))  # overwritten below
    second.load_state_dict(state)
    assert json.dumps(second.state_dict()) == kept
    assert seen + go(second, steps[cut:]) == expected
    assert json.dumps(second.state_dict()) == json.dumps(whole.state_dict())
    assert json.dumps(state) == kept, "a state is a copy"


def test_what_an_older_version_did_not_save_begins_anew():
    schedule, fresh = SamplingSchedule(), SamplingSchedule()
    go(schedule, steady(SETTLED + LATER, rate=1e-4))
    known = {
        key: schedule.state_dict()[key] for key in ("good", "losses", "sampled_last", "closest", "was_good")
    }
    schedule.load_state_dict(known)
    assert schedule.state_dict() == fresh.state_dict() | known


@pytest.mark.parametrize("before", [40, 50, SETTLED + 5])
def test_an_update_follows_a_step_that_is_sampled_out_of_turn(before):
    schedule = SamplingSchedule()
    go(schedule, steady(before))
    schedule.due(True, 1e-3)
    schedule.sample_now()
    schedule.commit(True)
    second = schedule.due(True, 1e-3)
    schedule.commit(True)
    assert second.updated
    assert second.elapsed > 0
    assert not schedule.due(True, 1e-3).updated


@pytest.mark.parametrize("before", range(SETTLED, SETTLED + 10))
def test_any_step_may_be_sampled_out_of_turn_but_for_those_shortly_after_another(before):
    """However near a regular sample is: it shows nothing of what this step does."""
    schedule = SamplingSchedule()
    go(schedule, steady(before))
    assert schedule.may_sample
    go(schedule, [(True, True, True, {}, 1e-3)])
    for after in range(1, 2 * REFRESH):
        assert schedule.may_sample == (after >= REFRESH)
        go(schedule, steady(1))


def test_a_bad_step_changes_nothing():
    schedule = SamplingSchedule()
    go(schedule, steady(EAGER + REFRESH))
    fresh = schedule.due(True, 1e-3)
    schedule.commit(False)
    again = schedule.due(True, 1e-3)
    # What was sampled at a bad step is sampled again.
    assert (schedule.good, fresh.fresh, again.fresh, again.updated) == (EAGER + REFRESH, True, True, False)
