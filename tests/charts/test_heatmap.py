import io
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import lightning_gradguard
from lightning_gradguard.charts.heatmap import Marks, draw

MAGENTA, ORANGE, GREY = (to_rgb(c) for c in ("magenta", "darkorange", "lightgrey"))


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
    calm, wild = picture(shared), picture(np.concatenate([shared, np.full((1, 12), 300.0)]))
    places = np.linspace(200, 610, 12).astype(int)
    assert np.array_equal(calm[160, places], wild[160, places])


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
    assert area(picture([[-10.0, 0.0]]), GREY) < 500  # rims of letters


@pytest.mark.parametrize("step", [0, 50, 99, -20, 500])
def test_a_fault_is_named(step):
    cells = np.full((3, 100), -3.0)
    named, plain = picture(cells, faults={"vanishing": step}), picture(cells)
    assert area(named[:90], (0, 0, 0)) > area(plain[:90], (0, 0, 0)) + 50
    assert np.array_equal(named[120:], plain[120:])


def test_many_faults_at_once_leave_the_cells_alone():
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


def test_leaves_pyplot_and_its_state_alone():
    code = (
        "import sys, numpy as np; from lightning_gradguard.charts.heatmap import Marks, draw;"
        "assert 'matplotlib' not in sys.modules;"
        "draw(['a'], np.zeros((1, 1), np.float32), 0, 1, Marks(b'0', b'0', {}));"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(lightning_gradguard.__file__).parents[1]
    )
