import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.loggers.base import LogRecord
from lightning_gradguard.loggers.histograms import (
    FORMATS,
    QUANTITIES,
    THRESHOLDS,
    ShownTensors,
    activations_record,
    exponents_record,
    histogram_record,
    update_ratio_record,
)
from lightning_gradguard.loggers.tags import Tag
from lightning_gradguard.stats.histogram import count

names = st.lists(st.text("abcdef", min_size=1, max_size=3), max_size=20, unique=True)


@given(names, st.integers(1, 8), st.data())
def test_shows_as_many_as_it_may_in_the_given_order_preferred_ones_first(tensors, most, data):
    first = set(data.draw(st.lists(st.sampled_from(tensors)))) if tensors else set()
    shown = ShownTensors(most).choose(tensors, first)
    assert len(shown) == min(most, len(tensors))
    assert shown == [name for name in tensors if name in shown]
    assert len(first & set(shown)) == min(most, len(first))


@given(names, st.integers(1, 8))
def test_the_choice_is_that_of_any_other_run(tensors, most):
    assert ShownTensors(most).choose(tensors) == ShownTensors(most).choose(tensors)


@given(st.integers(2, 300), st.integers(2, 40))
def test_the_choice_is_even_and_has_both_ends(number, most):
    tensors = [str(i) for i in range(number)]
    places = [int(name) for name in ShownTensors(most).choose(tensors)]
    assert (places[0], places[-1]) == (0, number - 1)
    steps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert max(steps) - min(steps) <= 1


@given(st.lists(names, min_size=1, max_size=8), st.integers(1, 5))
def test_what_is_shown_stays_whatever_comes(steps, most):
    choice, seen = ShownTensors(most), []
    for tensors in steps:
        shown = choice.choose(tensors)
        assert [name for name in tensors if name in seen and name not in shown] == []
        seen += [name for name in shown if name not in seen]
        assert len(seen) <= most


@given(st.lists(names, min_size=2, max_size=8), st.integers(1, 5), st.data())
def test_continues_after_a_resume(steps, most, data):
    stop = data.draw(st.integers(1, len(steps) - 1))
    whole, resumed = ShownTensors(most), ShownTensors(most)
    for tensors in steps[:stop]:
        whole.choose(tensors)
    resumed.load_state_dict(whole.state_dict())
    for tensors in steps[stop:]:
        assert resumed.choose(tensors) == whole.choose(tensors)


@pytest.mark.parametrize("most", [0, -3])
def test_refuses_to_show_nothing(most):
    with pytest.raises(ValueError, match=f"most must be at least 1, got {most}"):
        ShownTensors(most)


NAMES = ["model.encoder.first.weight", "a/b.weight", "<b>bold</b>|`x`", "größe.层.weight", "x." * 99 + "w"]


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_tag_ends_with_the_name_in_full(quantity, name):
    record = histogram_record({name: [1.0] * 30}, quantity=quantity)
    ((tag, counts),) = record.histograms.items()
    parts = Tag.parse(tag)
    assert (parts.group, parts.name) == ("gradguard", name)
    assert counts == [1.0] * 30
    assert name in record.notes[tag]


def test_each_quantity_optimizer_and_axis_has_tags_of_its_own():
    tags = [
        tag
        for quantity in QUANTITIES
        for group in ("gradguard", "gradguard_1")
        for limits in (None, {"w": 1.0})
        for tag in histogram_record(
            {"w": [0.0] * 30}, quantity=quantity, group=group, limits=limits
        ).histograms
    ]
    assert len(set(tags)) == len(tags) == 16
    assert tags[0] == "gradguard_hist_log10/w"


def test_update_ratios_are_logarithms_where_there_is_one():
    record = update_ratio_record({"a": 1e-3, "b": 0.0, "c": math.inf, "d": math.nan})
    assert record.scalars == {"gradguard_update_ratio_log10/a": pytest.approx(-3)}
    assert record.scalars.keys() == record.notes.keys()


def test_the_table_of_activations_has_what_is_known():
    shares = {"relu": (None, 0.25), "tanh": (0.5, None), "linear": (None, None)}
    text = activations_record(shares, step=1000).texts["gradguard_activations/table"]
    assert "step 1,000" in text
    assert [line for line in text.splitlines() if line.startswith("| `")] == [
        "| `relu` |  | 25 % |",
        "| `tanh` | 50 % |  |",
    ]
    assert activations_record({"linear": (None, None)}, step=0) == LogRecord()


DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def record_of(rows=None, **gradients):
    below = count(
        [torch.as_tensor(g, dtype=torch.float64) for g in gradients.values()], thresholds=THRESHOLDS
    ).below
    rows = list(gradients) if rows is None else rows
    return exponents_record(dict(zip(gradients, below.tolist(), strict=True)), rows, step=7)


def table_of(record):
    lines = record.texts["gradguard_exponents/table"].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.tag)
def test_the_numbers_of_a_format_are_those_that_torch_rounds_to(form):
    dtype = DTYPES[form.tag]
    assert torch.tensor(form.subnormal).to(dtype).float().item() == form.subnormal
    assert torch.tensor(form.subnormal / 2.01).to(dtype).float().item() == 0
    # A normal number keeps all its digits, and the next smaller ones do not.
    step = torch.finfo(dtype).eps
    above, under = form.normal * (1 + step), form.normal * (1 - step / 2)
    assert torch.tensor(above).to(dtype).float().item() == pytest.approx(above, rel=1e-7, abs=0)
    largest = torch.finfo(dtype).max
    assert form.overflow > largest == np.nextafter(np.float32(form.overflow), np.float32(0))
    assert torch.tensor(under).to(dtype).float().item() != pytest.approx(under, rel=1e-7, abs=0)


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=30))
def test_shares_grow_with_the_bound(numbers):
    scalars = record_of(w=numbers).scalars
    for form in FORMATS:
        coarse = scalars[f"gradguard_exponents/{form.tag}_subnormal"]
        lost = scalars[f"gradguard_exponents/{form.tag}_lost"]
        assert 0 <= lost <= coarse <= 1 or (math.isnan(lost) and not any(numbers))


def test_shares_are_of_all_elements_that_are_not_zero():
    record = record_of(a=[1.0, 1e-5, 1e-9, 0.0], b=[0.0, math.nan, 2.0])
    share = {tag.partition("/")[2]: x for tag, x in record.scalars.items()}
    assert share["fp16_subnormal"] == pytest.approx(2 / 4)
    assert share["fp16_lost"] == pytest.approx(1 / 4)
    assert share["e5m2_lost"] == pytest.approx(2 / 4)
    assert share["bf16_subnormal"] == 0
    assert len(share) == 8
    assert record.notes.keys() >= record.scalars.keys()


def test_the_table_has_few_digits_and_bold_cells():
    record = record_of(a=[1.0] * 200 + [1e-9], b=[1e-3] * 999 + [1e-5], c=[0.0])
    table = table_of(record)
    assert table["**all 3 tensors**"][:2] == ["0.2 % / <0.1 %", "0 % / 0 %"]
    assert table["`b`"] == ["0.1 % / 0 %", "0 % / 0 %", "**100 % / 100 %**", "0.1 % / 0.1 %"]
    assert table["`c`"] == ["all zero"] * 4
    assert "step 7" in record.texts["gradguard_exponents/table"]


def test_overflow_is_shown_only_if_there_is_any():
    table = table_of(record_of(a=[1e-5, 65504.0, 7e4, 448.0], b=[1.0]))
    assert table["`a`"] == [
        "**25 % / 0 %, 25 % overflow**", "0 % / 0 %", "**25 % / 25 %, 50 % overflow**",
        "**25 % / 25 %, 50 % overflow**",
    ]  # fmt: skip
    assert table_of(record_of(a=[1.0, 7e4]))["`a`"][0] == "**50 % overflow**"
    assert table["`b`"] == ["0 % / 0 %"] * 4


def test_rows_are_those_asked_for():
    table = table_of(record_of(rows=["b"], a=[1.0], b=[1.0], c=[1.0]))
    assert [title for title in table if title.startswith("`")] == ["`b`"]
    assert "**all 3 tensors**" in table


def test_a_second_optimizer_has_its_own_group():
    record = exponents_record({"w": [0.0] * 13}, ["w"], step=0, group="gradguard_1")
    assert all(tag.startswith("gradguard_1_exponents/") for tag in [*record.scalars, *record.texts])
