import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.loggers.histograms import WorstTensors, histogram_record
from lightning_gradguard.loggers.tags import tag_names

rms = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.sampled_from([0.0, math.nan, math.inf]) | st.floats(1e-30, 1e30),
    max_size=12,
)


@given(st.lists(rms, max_size=6), st.integers(1, 5))
def test_shows_as_many_as_it_may_in_the_given_order(steps, most):
    worst = WorstTensors(most)
    for tensors in steps:
        shown = worst.choose(tensors)
        assert len(shown) == min(most, len(tensors))
        assert shown == [name for name in tensors if name in shown]


@given(rms, st.integers(1, 5))
def test_shows_the_same_for_the_same(tensors, most):
    worst = WorstTensors(most)
    assert worst.choose(tensors) == worst.choose(tensors)


def test_first_choice_is_farthest_from_the_median():
    tensors = {"a": 1e-3, "b": 1e-9, "c": 2e-3, "d": 1e-3, "e": 1e2, "f": 1e-3}
    assert WorstTensors(2).choose(tensors) == ["b", "e"]


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_zero_and_nonfinite_are_worst(value):
    tensors = {"a": 1e-3, "b": 1e-9, "c": 1e-3, "d": value, "e": 1e-3}
    assert WorstTensors(1).choose(tensors) == ["d"]


@pytest.mark.parametrize(("rival", "shown"), [(5e-8, "b"), (2e-9, "b"), (5e-10, "c"), (1e-20, "c")])
def test_is_replaced_only_by_one_that_is_a_decade_worse(rival, shown):
    worst = WorstTensors(1)
    tensors = {"a": 1e-3, "b": 1e-8, "c": 1e-3, "d": 1e-3, "e": 1e-3}
    assert worst.choose(tensors) == ["b"]
    assert worst.choose(tensors | {"c": rival}) == [shown]


def test_the_mildest_is_replaced():
    worst = WorstTensors(2)
    tensors = {"a": 1e-3, "b": 1e-8, "c": 1e-5, "d": 1e-3, "e": 1e-3, "f": 1e-3, "g": 1e-3}
    assert worst.choose(tensors) == ["b", "c"]
    assert worst.choose(tensors | {"d": 1e-7}) == ["b", "d"]


def test_continues_after_a_resume():
    worst, resumed = WorstTensors(1), WorstTensors(1)
    worst.choose({"a": 1e-3, "b": 1e-9, "c": 1e-3})
    resumed.load_state_dict(worst.state_dict())
    assert resumed.choose({"a": 1e-8, "b": 1e-3, "c": 1e-3}) == worst.choose(
        {"a": 1e-8, "b": 1e-3, "c": 1e-3}
    )


@pytest.mark.parametrize("most", [0, -3])
def test_refuses_to_show_nothing(most):
    with pytest.raises(ValueError, match=f"max_tensors must be at least 1, got {most}"):
        WorstTensors(most)


def test_histogram_record_names_the_parameter_in_full():
    names = ["model.encoder.first.weight", "model.encoder.second.weight"]
    titles = dict(zip(names, tag_names(names), strict=True))
    record = histogram_record({names[1]: [1.0] * 30}, titles)
    assert record.histograms == {"gradguard_hist_log10/001_second.weight": [1.0] * 30}
    assert names[1] in record.notes["gradguard_hist_log10/001_second.weight"]


def test_groups_keep_optimizers_apart():
    titles = {"generator.weight": "000_weight"}, {"critic.weight": "000_weight"}
    first = histogram_record({"generator.weight": [0.0] * 30}, titles[0])
    second = histogram_record({"critic.weight": [0.0] * 30}, titles[1], group="gradguard_1")
    assert not first.histograms.keys() & second.histograms.keys()
