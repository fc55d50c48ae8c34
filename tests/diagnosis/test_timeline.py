"""The timeline holds the newest steps by layer."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradguard import Fault, Finding, Guard, NormClip, Severity
from lightning_gradguard.diagnosis.diagnose import PICTURED, timeline_of
from lightning_gradguard.engine.history import history_of


def finding_of(*names):
    return Finding(Fault.NONFINITE, Severity.CRITICAL, 0, names, 1.0, 0.0, "NonFinite")


def guarded(model, **options):
    return Guard(model.named_parameters(), optimizer=torch.optim.SGD(model.parameters(), lr=0.0), **options)


class Backwards(nn.Module):
    """A module that lists its parameters in reverse."""

    def __init__(self):
        super().__init__()
        self.last, self.norm = nn.Linear(4, 1), nn.LayerNorm(4)
        self.first, self.unused = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_layers_run_from_input_to_output_with_their_root_mean_squares():
    model, seen = Backwards(), []
    guard = guarded(model, clipper=NormClip(1e-3))
    for step in range(3):
        model.zero_grad()
        x = torch.randn(8, 3) * (math.nan if step == 1 else 1.0)
        loss = model(x).square().mean()
        loss.backward()
        seen.append(
            {
                n: p.grad.square().mean().sqrt().item()
                for n, p in model.named_parameters()
                if p.grad is not None
            }
        )
        guard.step(loss=loss)
    timeline = timeline_of(guard.history, guard.tracker.layout, finding_of("norm.bias", "first.bias"))
    assert timeline.steps == (0, 1, 2)
    assert (timeline.skipped, timeline.clipped) == ((False, True, False), (True, False, True))
    used = [name for name in timeline.layers if name != "unused.weight"]
    assert used == ["first.weight", "norm.bias", "last.weight"]
    for name, row in zip(timeline.layers, timeline.rms_log10, strict=True):
        if name == "unused.weight":
            assert row == (-math.inf,) * 3
        else:
            expected = [math.nan if i == 1 else math.log10(step[name]) for i, step in enumerate(seen)]
            assert np.allclose(row, expected, atol=1e-5, equal_nan=True)
    assert np.array_equal(np.isnan(timeline.losses), [False, True, False])


def test_a_zero_gradient_counts_as_no_gradient():
    model = nn.Linear(2, 2)
    guard = guarded(model)
    (model(torch.zeros(1, 2)).sum()).backward()
    guard.step(loss=1.0)
    timeline = timeline_of(guard.history, guard.tracker.layout, finding_of())
    assert (timeline.layers, timeline.rms_log10) == (("weight",), ((-math.inf,),))


def test_without_layers_all_tensors_are_shown():
    model = nn.LayerNorm(4)
    guard = guarded(model)
    model(torch.randn(8, 4)).square().sum().backward()
    guard.step(loss=1.0)
    assert set(timeline_of(guard.history, guard.tracker.layout, finding_of()).layers) == {"weight", "bias"}


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_only_the_newest_steps_are_kept():
    model = nn.Linear(2, 1)
    guard = guarded(model)
    guard.history.resize(2 * PICTURED)
    for _ in range(PICTURED + 5):
        model.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        guard.step(loss=1.0)
    timeline = timeline_of(guard.history, guard.tracker.layout, finding_of())
    assert timeline.steps == tuple(range(5, PICTURED + 5))
    assert all(len(row) == PICTURED for row in timeline.rms_log10)


def test_a_history_begins_empty():
    layout = guarded(nn.Linear(2, 1)).tracker.layout
    history = history_of(layout, 7)
    assert (history.names, history.numel, history.steps, len(history)) == (("weight", "bias"), (2, 1), 7, 0)
