"""A fix of NaN cures if forward and backward pass are finite with it, and stay so."""

import math

import pytest
import torch
from torch import nn

from lightning_gradguard.diagnosis.diagnosis import Remedy
from lightning_gradguard.diagnosis.nan_origin import find_origin
from lightning_gradguard.diagnosis.operation_fixes import find_operation_fixes
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.diagnosis.trials.cures import MAX_PASSES, is_cure, run_cure
from lightning_gradguard.introspection.sandbox import SandboxedStep


def step_of(loss, batch=None, rate=1e-3):
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    batch = torch.randn(6, 4) if batch is None else batch
    return SandboxedStep(net, lambda b: loss(net, b), batch, torch.optim.SGD(net.parameters(), rate))


def fix_of(step):
    origin = find_origin(step)
    return find_operation_fixes(origin.facts, origin.operation)[0]


def root(net, x):
    return (net(x) * 0).sqrt().mean()


def test_a_cure_takes_virtual_steps_and_leaves_no_trace():
    step = step_of(root)
    weight = step.module.weight.detach().clone()
    result = run_cure(step, (fix_of(step).change,))
    assert result.cured
    assert result.passes == 4
    assert torch.equal(step.module.weight, weight)
    assert step.module.weight.grad is None


def test_without_the_change_it_is_not_finite():
    result = run_cure(step_of(root), (Change(),))
    assert not result.cured
    assert result.passes == 1


def test_a_step_that_becomes_infinite_later_is_not_cured():
    result = run_cure(step_of(lambda net, x: net(x).square().square().sum(), rate=1e6), (Change(),))
    assert not result.cured
    assert 1 < result.passes < MAX_PASSES


def test_an_operation_that_does_not_run_again_was_not_tried():
    step, calls = step_of(root), []

    def loss_of(x):
        calls.append(0)
        return root(step.module, x) if len(calls) == 1 else step.module(x).mean()

    changed = SandboxedStep(step.module, loss_of, step.batch, step.optimizer)
    fix = fix_of(changed)
    assert not run_cure(changed, (fix.change,)).used


@pytest.mark.parametrize(("way", "rows"), [("drop", 5), ("fill", 6)])
def test_bad_rows_are_dropped_or_filled(way, rows):
    x, seen = torch.randn(6, 4), []
    x[2, 1] = math.nan

    def loss(net, batch):
        seen.append(len(batch["x"]))
        return net(batch["x"]).square().mean()

    assert run_cure(step_of(loss, {"x": x, "n": torch.tensor(3)}), (Change(batch=way),)).cured
    assert set(seen) == {rows}


def test_a_batch_of_which_no_row_is_left():
    with pytest.raises(ValueError, match="every row"):
        run_cure(step_of(root, torch.full((6, 4), math.nan)), (Change(batch="drop"),))


def test_only_fixes_with_an_operation_or_a_batch_are_cures():
    assert not is_cure(Remedy("Look", "print(x)"))
    assert not is_cure(Remedy("Lower", "lr = 1", change=Change(rate=0.1)))
    assert is_cure(Remedy("Drop", "x = x[keep]", change=Change(batch="drop")))


def test_a_trial_needs_an_optimizer():
    step = step_of(root)
    with pytest.raises(ValueError, match="optimizer"):
        run_cure(SandboxedStep(step.module, step.loss_of, step.batch), (Change(),))
