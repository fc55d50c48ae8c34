"""Colours, bins and picture of a heat map, and labels."""

import io
import math
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
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
    CLIPPED_COLOUR,
    NONFINITE_COLOUR,
    SCALE,
    Marks,
    Title,
    bin_rows,
    draw,
    elide,
    paint,
)

MAGENTA, ORANGE, GREY = (to_rgb(c) for c in (NONFINITE_COLOUR, CLIPPED_COLOUR, BLANK_COLOUR))
#: Twice what a TensorBoard card shows.
SIZE = (430, 730, 3)
#: Rows of the title, and of the faults without a title, pixels.
TITLE, FAULTS = 87, 36
DECADES = st.floats(-12, 4) | st.sampled_from([math.nan, -math.inf])


def picture(
    cells, names=None, first=0, stride=1, clipped=(), skipped=(), faults=None, title=None, left_out=0
):
    cells = np.asarray(cells, dtype=np.float32)
    columns = cells.shape[1]
    flags = [bytes(i in marked for i in range(columns)) for marked in (clipped, skipped)]
    names = names or [f"layer{i}" for i in range(len(cells))]
    png = draw(names, cells, first, stride, Marks(*flags, faults or {}), title, left_out)
    return imread(io.BytesIO(png))[..., :3]


def area(pixels, colour):
    return int((np.abs(pixels - colour).max(axis=-1) < 1 / 255).sum())


@pytest.mark.parametrize("layers", [1, 30, 65, 1000])
@pytest.mark.parametrize("columns", [1, 128])
def test_one_nonfinite_cell_is_seen(layers, columns):
    cells = np.full((layers, columns), -3.0)
    cells[layers // 2, columns // 2] = math.nan
    assert area(picture(cells), MAGENTA) >= 6


def test_is_of_the_size_of_a_card():
    assert picture([[0.0]]).shape == SIZE


def test_equal_values_have_equal_colours_in_all_runs():
    shared = np.linspace(-10, 2, 12).reshape(1, -1)
    narrow, wide = picture(shared), picture(np.concatenate([shared, np.full((1, 12), 300.0)]))
    places = np.linspace(110, 620, 12).astype(int)
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
    changed = (named != plain).any(axis=-1)
    assert changed[:FAULTS].sum() > 500
    assert not changed[FAULTS:].any()


def test_many_faults_at_once_do_not_cover_the_cells():
    faults = dict.fromkeys(
        ["nonfinite", "underflow", "exploding", "oversized_update", "spike", "stalled"], 50
    )
    cells = np.full((3, 100), -3.0)
    assert np.array_equal(picture(cells, faults=faults)[FAULTS:], picture(cells)[FAULTS:])


LEVELS = ["critical", "warning", "protected", "healthy"]


def test_each_level_has_a_colour_of_its_own():
    tops = [picture([[0.0]], title=Title(level, "x Finished"))[:TITLE] for level in LEVELS]
    assert not any(np.array_equal(a, b) for a, b in combinations(tops, 2))


@pytest.mark.parametrize("main", ["x Finished", "x " + "Ended by an error (SomeVeryLongExceptionName) " * 5])
@pytest.mark.parametrize("detail", ["", "since step 3, worst in w", "a, in $x^2$ " * 40, "y" * 500])
def test_a_title_of_any_length_leaves_the_right_edge_and_the_cells_alone(main, detail):
    title = Title("critical", main, detail)
    shown, plain = picture([[0.0]], title=title), picture([[0.0]])
    assert (shown[:TITLE, -8:] == plain[0, 0]).all()
    cells = slice(TITLE + FAULTS, -65), slice(110, 640)
    assert np.array_equal(shown[cells], plain[cells])


def test_the_row_of_the_worst_tensor_is_marked_whatever_the_number_of_rows():
    for layers in (3, 30, 300):
        cells, names = np.full((layers, 4), -3.0), [f"net.layer{i}" for i in range(layers)]
        titles = [
            Title("critical", "x Halted", where=where) for where in (f"{names[-1]}.weight", "other.weight")
        ]
        marked, plain = (picture(cells, names=names, title=title) for title in titles)
        assert (marked != plain).any(axis=-1).sum() > 100


def test_layers_without_a_row_are_counted_below():
    shown, plain = picture([[0.0]], left_out=12), picture([[0.0]])
    changed = (shown != plain).any(axis=(1, 2)).nonzero()[0]
    assert changed.min() > SIZE[0] - 40


#: Machado, Oliveira and Fernandes 2009, full deficiency, on linear RGB.
VISION = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
}


def seen(decades, vision):
    """Return CIE Lab of cells as somebody sees them."""
    rgb = paint(np.array([decades]))[0, :, :3] / 255
    linear = (
        np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.array(VISION[vision]).T
    )
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear.clip(0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1)


@pytest.mark.parametrize("vision", VISION)
def test_small_usual_and_large_gradients_and_what_is_no_number_differ_for_everybody(vision):
    healthy, tiny, huge = (seen([x], vision)[0] for x in (-3.0, -8.0, 1.0))
    for a, b in ((healthy, tiny), (healthy, huge), (tiny, huge)):
        assert np.linalg.norm(a - b) > 40
    scale = seen(np.linspace(*SCALE, 121), vision)
    for other in seen([math.nan, -math.inf], vision):
        assert np.linalg.norm(scale - other, axis=-1).min() > 15


def test_the_usual_size_is_clearly_coloured():
    assert np.linalg.norm(seen(np.linspace(-5, -2, 31), "usual")[:, 1:], axis=-1).min() > 25


@pytest.mark.parametrize("name", ["$x", "$x^2$", "\\frac", "层", "a" * 500, " ", "_"])
def test_any_name_can_be_drawn(name):
    assert picture([[0.0], [0.0]], names=["first", name]).shape == SIZE


@pytest.mark.parametrize(("first", "stride"), [(0, 1), (10**7, 10**6), (999, 2)])
def test_any_step_can_be_drawn(first, stride):
    assert picture([[0.0] * 128], first=first, stride=stride).shape == SIZE


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


@given(name, st.integers(5, 60))
def test_names_are_shortened_in_the_middle(full, room):
    short = elide(full, room)
    assert len(short) <= room
    assert (short == full) == (len(full) <= room)
    if short != full:
        begin, end = short.split("...")[0], short.split("...")[-1]
        assert full.startswith(begin)
        assert full.endswith(end)
        assert begin
        assert end


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
