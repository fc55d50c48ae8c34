"""The rows that cause a fault are found, whichever they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.flight_recorder.bisect import bisect_rows, keep_rows


@given(
    st.integers(2, 70).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1)))
)
def test_rows_that_cause_it_alone_are_all_found(case):
    count, bad = case
    found = bisect_rows(lambda rows: bool(bad & set(rows.tolist())), count, most=10**6)
    assert (found.all, found.groups) == (sorted(bad), ())
    assert found.every == (len(bad) == count)


@given(st.integers(2, 40), st.data())
def test_kept_rows_stay_in_place_and_no_other_is_used(count, data):
    kept = data.draw(st.sets(st.integers(0, count - 1), min_size=1).map(sorted))
    rows = keep_rows(kept, count).tolist()
    assert len(rows) == count
    assert set(rows) == set(kept)
    assert all(rows[row] == row for row in kept)


def test_one_row_of_many_takes_two_passes_a_halving():
    found = bisect_rows(lambda rows: 700 in rows.tolist(), 1024, most=64)
    assert (found.rows, found.passes) == ((700,), 20)


def test_if_every_row_causes_it_few_passes_are_needed():
    found = bisect_rows(lambda rows: True, 4096, most=64)
    assert (found.every, len(found.rows), found.groups) == (True, 4096, ())
    assert found.passes == 22


def test_a_row_in_each_group_is_not_every_row():
    bad = set(range(0, 64, 8))
    found = bisect_rows(lambda rows: bool(bad & set(rows.tolist())), 64, most=200)
    assert (found.rows, found.every) == (tuple(sorted(bad)), False)


def test_rows_that_cause_it_together_are_named_together():
    found = bisect_rows(lambda rows: {2, 3} <= set(rows.tolist()), 8, most=64)
    assert (found.rows, found.groups) == ((), ((2, 3),))


def test_rows_in_both_halves_are_not_separated():
    found = bisect_rows(lambda rows: {0, 7} <= set(rows.tolist()), 8, most=64)
    assert found.all == list(range(8))
    assert not found.every


@pytest.mark.parametrize("most", [0, 1, 2, 5, 9])
def test_it_stays_within_the_limit_of_passes_and_loses_no_row(most):
    bad = {3, 40}
    found = bisect_rows(lambda rows: bool(bad & set(rows.tolist())), 64, most=most)
    assert found.passes <= most
    assert bad <= set(found.all)
