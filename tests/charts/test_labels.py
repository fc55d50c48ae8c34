import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.charts.labels import shorten, without_prefix

part = st.text("abcdefghij_0123456789", min_size=1, max_size=30)
name = st.lists(part, min_size=1, max_size=8).map(".".join)


@given(st.lists(name, min_size=1, max_size=20, unique=True), st.lists(part, max_size=3).map(".".join))
def test_a_common_prefix_makes_no_difference(names, prefix):
    prefixed = [f"{prefix}.{n}" if prefix else n for n in names]
    assert without_prefix(prefixed) == without_prefix(names)
    assert all(n.endswith(short) for n, short in zip(names, without_prefix(names), strict=True))


@given(name, st.integers(1, 60))
def test_shortening_keeps_what_fits_and_the_end_of_what_does_not(full, room):
    short = shorten(full, room)
    assert len(short) <= room
    if len(full) <= room:
        assert short == full
    assert short[-1] == full[-1]


@pytest.mark.parametrize("names", [["weight"], ["layer.weight"], ["a.b", "a"], ["a", "a.b"], ["a.b", "ab.c"]])
def test_no_name_becomes_empty(names):
    assert all(without_prefix(names))
