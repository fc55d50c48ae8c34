"""What a step does, counted: neither operations nor calls of Python grow with the number of tensors."""

import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradguard import Guard, SpikeClip
from lightning_gradguard.callbacks.running_buffers import RunningBuffers

FEW, MANY = 50, 500


class Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def calls_of(work):
    """Return how often work calls functions of this package, by name."""
    seen = Counter()

    def note(frame, event, arg):
        if event == "call" and "lightning_gradguard" in frame.f_code.co_filename:
            seen[frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


class Stepping:
    """A guard on ordinary gradients of like tensors, which are new at each step."""

    def __init__(self, count, clipper):
        torch.manual_seed(0)
        self.model = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(count)])
        self.gradients = [0.01 * torch.randn(4, 4) for _ in range(count)]
        self.guard, self.steps = Guard(self.model.named_parameters(), clipper=clipper), 0

    def prepare(self):
        self.steps += 1
        for parameter, gradient in zip(self.model, self.gradients, strict=True):
            parameter.grad = gradient.clone()
            parameter.data.sub_(gradient, alpha=1e-3)
        self.loss = torch.tensor(2.0 * 0.9**self.steps)

    def step(self):
        self.guard.step(loss=self.loss)

    def until_unremarkable(self):
        """Take steps until the next one is no full evaluation, and reads no weights."""
        while self.steps < 280 or self.guard.tracker.schedule.good % 32 != 5:
            self.prepare()
            self.step()
        self.prepare()


@pytest.mark.parametrize("clipper", [None, SpikeClip()])
def test_an_unremarkable_step_does_the_same_however_many_tensors_there_are(clipper):
    operations, calls = [], []
    for count in (FEW, MANY):
        stepping = Stepping(count, clipper)
        stepping.until_unremarkable()
        with Operations() as spy:
            stepping.step()
        operations.append(spy.seen)
        stepping.prepare()
        calls.append(calls_of(stepping.step))
        assert stepping.guard.fast_path.deferred
    assert operations[0] == operations[1]
    assert calls[0] == calls[1]


@pytest.mark.parametrize("clipper", [None, SpikeClip()])
def test_full_evaluations_dispatch_no_more_operations_for_more_tensors(clipper):
    sums = []
    for count in (FEW, MANY):
        stepping = Stepping(count, clipper)
        stepping.until_unremarkable()
        spy = Operations()
        for _ in range(32):
            with spy:
                stepping.step()
            stepping.prepare()
        sums.append(spy.seen)
    grown = {name for name in sums[1] if sums[1][name] > sums[0][name]}
    assert not grown


@pytest.mark.parametrize("skipped", [False, True])
def test_running_statistics_cost_the_same_calls_for_more_buffers(skipped):
    """Once the first batch is over."""
    operations, calls = [], []
    for count in (FEW, MANY):
        model = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(count)])
        buffers = RunningBuffers()
        buffers.start(model)
        for _ in range(3):
            buffers.save()
            model(torch.randn(8, 2))
            buffers.end_batch()
        with Operations() as spy:
            buffers.save()
        model(torch.randn(8, 2))
        with spy:
            buffers.restore_nonfinite(skipped)
            buffers.end_batch()
        operations.append(spy.seen)
        calls.append(calls_of(lambda buffers=buffers: (buffers.save(), buffers.end_batch())))
    assert operations[0] == operations[1]
    assert calls[0] == calls[1]


def test_a_frozen_model_costs_the_same_calls_for_more_tensors():
    """Once the first batch is over."""
    calls = []
    for count in (FEW, MANY):
        model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(count)]).requires_grad_(False)
        buffers = RunningBuffers()
        buffers.start(model)
        for _ in range(3):
            buffers.save()
            buffers.end_batch()
        calls.append(calls_of(lambda buffers=buffers: (buffers.save(), buffers.end_batch())))
    assert calls[0] == calls[1]
