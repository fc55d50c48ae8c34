"""A guard saved between two full evaluations continues elsewhere exactly as it would have."""

import io
import math

import pytest
import torch
from torch import nn

from lightning_gradguard import Fault, Guard, Policy, SpikeClip
from lightning_gradguard.detectors.depth import TimeTilt

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

WATCH = Policy(respond={fault.value: "warn" for fault in Fault}, patience=10**6)


class Training:
    """A real training with a guard that can be saved at any step and continued elsewhere."""

    def __init__(self, lag, fault):
        torch.manual_seed(0)
        self.fault = fault
        self.model = nn.Sequential(
            *[m for _ in range(4) for m in (nn.Linear(8, 8), nn.Tanh())], nn.Linear(8, 2)
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, fused=True)
        self.guard = Guard(
            self.model.named_parameters(),
            optimizer=self.optimizer,
            clipper=SpikeClip(),
            lag=lag,
            policy=WATCH,
        )

    def steps(self, begin, end):
        """Return the reports of steps as text, in which NaN equals NaN."""
        return [repr(self.step(step)) for step in range(begin, end)]

    def step(self, step):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(self.model(x), (x.sum(1) > 0).long())
        self.model.zero_grad()
        loss.backward()
        if step >= 270 and self.fault:
            for i, parameter in enumerate(self.model.parameters()):
                parameter.grad.mul_(10.0 ** (i - 9))
        if step in (275, 310):
            next(self.model.parameters()).grad[0, 0] = math.nan
        if step == 285:
            for parameter in self.model.parameters():
                parameter.grad.mul_(1e4)
        report = self.guard.step(loss=loss)
        if not report.skip:
            self.optimizer.step()
        return report

    def save(self):
        buffer = io.BytesIO()
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "guard")}
        torch.save(parts, buffer)
        buffer.seek(0)
        return buffer

    def load(self, buffer):
        for name, state in torch.load(buffer, weights_only=True).items():
            getattr(self, name).load_state_dict(state)


@pytest.mark.parametrize("fault", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_guard_saved_between_two_full_evaluations_continues_exactly(lag, fault):
    cuts, end = (20, 33, 37, 41, 200, 276, 286, 287, 301, 311, 321), 340
    whole = Training(lag, fault)
    saved, expected = {}, []
    for step in range(end):
        if step in cuts:
            saved[step] = whole.save()
        expected += whole.steps(step, step + 1)
    for cut, buffer in saved.items():
        second = Training(lag, fault)
        second.load(buffer)
        seen = second.steps(cut, min(cut + 45, end))
        assert seen == expected[cut : cut + len(seen)]
        if cut + 45 >= end:
            assert same(second.guard.state_dict(), whole.guard.state_dict())
    faults = {f.fault for f in whole.guard.findings}
    assert {Fault.NONFINITE, Fault.SPIKE} <= faults
    assert (Fault.VANISHING in faults) == fault


@pytest.mark.parametrize("lag", [0, 1])
def test_a_guard_that_is_saved_after_every_few_steps_continues_exactly(lag):
    whole, parts = Training(lag, False), Training(lag, False)
    for step in range(0, 120, 3):
        assert whole.steps(step, step + 3) == parts.steps(step, step + 3)
        buffer, parts = parts.save(), Training(lag, False)
        parts.load(buffer)
    assert same(parts.guard.state_dict(), whole.guard.state_dict())


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or repr(a) == repr(b) == "nan"


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head = nn.RNN(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.net(x)[0][:, -1])


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("cut", [pytest.param(40, marks=pytest.mark.slow), 41, 42])
def test_a_restored_guard_probes_sequences_too(lag, cut):
    """Also if it was saved between the request and the pass."""
    tilts = []
    for saved in (False, True):
        torch.manual_seed(0)
        model = Reader()
        guards = [Guard(model.named_parameters(), detectors=(TimeTilt(),), lag=lag)]
        for step in range(46):
            if saved and step == cut:
                state = guards[-1].state_dict()
                guards[-1].close()
                guards.append(Guard(model.named_parameters(), detectors=(TimeTilt(),), lag=lag))
                guards[-1].load_state_dict(state)
            x = torch.randn(8, 40, 4, generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(model(x), (x.sum((1, 2)) > 0).long())
            model.zero_grad()
            loss.backward()
            guards[-1].step(loss=loss)
        tilts.append(guards[-1].state.detectors[0].decades.item())
    assert math.isfinite(tilts[0])
    assert tilts[0] == tilts[1]
