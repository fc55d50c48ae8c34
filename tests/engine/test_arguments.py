"""Checks of a guard's arguments, and short reprs."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradguard import GradGuard, Guard, NonFinite, Policy
from lightning_gradguard.detectors import NoState
from lightning_gradguard.engine.arguments import short_repr
from lightning_gradguard.engine.step_context import StepContext


@dataclass(frozen=True)
class Clipper:
    limits: object = 1.0

    def init(self, stats):
        return NoState()

    def update(self, stats, state):
        raise NotImplementedError


@pytest.mark.parametrize("value", [np.ones(3), torch.ones(3), [1.0], None])
def test_repr_shows_arguments_without_a_truth_value(value):
    assert "limits" in repr(GradGuard(clipper=Clipper(value)))
    assert "limits" in repr(Guard(nn.Linear(1, 1).named_parameters(), clipper=Clipper(value)))


def test_repr_leaves_out_defaults_also_of_factories():
    @dataclass
    class Part:
        names: list = field(default_factory=list)

    assert short_repr(Part(), part=(Part(), None)) == "Part(part=Part())"


@pytest.mark.parametrize("context", [{"batch": 1}, 3, "batch"])
def test_a_context_of_another_type_is_refused_at_once(context):
    guard = Guard(nn.Linear(1, 1).named_parameters())
    with pytest.raises(TypeError, match="context must be a StepContext"):
        guard.step(loss=torch.tensor(1.0), context=context)


@pytest.mark.parametrize("notes", [None, "a sentence", ["a sentence"]])
def test_notes_of_a_context_are_a_tuple(notes):
    with pytest.raises(TypeError, match="notes must be a tuple"):
        StepContext(notes=notes)


def test_a_batch_beside_a_context_is_not_lost():
    model = nn.Linear(2, 1)
    guard = Guard(model.named_parameters())
    batch = torch.full((3, 2), torch.nan)
    loss = model(batch).mean()
    loss.backward()
    with pytest.warns(UserWarning, match="bad data"):
        guard.step(loss=loss, batch=batch, context=StepContext())


def test_a_fault_that_is_a_string_is_refused():
    class Quantized(NonFinite):
        fault = "quantized"

    with pytest.raises(TypeError, match=r"fault of Quantized must be a Fault, such as Fault\.custom"):
        Guard(nn.Linear(1, 1).named_parameters(), detectors=[Quantized()])


def test_the_old_flag_warns():
    class Old(NonFinite):
        quiet = True
        fast_path_safe = False

    class Older:
        fault, measures, quiet = NonFinite.fault, ("x",), True
        init = update = None

    Guard(nn.Linear(1, 1).named_parameters(), detectors=[Old()])
    with pytest.warns(FutureWarning, match="Older.quiet is now fast_path_safe"):
        Guard(nn.Linear(1, 1).named_parameters(), detectors=[Older()])


def test_a_recorder_size_that_is_kept_folds_nothing_in(monkeypatch):
    guard = Guard(nn.Linear(1, 1).named_parameters(), policy=Policy())
    monkeypatch.setattr(Guard, "flush", lambda self: pytest.fail("deferred steps were folded in"))
    guard.keep_history(128)
