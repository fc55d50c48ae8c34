"""Gradients that are never zeroed."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_gradguard.engine.carried_gradients import CarriedGradients
from lightning_gradguard.introspection.graph_problems import Problem
from tests.detectors.small_trainings import adam, mlp, sgd, templates, train


def clip(model, optimizer, scaling):
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(sgd(0.02), {}), (adam(1e-3), {}), (sgd(0.05), {"clip": clip}), (sgd(0.02), {"micro": 4})],
)
def test_are_found_in_the_first_steps(optimizer, options):
    out = train(mlp(), templates(), optimizer, zero="never", steps=12, **options)
    assert "zero_grad" in out.said
    assert out.said.count("never zeroed") == 1


@pytest.mark.parametrize("zero", ["none", "in place"])
@pytest.mark.parametrize("micro", [1, 4])
def test_zeroing_is_quiet(zero, micro):
    assert train(mlp(), templates(), sgd(0.05), zero=zero, micro=micro, steps=40).said == ""


def test_one_batch_again_and_again_is_quiet():
    batch = templates()(64, torch.Generator().manual_seed(0))
    assert train(mlp(), lambda size, generator: batch, sgd(0.05), zero="in place", steps=40).said == ""


def test_what_follows_is_blamed_on_them():
    out = train(mlp(), templates(), sgd(0.02), zero="never", steps=140)
    assert out.found[0] == "exploding"
    assert out.cause == "stale_gradients"
    assert "zero_grad" in out.fix


def test_only_windows_in_a_row_make_it_certain():
    carried = CarriedGradients()
    for window in (1.0, 1.0, 0.0, 1.0, math.nan, 1.0):
        carried.count(window)
        assert carried.problems() == ()
    carried.count(1.0)
    assert [problem.kind for problem in carried.problems()] == [Problem.STALE_GRADIENTS]


def test_no_hook_stays_on_the_parameters():
    model = mlp()
    train(model, templates(), sgd(0.05), zero="in place", steps=60)
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_guard_that_observes_can_be_copied():
    out = train(mlp(), templates(), sgd(0.02), zero="never", steps=3)
    again = copy.deepcopy(out.guard)
    assert again.state_dict()["watch"]["carried"] == out.guard.state_dict()["watch"]["carried"]
    out.guard.close()
