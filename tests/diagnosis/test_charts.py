"""The heat map is right, its labels legible."""

import base64
import io
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from lightning_gradguard.charts import SCALE, paint
from lightning_gradguard.diagnosis.charts import MARKED, ROWS, heat_map
from lightning_gradguard.diagnosis.diagnosis import Timeline


def timeline_of(layers=3, steps=4, cells=None, **known):
    names = tuple(f"net.{i}.weight" for i in range(layers)) if isinstance(layers, int) else layers
    cells = np.full((len(names), steps), -3.0) if cells is None else np.array(cells)
    return Timeline(tuple(range(10, 10 + steps)), names, tuple(map(tuple, cells.tolist())), **known)


def pixels(uri):
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.round(255 * imread(io.BytesIO(base64.b64decode(data)))).astype(int)


@pytest.mark.parametrize("timeline", [None, Timeline((), ("a",), ((),)), Timeline((1,), (), ())])
def test_without_steps_or_layers_there_is_no_heat_map(timeline):
    assert heat_map(timeline, 1, ("a",)) is None


def test_each_cell_is_a_pixel():
    cells = np.array([[-9.0, -1.0, math.nan], [-math.inf, 1.5, -4.0]])
    picture = heat_map(timeline_of(2, 3, cells), 0, ())
    assert np.array_equal(pixels(picture.image), paint(cells))
    assert (picture.has_nonfinite, picture.has_blank) == (True, True)
    scale = pixels(picture.scale)
    assert scale.shape[0] == 1
    assert np.array_equal(scale[0, [0, -1]], paint(np.array([SCALE]))[0])
    calm = heat_map(timeline_of(), 0, ())
    assert (calm.has_nonfinite, calm.has_blank) == (False, False)


def marked(picture):
    return {row.text for row in picture.rows if row.worst}


def test_the_worst_rows_are_marked():
    parameters = tuple(f"net.{i}.weight" for i in (4, 2, 0, 1))
    assert marked(heat_map(timeline_of(6), 0, parameters)) == set(parameters[:MARKED])
    assert marked(heat_map(timeline_of(6), 0, ("net.4.bias", "gone.weight"))) == {"net.4.weight"}
    both = ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight")
    assert marked(heat_map(timeline_of(both), 0, both[1:2])) == {both[1]}
    assert marked(heat_map(timeline_of(both), 0, ("rnn.bias_hh_l0",))) == set(both[:2])
    assert marked(heat_map(timeline_of(("a", "b")), 0, ("c",))) == set()


@given(layers=st.integers(1, 400), parameters=st.lists(st.integers(0, 399), max_size=8))
def test_labels_do_not_overlap(layers, parameters):
    names = tuple(f"net.{i}.weight" for i in parameters)
    picture = heat_map(timeline_of(layers, 1), 0, names)
    assert all(0 < row.middle < picture.height for row in picture.rows)
    labels = sorted(row.middle for row in picture.rows if row.text)
    assert all(b - a >= 12 for a, b in pairwise(labels))
    assert labels
    assert pixels(picture.image).shape[0] <= ROWS
    present = {n for n in names[:MARKED] if int(n.split(".")[1]) < layers}
    assert sum(row.worst for row in picture.rows) <= len(present)
    assert bool(present) == any(row.worst for row in picture.rows)


@given(first=st.integers(0, 10**9), stride=st.sampled_from([1, 2, 3, 50]), count=st.integers(1, 128))
def test_ticks_are_below_their_steps_and_apart(first, stride, count):
    steps = tuple(range(first, first + stride * count, stride))
    picture = heat_map(Timeline(steps, ("a",), (tuple([0.0] * count),)), 0, ())
    for tick in picture.steps:
        assert steps[int(tick.place / picture.column)] == int(tick.text.replace(",", ""))
    places = [tick.place for tick in picture.steps]
    assert all(b - a >= 39 for a, b in pairwise(places))
    assert places or stride > 1


def test_strips_show_skipped_and_clipped_steps():
    picture = heat_map(timeline_of(skipped=(False, True, False, True), clipped=(True,) * 4), 11, ())
    assert [strip.name for strip in picture.strips] == ["skipped", "clipped"]
    assert picture.strips[0].columns == (picture.column, 3 * picture.column)
    assert all(strip.top + picture.thick < 0 for strip in picture.strips)
    assert picture.strips[1].top + picture.thick < picture.strips[0].top
    assert picture.onset == 1.5 * picture.column
    calm = heat_map(timeline_of(skipped=(False,) * 4), 9, ())
    assert (calm.strips, calm.onset) == ((), None)


def points(line):
    return [tuple(map(float, point.split(","))) for point in line.split()]


def test_a_larger_loss_is_higher_and_a_gap_stays_a_gap():
    losses = heat_map(timeline_of(1, 6, losses=(2.0, 1.0, math.nan, 3.0, math.inf, 1.0)), 0, ()).losses
    first, second, third = map(points, losses.lines)
    assert first[0][1] < first[1][1] == losses.height
    assert second[0] == second[1]
    assert second[0][1] == 0.0
    assert third[0][1] == first[1][1]
    assert [(tick.place, tick.text) for tick in losses.ticks] == [(0.0, "3"), (losses.height, "1")]
    assert not losses.logarithmic


def test_losses_far_apart_have_a_logarithmic_scale():
    losses = heat_map(timeline_of(1, 3, losses=(1.0, 1e3, 1e6)), 0, ()).losses
    assert losses.logarithmic
    assert [y for _, y in points(losses.lines[0])] == [losses.height, losses.height / 2, 0.0]
    assert not heat_map(timeline_of(1, 3, losses=(-1.0, 1e3, 1e6)), 0, ()).losses.logarithmic


@pytest.mark.parametrize("losses", [(), (math.nan,) * 3, (1.0, math.nan, math.inf)])
def test_fewer_than_two_losses_are_no_curve(losses):
    assert heat_map(timeline_of(1, 3, losses=losses), 0, ()).losses is None


def test_close_losses_have_enough_digits():
    ticks = heat_map(timeline_of(1, 2, losses=(2.30012, 2.30049)), 0, ()).losses.ticks
    assert [tick.text for tick in ticks] == ["2.3005", "2.3001"]
    assert len(heat_map(timeline_of(1, 2, losses=(2.0, 2.0)), 0, ()).losses.ticks) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_log10": ((0.0,),)}, "rms_log10 must have one row for each of 2 layers, got 1"),
        ({"rms_log10": ((0.0,), (0.0, 0.0))}, "rms_log10 must have one entry for each of 1 steps, got 2"),
        ({"skipped": (True, False)}, "skipped must have one entry for each of 1 steps, got 2"),
        ({"losses": (1.0, 2.0)}, "losses must have one entry for each of 1 steps, got 2"),
    ],
)
def test_lengths_that_do_not_agree_are_refused(change, message):
    good = {"steps": (1,), "layers": ("a", "b"), "rms_log10": ((0.0,), (0.0,))}
    assert Timeline(**good).steps == (1,)
    with pytest.raises(ValueError, match=message):
        Timeline(**{**good, **change})
