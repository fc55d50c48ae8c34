"""Rivals' formulas, against numbers computed by hand."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.judging import peers
from benchmarks.judging.snapshot import take
from lightning_gradguard import Fault


def _tensors(*gradients, weights=None):
    """Return named parameters with these gradients; weights default to one."""
    named = []
    for i, gradient in enumerate(gradients):
        gradient = torch.tensor(gradient)
        parameter = torch.nn.Parameter(
            torch.ones_like(gradient) if weights is None else torch.tensor(weights[i])
        )
        parameter.grad = gradient
        named.append((f"layers.{i}.weight", parameter))
    return named


def _check(rules, named, *, step=0, score=0.0, before=None):
    return {a.fault: a.parameters for a in rules.check(take(step, score, named, before or {}))}


def test_snapshot_of_handmade_gradients():
    named = _tensors([[3.0, 0.0], [0.0, 0.0]], [4.0, -2.0])
    named.append(("untouched", torch.nn.Parameter(torch.ones(2))))
    before = {"layers.0.weight": torch.full((2, 2), 0.5)}
    shot = take(7, 0.25, named, before)
    assert shot.names == ("layers.0.weight", "layers.1.weight")
    assert (shot.step, shot.score, shot.weights, shot.nonfinite) == (7, 0.25, (0,), ())
    assert shot.mean_abs == (0.75, 3.0)
    assert shot.norms == pytest.approx((3.0, math.sqrt(20)))
    assert shot.zeros == (0.75, 0.0)
    assert shot.zero_rows == (0.5, 0.0)
    assert shot.updates[0] == shot.update_norms[0] == 1.0
    assert math.isnan(shot.updates[1])


@pytest.mark.parametrize(
    ("first", "last", "score", "expected"),
    [
        (0.9e-4, 0.1, 0.0, {Fault.VANISHING}),  # ratio 0.9e-3
        (1.1e-4, 0.2, 0.0, set()),  # ratio small, but the norm is above 1e-4
        (0.9e-4, 0.08, 0.0, set()),  # norm small, but the ratio is above 1e-3
        (71.0, 1.0, 0.0, {Fault.EXPLODING}),
        (69.0, 1.0, 0.0, set()),
        (0.0, 0.0, 0.0, {Fault.DEAD}),
        (math.inf, 1.0, 0.9, {Fault.NONFINITE}),
    ],
)
def test_autotrainer(first, last, score, expected):
    rules, found = peers.AutoTrainer(100), {}
    for step in range(40):
        found = found or _check(rules, _tensors([[first]], [[last]]), step=step, score=score)
    assert set(found) == expected


def test_autotrainer_needs_low_accuracy_and_a_third_of_training():
    rules = peers.AutoTrainer(100)
    for step in range(40):
        # From 0.5 to 0.9: a gain of 0.4 in one epoch.
        found = _check(rules, _tensors([[71.0]], [[1.0]]), step=step, score=0.5 if step < 10 else 0.9)
        assert not found
    rules = peers.AutoTrainer(100)
    assert not any(_check(rules, _tensors([[71.0]], [[1.0]]), step=step) for step in range(30))


@pytest.mark.parametrize(
    ("gradients", "moved", "expected"),
    [
        ([[0.9e-7]], 1e-3, {Fault.VANISHING}),
        ([[1.1e-7]], 1e-3, set()),
        ([[1.0], [0.0], [0.0]], 1e-3, {Fault.DEAD}),
        ([[1.0], [0.0]], 1e-3, set()),
        ([[1.0]], 10.5, {Fault.OVERSIZED_UPDATE}),
        ([[1.0]], 9.5, set()),
        ([[1.0]], 0.0, {Fault.STALLED}),
        ([[math.nan]], 1e-3, {Fault.NONFINITE}),
    ],
)
def test_sagemaker(gradients, moved, expected):
    named = _tensors(gradients)
    before = {name: p.detach() / (1 + moved) for name, p in named}
    assert set(_check(peers.SageMaker(), named, before=before)) == expected


@pytest.mark.parametrize(
    ("course", "moved", "expected"),
    [
        ([0.9e-6], 1e-3, {Fault.VANISHING}),
        ([1.1e-6], 1e-3, set()),
        ([1.0, 0.5, 0.25, 0.125, 0.0625], 1e-3, {Fault.VANISHING}),
        ([1.0, 0.5, 0.25, 0.125, 0.07], 1e-3, set()),
        ([1.1e6], 1e-3, {Fault.EXPLODING}),
        ([1.0, 2.0, 4.0, 8.0, 16.0], 1e-3, {Fault.EXPLODING}),
        ([1.0], 0.11, {Fault.OVERSIZED_UPDATE}),
        ([1.0], 0.09, set()),
        ([1.0], 0.9e-4, {Fault.STALLED}),
        ([1.0], 0.0, {Fault.STALLED}),
    ],
)
def test_thedeepchecker(course, moved, expected):
    rules = peers.TheDeepChecker()
    for step in range(11):
        value = course[max(0, step - 11 + len(course))]
        named = _tensors([[value]])
        weight = named[0][1].detach().double()
        named[0] = (named[0][0], torch.nn.Parameter(weight))
        named[0][1].grad = torch.tensor([[value]], dtype=torch.float64)
        found = _check(rules, named, step=step, before={"layers.0.weight": weight.float() / (1 + moved)})
        assert not found or step == 10
    assert set(found) == expected


@pytest.mark.parametrize(
    ("means", "zero_share", "epochs", "expected"),
    [
        ([1e-4, 1e-1, 1e2], 0.0, 1, {Fault.VANISHING}),  # each layer is 0.001 of the next
        ([1.0, 50.0, 2500.0], 0.0, 1, {Fault.EXPLODING}),  # median 50
        ([1.0, 9.0, 81.0], 0.0, 1, set()),
        ([0.9e-7, 0.9e-7, 0.9e-7], 0.0, 1, {Fault.VANISHING}),
        ([1.0, 0.0009, 0.0000008], 0.0, 1, {Fault.EXPLODING}),  # each layer is more than 1,000 times the next
        ([1.0, 1.0, 1.0], 0.25, 5, {Fault.DEAD}),
        ([1.0, 1.0, 1.0], 0.25, 4, set()),
        ([1.0, 1.0, 1.0], 0.0, 5, set()),
    ],
)
def test_bttackler(means, zero_share, epochs, expected):
    rules = peers.BTTackler(300)
    rows = int(4 * zero_share)
    named = _tensors(*[[[4 * m / (4 - rows)] if i >= rows else [0.0] for i in range(4)] for m in means])
    found = {}
    for step in range(10 * epochs):
        found = found or _check(rules, named, step=step)
    assert set(found) == expected


def test_bttackler_reports_no_vanishing_in_second_half():
    rules = peers.BTTackler(20)
    found = [_check(rules, _tensors([[1e-9]], [[1e-9]]), step=step) for step in range(10, 30)]
    assert not any(found)
