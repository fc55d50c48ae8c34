import base64
import json
import math

import numpy as np
import pytest

from lightning_gradguard.html_report import figures
from lightning_gradguard.html_report.event_reader import Track, read_runs


def cells_of(heat):
    cells = np.frombuffer(base64.b64decode(heat["cells"]), "<i2")
    return cells.reshape(len(heat["names"]), heat["columns"])


def track_of(*rows, layers=("net.a", "net.b")):
    return Track(layers, {step: np.array(row, dtype=np.float16) for step, row in enumerate(rows)})


def test_a_heat_map_has_the_values_of_the_rows():
    heat = figures.heat_map(track_of([0, -1.5, -2], [1, -math.inf, math.nan], [2, -3, -13], [0, 1, -30]))
    assert cells_of(heat).tolist() == [[-150, -32768, -300, 100], [-200, 32767, -1200, -1200]]
    assert (heat["names"], heat["clipped"], heat["skipped"]) == (["net.a", "net.b"], [1], [2])
    assert (heat["first"], heat["stride"]) == (0, 1)


@pytest.mark.parametrize(("kind", "layers"), [("healthy", 5), ("nan", 30)])
def test_a_heat_map_is_the_picture_that_the_run_drew(begun, kind, layers):
    run = begun(layers=layers, kind=kind, steps=500)
    (read,) = read_runs([run.write()])
    heat = figures.heat_map(read.tracks["gradguard"])
    picture = run.overview._heatmap
    assert (heat["stride"], heat["columns"]) == (picture.stride, len(picture.cells))
    drawn = np.where(np.isnan(picture.cells.T), 327.67, picture.cells.T)
    # Half precision, and steps that were kept for their mark, count in the mean as well.
    assert np.abs(cells_of(heat) / 100 - drawn).max() < 0.05
    state = picture.state_dict()
    assert heat["clipped"] == [i for i, flag in enumerate(state["clipped"]) if flag]
    assert heat["skipped"] == [i for i, flag in enumerate(state["skipped"]) if flag]


def test_without_a_guard_it_is_built_from_histograms():
    counts = np.zeros(30, dtype=np.float32)
    counts[[0, 20]] = 50  # half of them zero, half at 10^-2 to 10^-1.5
    histograms = {"000_a": {0: counts, 10: 0 * counts}, "001_b": {0: counts * (np.arange(30) == 0)}}
    heat = figures.heat_map(Track(histograms=histograms))
    assert heat["names"] == ["a", "b"]
    assert heat["columns"] == 1 or heat["stride"] > 1
    cells = cells_of(heat)
    assert cells[0, 0] == pytest.approx(-175 + 50 * math.log10(0.5), abs=2)
    assert cells[0, -1] == 32767  # what is not finite is not counted
    assert cells[1, 0] == -1200


def test_nothing_to_draw():
    assert figures.heat_map(Track()) is None


@pytest.mark.parametrize("layers", [1, 150, 500, 3000])
def test_a_heat_map_is_bounded(layers):
    rows = [[0, *[-2.0] * layers]] * 300
    heat = figures.heat_map(track_of(*rows, layers=[f"layer{i}" for i in range(layers)]))
    assert len(heat["cells"]) <= 2.7 * max(figures.CELLS, 16 * layers)
    assert (cells_of(heat) == -200).all()


def test_a_short_curve_is_kept_as_it_is():
    shown = figures.curve({0: 1.23456, 5: math.nan, 9: -2e-5})
    assert shown == {"steps": [0, 5, 9], "values": [1.235, None, -2e-5]}


def test_a_long_curve_keeps_its_extremes_and_gaps():
    points = {step: math.sin(step) for step in range(10_000)}
    points |= {1234: 99.0, 5678: -99.0, 7777: math.nan}
    shown = dict(zip(*figures.curve(points).values(), strict=True))
    assert len(shown) <= figures.POINTS
    assert (shown[1234], shown[5678], shown[7777]) == (99.0, -99.0, None)
    assert {0, 9999} <= shown.keys()
    assert list(shown) == sorted(shown)


def test_histograms_are_shares():
    counts = {
        step: np.eye(30, dtype=np.float32)[3] * 10 + np.eye(30, dtype=np.float32)[4] * 30 for step in (0, 7)
    }
    shown, left_out = figures.histograms(Track(histograms={"000_a": counts}))
    shares = np.frombuffer(base64.b64decode(shown["000_a"]["shares"]), np.uint8).reshape(2, 30)
    assert (shares / 255.0)[0, 3:5] ** 2 == pytest.approx([0.25, 0.75], abs=0.01)
    assert (shares > 0).sum() == 4
    assert (shown["000_a"]["steps"], shown["000_a"]["last"], left_out) == ([0, 7], 7, 0)


@pytest.mark.parametrize(("tensors", "steps"), [(3, 1000), (300, 100), (1000, 20)])
def test_histograms_are_bounded(tensors, steps):
    counts = {10 * step: np.ones(30, dtype=np.float32) for step in range(steps)}
    shown, left_out = figures.histograms(Track(histograms={f"{i:03}_t": counts for i in range(tensors)}))
    assert len(shown) + left_out == tensors
    assert len(json.dumps(shown)) < 800_000
    assert all(len(h["steps"]) <= figures.STEPS and h["steps"][0] == 0 for h in shown.values())
