"""A constant factor on the loss changes no finding: whole trainings, from gradients to findings."""

import sys
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.zoo import case
from benchmarks.zoo.running import fit, quiet
from lightning_gradguard import GradGuard, Guard

#: One case of each fault that a constant factor does not change, and healthy ones close to a limit. Chaotic cases are
#: left out: rounding alone changes their course.
FAULTY = ["V04", "V05", "D01", "X01", "E14", "E06", "U03", "O02", "E07"]
HEALTHY = ["H06", "H14", "H18", "H80"]
#: Cases that run outside `make test-long` too.
QUICK = {"V05", "D01", "E06", "H14"}


class Unscale(L.Callback):
    """Callback that removes the factor after the guard has seen the gradients, before the optimizer step."""

    def __init__(self, factor):
        self.factor = factor

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad.div_(self.factor)


@cache
def findings(id, factor):
    """Return the findings of a training whose gradients only the guard sees times a factor."""
    subject, guard = case(id), GradGuard()
    training = subject.make(0)
    step = training.training_step
    training.training_step = lambda *arguments: factor * step(*arguments)
    fit(subject, training, [guard, Unscale(factor)])
    return [(f.fault, f.severity, f.step, f.parameters) for f in guard.findings]


@pytest.mark.parametrize("factor", [65536.0, 1e-6])
@pytest.mark.parametrize(
    "id", [id if id in QUICK else pytest.param(id, marks=pytest.mark.slow) for id in FAULTY + HEALTHY]
)
def test_findings_do_not_depend_on_loss_scale(id, factor):
    plain = findings(id, 1.0)
    assert findings(id, factor) == plain
    assert (max([severity for _, severity, *_ in plain], default=0) > 0) == (id in FAULTY)


@given(
    seed=st.integers(0, 2**16),
    factor=st.sampled_from([65536.0, 2.0**-20, 1e-6]),
    tilt=st.sampled_from([-3.0, 0.0, 4.0]),
    fall=st.sampled_from([0.0, 0.02]),
    spike=st.sampled_from([None, 40, 60]),
)
def test_gradient_stream_findings_do_not_depend_on_scale(seed, factor, tilt, fall, spike):
    def run(scale):
        torch.manual_seed(seed)
        layers = {f"layers.{i}.weight": torch.nn.Parameter(torch.randn(4, 4)) for i in range(6)}
        guard = Guard(layers.items())
        for step in range(80):
            loss = torch.exp(torch.tensor(-fall * step)) * scale
            for i, p in enumerate(layers.values()):
                size = 10.0 ** (tilt * (i / 5 - 1)) * (1000.0 if step == spike else 1.0)
                p.grad = torch.randn(4, 4) * size * scale
            guard.step(loss=loss)
        return [(f.fault, f.severity, f.step, f.parameters) for f in guard.findings]

    with quiet():
        assert run(factor) == run(1.0)
