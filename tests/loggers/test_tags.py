import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.loggers.tags import TITLE, histogram_panel, shorten, tag_names, without_prefix

part = st.text("abcdefghij_0123456789", min_size=1, max_size=30)
name = st.lists(part, min_size=1, max_size=8).map(".".join)


@given(st.lists(name, min_size=1, max_size=1500, unique=True))
def test_tags_sort_in_execution_order_and_are_unique_and_short(names):
    titles = tag_names(names)
    assert titles == sorted(titles)
    assert len(set(titles)) == len(names)
    assert all(len(f"gradguard_hist_log10/{title}") <= TITLE for title in titles)


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


def test_histogram_panel_names_the_parameter_in_full():
    names = ["model.encoder.first.weight", "model.encoder.second.weight"]
    titles = dict(zip(names, tag_names(names), strict=True))
    panel = histogram_panel({names[1]: [1.0] * 30}, titles)
    assert panel.histograms == {"gradguard_hist_log10/001_second.weight": [1.0] * 30}
    assert names[1] in panel.notes["gradguard_hist_log10/001_second.weight"]


def test_groups_keep_optimizers_apart():
    titles = {"generator.weight": "000_weight"}, {"critic.weight": "000_weight"}
    first = histogram_panel({"generator.weight": [0.0] * 30}, titles[0])
    second = histogram_panel({"critic.weight": [0.0] * 30}, titles[1], group="gradguard_1")
    assert not first.histograms.keys() & second.histograms.keys()
