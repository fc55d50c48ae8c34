"""One set of colours for every picture of layers by steps."""

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from lightning_gradguard.charts import heatmap as drawing
from lightning_gradguard.charts.heatmap import (
    BLANK_COLOUR,
    NONFINITE_COLOUR,
    SCALE,
    Marks,
    bin_rows,
    draw,
    paint,
)

DECADES = st.floats(-12, 4) | st.sampled_from([math.nan, -math.inf])


@pytest.mark.parametrize("value", [-30.0, -10.0, -4.2, 0.0, 2.0, 30.0, math.nan, -math.inf])
def test_the_picture_in_tensorboard_has_them_too(value):
    picture = imread(io.BytesIO(draw(["a"], np.float32([[value]]), 0, 1, Marks(b"\0", b"\0", {}))))
    assert np.abs(255 * picture[300, 400] - paint(np.array([[value]]))[0, 0]).max() <= 1
    assert drawing.SCALE == SCALE


def test_what_is_no_number_has_colours_of_its_own():
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
