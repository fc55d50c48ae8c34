"""Colours, bins and picture of a heat map, and labels."""

import io
import math
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.image import imread

import lightning_gradguard
from lightning_gradguard.charts import (
    BLANK_COLOUR,
    NONFINITE_COLOUR,
    Marks,
    bin_rows,
    draw,
    paint,
    shorten,
    without_prefix,
)

MAGENTA, ORANGE, GREY = (to_rgb(c) for c in ("magenta", "darkorange", "lightgrey"))
DECADES = st.floats(-12, 4) | st.sampled_from([math.nan, -math.inf])


def picture(cells, names=None, first=0, stride=1, clipped=(), skipped=(), faults=None):
    cells = np.asarray(cells, dtype=np.float32)
    columns = cells.shape[1]
    flags = [bytes(i in marked for i in range(columns)) for marked in (clipped, skipped)]
    names = names or [f"layer{i}" for i in range(len(cells))]
    return imread(io.BytesIO(draw(names, cells, first, stride, Marks(*flags, faults or {}))))[..., :3]


def area(pixels, colour):
    return int((np.abs(pixels - colour).max(axis=-1) < 1 / 255).sum())


@pytest.mark.parametrize("layers", [1, 30, 65, 1000])
@pytest.mark.parametrize("columns", [1, 128])
def test_one_nonfinite_cell_is_seen(layers, columns):
    cells = np.full((layers, columns), -3.0)
    cells[layers // 2, columns // 2] = math.nan
    assert area(picture(cells), MAGENTA) >= 6


def test_is_of_the_size_of_a_card():
    assert picture([[0.0]]).shape == (480, 720, 3)


def test_equal_values_have_equal_colours_in_all_runs():
    shared = np.linspace(-10, 2, 12).reshape(1, -1)
    narrow, wide = picture(shared), picture(np.concatenate([shared, np.full((1, 12), 300.0)]))
    places = np.linspace(200, 610, 12).astype(int)
    assert np.array_equal(narrow[160, places], wide[160, places])


@pytest.mark.parametrize(("beyond", "end"), [(-30.0, -10.0), (30.0, 2.0)])
def test_beyond_the_scale_is_its_end(beyond, end):
    assert np.array_equal(picture([[beyond]]), picture([[end]]))


@pytest.mark.parametrize(
    ("marks", "colour"),
    [({"clipped": [7]}, ORANGE), ({"skipped": [7]}, MAGENTA), ({"clipped": range(128)}, ORANGE)],
)
def test_marks_are_seen(marks, colour):
    cells = np.full((3, 128), -3.0)
    assert area(picture(cells), colour) == 0
    assert area(picture(cells, **marks), colour) >= 20 * len(next(iter(marks.values())))


def test_no_gradient_is_grey():
    assert area(picture([[-math.inf, 0.0]]), GREY) > 10_000
    assert area(picture([[-10.0, 0.0]]), GREY) < 500  # edges of characters


@pytest.mark.parametrize("step", [0, 50, 99, -20, 500])
def test_a_fault_is_named(step):
    cells = np.full((3, 100), -3.0)
    named, plain = picture(cells, faults={"vanishing": step}), picture(cells)
    assert area(named[:90], (0, 0, 0)) > area(plain[:90], (0, 0, 0)) + 50
    assert np.array_equal(named[120:], plain[120:])


def test_many_faults_at_once_do_not_cover_the_cells():
    faults = dict.fromkeys(
        ["nonfinite", "underflow", "exploding", "oversized_update", "spike", "stalled"], 50
    )
    cells = np.full((3, 100), -3.0)
    assert np.array_equal(picture(cells, faults=faults)[120:], picture(cells)[120:])


@pytest.mark.parametrize("name", ["$x", "$x^2$", "\\frac", "层", "a" * 500, " ", "_"])
def test_any_name_can_be_drawn(name):
    assert picture([[0.0], [0.0]], names=["first", name]).shape == (480, 720, 3)


@pytest.mark.parametrize(("first", "stride"), [(0, 1), (10**7, 10**6), (999, 2)])
def test_any_step_can_be_drawn(first, stride):
    assert picture([[0.0] * 128], first=first, stride=stride).shape == (480, 720, 3)


def test_threads_do_not_disturb_each_other():
    cells = [np.full((5, 10), float(-i)) for i in range(4)]
    alone = [picture(c) for c in cells]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(picture, cells))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_does_not_import_pyplot():
    code = (
        "import sys, numpy as np; from lightning_gradguard.charts import Marks, draw;"
        "assert 'matplotlib' not in sys.modules;"
        "draw(['a'], np.zeros((1, 1), np.float32), 0, 1, Marks(b'0', b'0', {}));"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(lightning_gradguard.__file__).parents[1]
    )


@pytest.mark.parametrize("value", [-30.0, -10.0, -4.2, 0.0, 2.0, 30.0, math.nan, -math.inf])
def test_the_picture_for_tensorboard_has_the_painted_colours(value):
    picture = imread(io.BytesIO(draw(["a"], np.float32([[value]]), 0, 1, Marks(b"\0", b"\0", {}))))
    assert np.abs(255 * picture[300, 400] - paint(np.array([[value]]))[0, 0]).max() <= 1


def test_cells_that_are_no_number_have_their_own_colours():
    pixels = paint(np.array([[math.nan, -math.inf, math.inf]]))
    assert pixels[0, :2].tolist() == [
        [round(255 * x) for x in to_rgba(colour)] for colour in (NONFINITE_COLOUR, BLANK_COLOUR)
    ]
    assert pixels[0, 2].tolist() == paint(np.array([[2.0]]))[0, 0].tolist()


@given(
    cells=st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(DECADES, min_size=n, max_size=n), min_size=1, max_size=20)
    ),
    most=st.integers(1, 20),
)
def test_bins_show_one_of_their_rows_and_never_hide_what_is_not_finite(cells, most):
    names, cells = [str(i) for i in range(len(cells))], np.array(cells)
    shown, rows = bin_rows(names, cells, most)
    size = math.ceil(len(names) / most)
    assert shown == names[::size]
    assert rows.shape == (len(shown), cells.shape[1])
    assert len(shown) <= most
    for row, start in zip(rows, range(0, len(names), size), strict=True):
        group = cells[start : start + size]
        assert np.array_equal(np.isnan(row), np.isnan(group).any(axis=0))
        assert all(
            math.isnan(cell) or cell in column for cell, column in zip(row, group.T.tolist(), strict=True)
        )
        assert np.array_equal(np.isneginf(row), np.isneginf(group).all(axis=0))


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


def test_drawing_does_not_make_python_forget_which_warnings_were_shown(monkeypatch):
    entered = []
    enter = warnings.catch_warnings.__enter__

    def noted(self):
        entered.append(self)
        return enter(self)

    picture(np.zeros((3, 8)), clipped=[2], skipped=[3], faults={"dead": 4})  # imports are done now
    monkeypatch.setattr(warnings.catch_warnings, "__enter__", noted)
    picture(np.zeros((3, 8)), clipped=[2], skipped=[3], faults={"dead": 4})
    assert not entered
