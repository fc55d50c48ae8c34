"""Every candidate carries a change of its own, and a key that other numbers in its name do not alter."""

import math

import pytest
import torch
from torch import nn

from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause, Remedy
from lightning_gradguard.diagnosis.fixes import lower_learning_rate
from lightning_gradguard.diagnosis.trials.candidates import combine, find_candidates
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.introspection.layer_calls import StructureRecorder
from lightning_gradguard.results import Fault, Finding, Severity


def context_with(fault=Fault.EXPLODING, **known):
    facts = {
        "finding": Finding(fault, Severity.CRITICAL, 30, ("0.weight",), 5.0, 3.0, "Detector"),
        "names": ("0.weight", "2.weight"),
        "shapes": ((8, 8), (8, 8)),
        "gradients_log10": (1.0, 1.0),
        "weight_norms": (3.0, 3.0),
        "update_ratios": (math.nan, math.nan),
        "optimizer": "SGD",
        "learning_rates": (0.1,),
        "defaults": {"momentum": 0.99, "weight_decay": 0.1},
        "input_rms": 100.0,
    }
    return DiagnosticContext(**{**facts, **known})


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.ReLU])
@pytest.mark.parametrize("fault", [Fault.DEAD, Fault.EXPLODING])
def test_each_candidate_changes_something_else(activation, fault):
    model = nn.Sequential(
        *(layer for _ in range(6) for layer in (nn.Linear(8, 8), activation())), nn.RNN(8, 8)
    )
    recorder, x = StructureRecorder(model), torch.ones(4, 8)
    with recorder:
        model(x)
    causes = (
        Cause.UNKNOWN,
        Cause.TARGET_SCALE,
        Cause.UNNORMALIZED_INPUT,
        Cause.MOMENTUM,
        Cause.LEARNING_RATE_TOO_HIGH,
    )
    fixes = find_candidates(context_with(fault), causes, model, (x, x), recorder.structure)
    assert len(fixes) > 10
    assert all(fix.change is not None and fix.change.fields for fix in fixes)
    assert len({fix.change for fix in fixes}) == len({fix.key for fix in fixes}) == len(fixes)


def test_a_key_is_the_name_unless_that_holds_numbers():
    first, second = (lower_learning_rate(context_with(), rate) for rate in (1e-2, 1e-4))
    assert first.name != second.name
    assert first.key == second.key != first.name
    assert (first.change.rate, second.change.rate) == (pytest.approx(0.1), pytest.approx(0.001))
    assert Remedy("ReLU", "f()").key == "ReLU"


def test_two_fixes_combine_unless_they_change_the_same():
    rate, relu = (
        lower_learning_rate(context_with()),
        Remedy("ReLU", "f()", change=Change(activation="relu")),
    )
    both = combine(rate, relu)
    assert both.change == rate.change | relu.change
    assert both.how.splitlines() == [rate.how, "f()"]
    assert both.key not in (rate.key, relu.key)
    assert combine(both, relu) is None
    assert combine(rate, Remedy("Look at the batch", "print(x)")) is None
