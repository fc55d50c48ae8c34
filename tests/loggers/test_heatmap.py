import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.charts import BLANK
from lightning_gradguard.loggers.heatmap import Heatmap

value = st.none() | st.sampled_from([0.0, math.nan, math.inf, 1e-40, 1e40]) | st.floats(1e-10, 1e2)
rows = st.lists(value, min_size=2, max_size=2)


def column_of(heatmap: Heatmap, step: int) -> np.ndarray:
    return heatmap.cells[step // heatmap.stride]


@given(st.lists(rows, min_size=1, max_size=200), st.sampled_from([2, 4, 8]))
def test_merging_bounds_the_columns_and_never_loses_a_nonfinite_value(steps, columns):
    heatmap = Heatmap(["a", "b"], columns)
    for step, values in enumerate(steps):
        heatmap.record(step, values)
    assert heatmap.cells.shape[0] <= columns
    for step, values in enumerate(steps):
        for cell, x in zip(column_of(heatmap, step), values, strict=True):
            if x is not None and not math.isfinite(x):
                assert math.isnan(cell)
            assert x is None or cell != BLANK


@given(st.lists(st.floats(1e-9, 1e2), min_size=1, max_size=8))
def test_is_exact_while_there_is_room(values):
    heatmap = Heatmap(["a"], 8)
    for step, x in enumerate(values):
        heatmap.record(step, [x])
    assert heatmap.cells[:, 0] == pytest.approx(np.log10(values), abs=1e-5)


def test_a_merged_cell_is_the_mean():
    heatmap = Heatmap(["a", "b"], 4)
    for step in range(8):
        heatmap.record(step, [10.0**-step, None if step % 2 else 1e-4])
    assert heatmap.stride == 2
    assert heatmap.cells[:, 0].tolist() == pytest.approx([-0.5, -2.5, -4.5, -6.5])
    assert heatmap.cells[:, 1].tolist() == pytest.approx([-4.0] * 4)


@pytest.mark.parametrize("zero", [0.0, 1e-300])
def test_zero_is_the_end_of_the_scale(zero):
    heatmap = Heatmap(["a"])
    heatmap.record(0, [zero])
    assert heatmap.cells.tolist() == [[-12.0]]


def test_without_a_gradient_a_cell_is_blank():
    heatmap = Heatmap(["a", "b"])
    heatmap.record(0, [None, 1.0])
    assert heatmap.cells.tolist() == [[BLANK, 0.0]]


def test_memory_and_work_do_not_grow_with_the_run():
    heatmap = Heatmap([f"layer{i}" for i in range(30)], 128)
    recorded, sizes = 0, []
    for step in range(20_000):
        if heatmap.starts_column(step):
            heatmap.record(step, [1e-3] * 30)
            recorded += 1
        heatmap.mark(step, clipped=True)
        if step >= 200:
            sizes.append(heatmap.cells.nbytes)
    assert max(sizes) <= 128 * 30 * 4
    assert len(pickle.dumps(heatmap)) < 40_000
    # 128 at first, then half as many for each doubling.
    assert recorded <= 128 * math.ceil(math.log2(20_000 / 128)) + 128


@pytest.mark.parametrize("first", [0, 7, 123_456])
def test_one_step_starts_each_column(first):
    heatmap = Heatmap(["a"], 4)
    wanted = []
    for step in range(first, first + 32):
        if heatmap.starts_column(step):
            wanted.append(step - first)
            heatmap.record(step, [1.0])
    assert wanted == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24]


def test_a_gap_in_the_steps_stays_blank():
    heatmap = Heatmap(["a"], 4)
    heatmap.record(0, [1.0])
    heatmap.record(1000, [1.0])
    cells = heatmap.cells[:, 0]
    assert len(cells) <= 4
    assert cells[0] == cells[-1] == 0
    assert (cells[1:-1] == BLANK).all()


def test_an_earlier_step_starts_the_picture_again():
    heatmap = Heatmap(["a"], 4)
    for step in range(100, 200):
        heatmap.record(step, [1.0])
    assert heatmap.starts_column(3)
    heatmap.record(3, [1e-2])
    assert heatmap.cells.tolist() == [[-2.0]]
    assert heatmap.stride == 1


@given(st.lists(rows, max_size=30), st.lists(rows, max_size=30), st.booleans())
def test_resumes_as_if_it_had_not_stopped(before, after, skipped):
    whole = Heatmap(["a", "b"], 4)
    for step, values in enumerate(before):
        whole.record(step, values)
        whole.mark(step, clipped=bool(step % 3), skipped=skipped)
        whole.mark_fault(step, "spike")
    resumed = Heatmap(["a", "b"], 4)
    resumed.load_state_dict(whole.state_dict())
    for step, values in enumerate(after, len(before)):
        assert resumed.starts_column(step) == whole.starts_column(step)
        for heatmap in (whole, resumed):
            heatmap.record(step, values)
    np.testing.assert_equal(resumed.state_dict(), whole.state_dict())


def test_returns_what_is_new_in_a_column():
    heatmap = Heatmap(["a", "b"], 2)
    assert not heatmap.record(0, [1.0, None])
    assert heatmap.record(1, [math.nan, 1.0])
    assert heatmap.mark(1, clipped=True)
    assert heatmap.mark(1, skipped=True)
    heatmap.record(2, [1.0, 1.0])  # merges the columns
    assert not heatmap.record(1, [math.nan, 1.0])
    assert heatmap.record(1, [1.0, math.inf])
    assert not heatmap.mark(0, clipped=True, skipped=True)
    assert heatmap.mark(2, clipped=True)


def test_state_is_plain(tmp_path):
    heatmap = Heatmap(["a", "b"])
    heatmap.record(5, [math.nan, None])
    heatmap.mark(5, skipped=True)
    heatmap.mark_fault(5, "nonfinite")
    torch.save(heatmap.state_dict(), tmp_path / "state.pt")
    np.testing.assert_equal(torch.load(tmp_path / "state.pt", weights_only=True), heatmap.state_dict())


@pytest.mark.parametrize("other", [Heatmap(["c"]), Heatmap(["a"], 2)])
def test_state_of_another_model_is_ignored(other):
    heatmap = Heatmap(["a"])
    for step in range(10):
        heatmap.record(step, [1.0])
    other.load_state_dict(heatmap.state_dict())
    assert other.cells.size == 0


def test_snapshot_is_independent():
    heatmap = Heatmap(["a"])
    heatmap.record(0, [1.0])
    snapshot = heatmap.snapshot()
    heatmap.record(0, [math.nan])
    heatmap.record(1, [1.0])
    assert snapshot.cells.tolist() == [[0.0]]


@pytest.mark.parametrize("columns", [0, 1, 3, -2])
def test_refuses_columns_that_cannot_be_paired(columns):
    with pytest.raises(ValueError, match=f"columns must be even and at least 2, got {columns}"):
        Heatmap(["a"], columns)


def test_refuses_no_layers():
    with pytest.raises(ValueError, match="names must hold at least one layer, got none"):
        Heatmap([])


def test_a_fault_is_marked_at_its_first_step():
    heatmap = Heatmap(["a"])
    for step in range(10):
        heatmap.record(step, [1.0])
    for step in (3, 9):
        heatmap.mark_fault(step, "spike")
    heatmap.mark_fault(5, "dead")
    assert heatmap.marks.faults == {"spike": 3, "dead": 5}
