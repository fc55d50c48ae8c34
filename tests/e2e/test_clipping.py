"""Clippers in training loops.

Reports tell what was done in every loop, and a resumed loop clips alike.
"""

import copy
import io
import math

import pytest
import torch
from torch import nn

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    GradientWarning,
    Guard,
    NormClip,
    SpikeClip,
    SteadyClip,
    ZClip,
)

CLIPPERS = [
    NormClip(0.5),
    AGC(),
    AutoClip(),
    ZClip(warmup_steps=5),
    AdaGC(warmup_steps=5),
    SpikeClip(),
    SpikeClip(exclude=("last.*", "scale")),
    SteadyClip(),
    SteadyClip(exclude=("last.*", "scale")),
]
pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
every_clipper = pytest.mark.parametrize("clipper", CLIPPERS, ids=repr)


class Odd(nn.Module):
    """Net with parameters of unusual kinds.

    A tied weight, a layer that starts at zero, a scalar, an empty tensor, half precision and sparse gradients.
    """

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6, sparse=True)
        self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again.weight = self.first.weight
        nn.init.zeros_(self.last.weight)
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.gain = nn.Parameter(torch.ones(6, dtype=torch.bfloat16))

    def forward(self, tokens):
        x = torch.tanh(self.first(self.table(tokens).mean(1)) * self.gain.float())
        return self.last(torch.tanh(self.again(x))) * self.scale + self.empty.sum()


class Run:
    """Training of `Odd`.

    Its batches follow from the step alone.
    """

    def __init__(self, clipper):
        torch.manual_seed(0)
        self.model = Odd()
        # Of the optimizers that take sparse gradients.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.guard = Guard(self.model.named_parameters(), optimizer=self.optimizer, clipper=clipper)

    def step(self, number, spoil=1.0):
        random = torch.Generator().manual_seed(number)
        tokens = torch.randint(20, (8, 4), generator=random)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(tokens), tokens[:, 0] % 3)
        (loss * spoil).backward()
        before = {n: p.grad.to_dense().clone() for n, p in self.named()}
        report = self.guard.step(loss=loss)
        after = {n: p.grad.to_dense() for n, p in self.named()}
        if not report.skip:
            self.optimizer.step()
        return report, before, after

    def named(self):
        return [(n, p) for n, p in self.model.named_parameters() if p.grad is not None]


def norm(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors.values()))


@every_clipper
def test_what_is_reported_is_what_was_done(clipper):
    run, clipped = Run(clipper), 0
    for number in range(60):
        report, before, after = run.step(number, 1e4 if number in (30, 45) else 1.0)
        assert report.total_norm == pytest.approx(norm(before), rel=1e-3)
        assert report.clipped_norm == pytest.approx(norm(after), rel=3e-3)
        assert report.clipped_norm <= report.threshold * (1 + 1e-5)
        assert report.scale == pytest.approx(report.clipped_norm / report.total_norm)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        # A scale of 1 says that no bit of any gradient was changed.
        assert bool(changed) == (report.scale < 1) or report.scale > 1 - 1e-6
        for pattern in clipper.exclude:
            assert pattern.rstrip(".*") not in {name.partition(".")[0] for name in changed} | set(changed)
        clipped += bool(changed)
        assert run.guard.counts["clipped"] == clipped
        if number in (30, 45) and not clipper.exclude:
            assert report.scale < 1e-2


@every_clipper
def test_a_resumed_run_clips_as_the_uninterrupted_one(clipper):
    straight, resumed = Run(clipper), Run(clipper)
    for number in range(60):
        if number == 33:
            file = io.BytesIO()
            torch.save(resumed.guard.state_dict(), file)
            file.seek(0)
            fresh = Run(clipper)
            fresh.model.load_state_dict(copy.deepcopy(resumed.model.state_dict()))
            fresh.guard.load_state_dict(torch.load(file, weights_only=True))
            resumed = fresh
        spoil = 1e4 if number in (31, 34, 50) else 1.0
        a, b = straight.step(number, spoil)[0], resumed.step(number, spoil)[0]
        assert (a.total_norm, a.clipped_norm, a.threshold) == (b.total_norm, b.clipped_norm, b.threshold)


@every_clipper
@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_after_a_bad_step_40_the_thresholds_are_those_of_a_run_without_it(clipper, bad):
    clean, hit = Run(clipper), Run(clipper)
    for number in range(61):
        if number == 40:
            with pytest.warns(GradientWarning, match="nonfinite"):
                assert hit.step(1000, bad)[0].skip
        a, b = clean.step(number)[0], hit.step(number)[0]
        assert (a.threshold, a.clipped_norm) == (b.threshold, b.clipped_norm)
    for mine, other in zip(clean.model.parameters(), hit.model.parameters(), strict=True):
        assert torch.equal(mine, other)
