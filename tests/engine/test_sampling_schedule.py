"""Laws of when full evaluations are due, over all sequences of good and bad steps and losses."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.engine.sampling_schedule import EAGER, LATER, REFRESH, SETTLED, SamplingSchedule

#: Steps as (good, has a loss, sampled out of turn), in long runs of the same.
STEPS = st.lists(
    st.tuples(
        st.integers(1, 2 * LATER),
        st.tuples(
            st.sampled_from([True] * 7 + [False]), st.booleans(), st.sampled_from([False] * 9 + [True])
        ),
        st.integers(0, 2),
        st.tuples(st.booleans(), st.booleans(), st.booleans()),
    ),
    max_size=12,
).map(lambda rows: [step for many, usual, few, odd in rows for step in [usual] * many + [odd] * few])


def go(schedule, steps):
    """Return what was due at each step, with the number of good steps before it."""
    seen = []
    for good, has_loss, asked in steps:
        seen.append((schedule.good, schedule.due(has_loss)))
        if asked:
            schedule.sample_now()
        schedule.commit(good)
    return seen


def steady(count, has_loss=True):
    return [(True, has_loss, False)] * count


def full_evaluations(seen):
    return [good for good, due in seen if due.elapsed]


def test_full_evaluations_of_an_unremarkable_training():
    every = full_evaluations(go(SamplingSchedule(), steady(SETTLED + 3 * LATER)))
    assert every[: EAGER + 1] == [*range(EAGER), EAGER + 1]
    assert every[EAGER + 1 :] == [
        *range(EAGER + REFRESH + 1, SETTLED + 2, REFRESH),
        *range(SETTLED + LATER + 1, SETTLED + 3 * LATER, LATER),
    ]


@given(steps=STEPS)
def test_each_of_the_first_good_steps_is_evaluated_in_full(steps):
    for good, due in go(SamplingSchedule(), steps):
        assert good >= EAGER or due.elapsed


@given(before=st.integers(0, SETTLED + 2 * LATER), steps=st.integers(1, 2 * LATER + 2))
def test_at_most_one_refresh_interval_lies_between_two_full_evaluations(before, steps):
    schedule = SamplingSchedule()
    seen = go(schedule, steady(before + steps))
    at = full_evaluations(seen)
    gaps = [(later, later - earlier) for earlier, later in zip(at, at[1:], strict=False)]
    assert all(gap <= (REFRESH if later <= SETTLED + 1 else LATER) for later, gap in gaps)
    assert before + steps - 1 - at[-1] < (REFRESH if before + steps <= SETTLED else LATER)


@given(steps=STEPS)
def test_so_it_is_with_bad_steps_in_between(steps):
    """A full evaluation of a bad step does not count, and the next step makes up for it."""
    last = -1
    for (good, due), (is_good, _, _) in zip(go(SamplingSchedule(), steps), steps, strict=True):
        assert good - last <= (REFRESH if good <= SETTLED + 1 else LATER)
        if due.elapsed and is_good:
            last = good


@given(steps=STEPS)
def test_a_full_evaluation_follows_a_bad_step(steps):
    seen = go(SamplingSchedule(), [*steps, *steady(1)])
    for (good, _, _), (_, due) in zip(steps, seen[1:], strict=True):
        assert good or due.elapsed


@given(steps=STEPS)
def test_a_full_evaluation_follows_a_sampled_good_step(steps):
    seen = go(SamplingSchedule(), [*steps, *steady(1)])
    for (good, _, asked), (_, due), (count, after) in zip(steps, seen, seen[1:], strict=False):
        assert after.updated == (good and (due.fresh or asked))
        assert not after.updated or after.elapsed
        # An update stands for as many steps as its sample.
        assert after.sampled_steps == ((1 if count <= REFRESH else REFRESH) if after.updated else 0)


@given(steps=STEPS)
def test_full_evaluations_stand_for_no_more_steps_than_there_were(steps):
    counted = 0
    for (good, due), (is_good, _, _) in zip(go(SamplingSchedule(), steps), steps, strict=True):
        assert 0 <= due.elapsed <= REFRESH
        # This step counts too if it turns out good.
        assert counted + due.elapsed <= good + 1
        counted += due.elapsed * is_good


def test_full_evaluations_within_a_refresh_interval_stand_for_all_steps():
    seen = go(SamplingSchedule(), steady(SETTLED + 2))
    assert sum(due.elapsed for _, due in seen) == SETTLED + 2
    assert {due.elapsed for _, due in go(SamplingSchedule(), steady(SETTLED + 4 * LATER))[SETTLED + 2 :]} == {
        0,
        REFRESH,
    }


@given(before=st.integers(0, SETTLED + LATER), bad=st.integers(0, 3))
def test_the_first_losses_are_all_evaluated_in_full_however_late_they_come(before, bad):
    schedule = SamplingSchedule()
    go(schedule, [*steady(before, has_loss=False), *([(False, False, False)] * bad)])
    seen = go(schedule, steady(EAGER))
    assert full_evaluations(seen) == [*range(before, before + EAGER)]
    later = go(schedule, steady(3 * REFRESH))
    assert len(full_evaluations(later)) <= 4


def test_a_loss_that_returns_is_not_a_first_one():
    schedule = SamplingSchedule()
    go(schedule, [*steady(100), *steady(5, has_loss=False)])
    assert len(full_evaluations(go(schedule, steady(REFRESH)))) == 1


@given(steps=STEPS)
def test_each_of_the_first_losses_is_evaluated_in_full(steps):
    losses = 0
    for (_, due), (is_good, has_loss, _) in zip(go(SamplingSchedule(), steps), steps, strict=True):
        assert due.elapsed or not has_loss or losses >= EAGER
        losses += is_good and has_loss


@pytest.mark.parametrize(
    ("start", "mean", "is_on", "expected"),
    [
        (2.0, 0.9, False, 1),
        (2.0, 0.9, True, LATER // REFRESH),
        (2.0, 1.1, False, LATER // REFRESH),
        (2.0, 3.1, False, LATER),
        (-2.0, -3.1, False, 1),
        (-2.0, -0.9, False, LATER),
        (math.nan, math.nan, False, 1),
        (math.nan, math.nan, True, LATER // REFRESH),
    ],
)
def test_full_evaluations_are_frequent_while_the_loss_stalls_or_grows(start, mean, is_on, expected):
    schedule = SamplingSchedule()
    go(schedule, steady(SETTLED + 2))
    schedule.observe(start, mean, is_on)
    assert len(full_evaluations(go(schedule, steady(LATER)))) == expected


@given(steps=STEPS, cut=st.integers(0, SETTLED + 3 * LATER))
def test_a_restored_schedule_continues_exactly(steps, cut):
    whole, first = SamplingSchedule(), SamplingSchedule()
    expected = go(whole, steps)
    seen = go(first, steps[:cut])
    state = first.state_dict()
    assert all(type(value) in (int, bool) for value in state.values())
    second = SamplingSchedule()
    go(second, steady(7))  # overwritten below
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert seen + go(second, steps[cut:]) == expected
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("before", [40, 50, SETTLED + 5])
def test_an_update_follows_a_step_that_is_sampled_out_of_turn(before):
    schedule = SamplingSchedule()
    go(schedule, steady(before))
    first = schedule.due(True)
    schedule.sample_now()
    schedule.commit(True)
    second = schedule.due(True)
    schedule.commit(True)
    assert not first.fresh or before % REFRESH == 0
    assert second.updated
    assert second.elapsed > 0
    assert not schedule.due(True).updated


def test_a_bad_step_changes_nothing():
    schedule = SamplingSchedule()
    go(schedule, steady(EAGER + REFRESH))
    fresh = schedule.due(True)
    schedule.commit(False)
    again = schedule.due(True)
    # What was sampled at a bad step is sampled again.
    assert (schedule.good, fresh.fresh, again.fresh, again.updated) == (EAGER + REFRESH, True, True, False)


@given(steps=STEPS)
def test_a_full_evaluation_stands_for_the_steps_since_the_last_good_one(steps):
    """One of a bad step changes nothing about it."""
    last = -1
    for (good, due), (is_good, _, _) in zip(go(SamplingSchedule(), steps), steps, strict=True):
        assert due.elapsed in (0, min(good - last, REFRESH))
        if due.elapsed and is_good:
            last = good


@pytest.mark.parametrize(("mean", "is_on", "expected"), [(0.9, True, LATER // REFRESH), (3.1, False, LATER)])
def test_a_restored_schedule_is_as_alert_as_before(mean, is_on, expected):
    schedule, restored = SamplingSchedule(), SamplingSchedule()
    go(schedule, steady(SETTLED + 2))
    schedule.observe(2.0, mean, is_on)
    restored.load_state_dict(schedule.state_dict())
    assert len(full_evaluations(go(restored, steady(LATER)))) == expected
