"""A ring is the tail of a list, whatever is added and however it is resized."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard import Guard, NormClip
from lightning_gradguard.engine.history import History
from lightning_gradguard.results import Report

NAMES = ("a", "b", "c")
SCALARS = ("loss", "total_norm", "clipped_norm", "threshold", "scale")
NUMBERS = st.floats(width=32)
KNOWN = st.none() | NUMBERS


def reports():
    return st.builds(
        Report,
        step=st.integers(0, 2**62),
        loss=KNOWN,
        total_norm=NUMBERS,
        clipped_norm=NUMBERS,
        threshold=KNOWN,
        scale=NUMBERS,
        skip=st.booleans(),
        norms=st.dictionaries(st.sampled_from((*NAMES, "other")), st.floats(0, 2.0**99, width=32)),
    )


def assert_is(history, kept):
    """The table holds these reports, and nothing else."""
    table = history.table()
    assert len(history) == len(kept)
    assert table["step"].tolist() == [r.step for r in kept]
    assert table["skip"].tolist() == [r.skip for r in kept]
    for name in SCALARS:
        expected = [math.nan if (x := getattr(r, name)) is None else x for r in kept]
        assert np.array_equal(table[name], np.array(expected, np.float32), equal_nan=True)
    norms = np.array([[r.norms.get(n, math.nan) for n in NAMES] for r in kept], np.float32)
    assert np.array_equal(table["norms"], norms.reshape(len(kept), len(NAMES)), equal_nan=True)


@given(added=st.lists(reports(), max_size=12), steps=st.integers(1, 5))
def test_it_is_the_tail_of_a_list(added, steps):
    history = History(NAMES, (1, 2, 3), steps)
    for i, report in enumerate(added, 1):
        history.add(report)
        assert_is(history, added[:i][-steps:])


@given(
    before=st.lists(reports(), max_size=8),
    after=st.lists(reports(), max_size=8),
    old=st.integers(1, 5),
    new=st.integers(1, 9),
)
def test_resizing_keeps_the_newest(before, after, old, new):
    history = History(NAMES, (1, 2, 3), old)
    for report in before:
        history.add(report)
    history.resize(new)
    kept = before[-old:][-new:]
    assert history.steps == new
    assert_is(history, kept)
    for report in after:
        history.add(report)
    assert_is(history, [*kept, *after][-new:])


def report_with(norms):
    total = math.sqrt(sum(x * x for x in norms.values()))
    return Report(0, 1.0, total, total, None, 1.0, skip=False, norms=norms)


def test_not_finite_is_told_from_no_gradient():
    history = History(NAMES, (1, 1, 1))
    history.add(report_with({"a": math.nan, "b": math.inf}))
    history.add(report_with({"a": math.inf, "c": 0.0}))
    table = history.table()["norms"]
    assert np.array_equal(
        table, np.float32([[math.inf, math.inf, math.nan], [math.inf, math.nan, 0]]), equal_nan=True
    )


def test_a_table_is_a_copy_of_plain_types():
    history = History(NAMES, (1, 2, 3), steps=4)
    history.add(report_with({"a": 1.0}))
    table = history.table()
    kinds = {name: (column.dtype.name, column.shape) for name, column in table.items()}
    assert kinds == {
        "step": ("int64", (1,)),
        **{name: ("float32", (1,)) for name in SCALARS},
        "skip": ("bool", (1,)),
        "norms": ("float32", (1, 3)),
    }
    table["norms"][:] = 5.0
    assert history.table()["norms"][0, 0] == 1.0


@pytest.mark.parametrize("steps", [0, -1, 1.5, None, "8"])
def test_wrong_sizes_are_refused(steps):
    with pytest.raises(ValueError, match=r"steps must be a positive whole number.*got"):
        History(NAMES, (1, 2, 3), steps)
    history = History(NAMES, (1, 2, 3), 2)
    history.add(report_with({"a": 1.0}))
    with pytest.raises(ValueError, match="steps must be"):
        history.resize(steps)
    assert (history.steps, len(history)) == (2, 1)


def test_a_size_for_each_name():
    with pytest.raises(ValueError, match=r"numel must hold one number for each of 3 names, got 2"):
        History(NAMES, (1, 2))


def guarded(**options):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.01)
    return model, optimizer, Guard(model.named_parameters(), optimizer=optimizer, **options)


def train(model, optimizer, guard, steps):
    """Takes steps, every third of which is not finite, and returns their reports."""
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 3) * (math.nan if step % 3 == 2 else 1)
        loss = model(x).square().mean()
        loss.backward()
        report = guard.step(loss=loss)
        seen.append(guard.report)
        if not report.skip:
            optimizer.step()
    return seen


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_a_guard_fills_it(lag):
    model, optimizer, guard = guarded(clipper=NormClip(0.01), lag=lag)
    assert (guard.history.names, guard.history.numel) == (("0.weight", "0.bias"), (12, 4))
    guard.history.resize(4)
    seen = train(model, optimizer, guard, 7)
    guard.close()
    judged = list({r.step: r for r in [*seen, guard.report]}.values())
    table = guard.history.table()
    assert table["step"].tolist() == [3, 4, 5, 6]
    assert table["skip"].tolist() == [False, False, True, False]
    for name in SCALARS:
        expected = np.float32([getattr(r, name) for r in judged[-4:]])
        assert np.array_equal(table[name], expected, equal_nan=True)
    finite = [[r.norms[n] for n in guard.history.names] for r in judged[-4:] if not r.skip]
    assert np.array_equal(table["norms"][~table["skip"]], np.float32(finite))
    assert np.isinf(table["norms"][table["skip"]]).all()


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_it_starts_anew_with_other_parameters():
    model, optimizer, guard = guarded()
    guard.history.resize(5)
    train(model, optimizer, guard, 2)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, optimizer, guard, 2)
    assert (len(guard.history), guard.history.steps) == (2, 5)
    assert guard.history.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert np.isfinite(guard.history.table()["norms"]).all()


def test_steps_without_gradients_are_not_kept():
    model, _, guard = guarded()
    guard.step(loss=model(torch.ones(1, 3)).sum())
    guard.step(loss=1.0)
    assert len(guard.history) == guard.counts["judged"]
