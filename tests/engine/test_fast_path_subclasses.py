"""Which detectors and clippers may use the fast path, and steps that it must not accept."""

import gc
import weakref

import pytest
import torch
from torch import nn

from lightning_gradguard import Guard, Spike, SpikeClip

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

STEPS = 80


class InheritedClip(SpikeClip):
    """A subclass that declares nothing."""


class DeclaredClip(SpikeClip):
    fast_path_safe = True


class InheritedSpike(Spike):
    """A subclass that declares nothing."""


class DeclaredSpike(Spike):
    fast_path_safe = True


def run(guard, parameters, gradient, steps=STEPS, loss=None):
    """Return the reports of steps with gradients set by hand; the loss falls unless one is given."""
    reports = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for i, parameter in enumerate(parameters):
            parameter.grad = gradient(step, i, generator)
        value = 1 / (1 + step / 50) if loss is None else loss(step)
        reports.append(guard.step(loss=torch.tensor(value)))
    return reports


def accepted(reports):
    return sum("_fields" in vars(report) for report in reports)


def noise(step, i, generator):
    return torch.randn(4, 4, generator=generator)


def weights(count=4, **kwargs):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 4, **kwargs)) for _ in range(count)]


def named(parameters):
    return [(f"layer{i}.weight", p) for i, p in enumerate(parameters)]


@pytest.mark.parametrize(
    ("kwargs", "uses_fast_path"),
    [
        ({"clipper": SpikeClip()}, True),
        ({"clipper": InheritedClip()}, False),
        ({"clipper": DeclaredClip()}, True),
        ({"detectors": (Spike(),)}, True),
        ({"detectors": (InheritedSpike(),)}, False),
        ({"detectors": (DeclaredSpike(),)}, True),
    ],
    ids=repr,
)
def test_only_classes_that_declare_it_themselves_use_the_fast_path(kwargs, uses_fast_path):
    parameters = weights()
    reports = run(Guard(named(parameters), lag=0, **kwargs), parameters, noise)
    assert (accepted(reports) > STEPS / 4) == uses_fast_path


def test_a_norm_whose_square_overflows_is_not_accepted():
    parameters = [nn.Parameter(torch.ones(1))]
    guard = Guard(named(parameters), lag=0)
    reports = run(guard, parameters, lambda step, i, _: torch.full((1,), 1.3e19 if step < 43 else 2.2e19), 44)
    assert accepted(reports)
    assert reports[-1].skip


def test_a_spike_of_a_tiny_tensor_is_cut():
    """So tiny that the square of its excess is zero."""
    parameters = weights(30, dtype=torch.float64)

    def gradient(step, i, generator):
        size = 1e-28 if i == 7 else 1.0
        spike = 1e4 if i == 7 and step == 44 else 1.0
        return size * spike * (1 + 0.01 * torch.randn(4, 4, generator=generator, dtype=torch.float64))

    guard = Guard(named(parameters), lag=0, clipper=SpikeClip())
    reports = run(guard, parameters, gradient, 45)
    assert accepted(reports)
    assert guard.counts["clipped"] == 1
    assert parameters[7].grad.norm() < 1e-27


def test_reports_that_are_kept_keep_no_parameters():
    parameters = weights()
    guard = Guard(named(parameters), lag=0, clipper=SpikeClip())
    reports = run(guard, parameters, noise)
    assert accepted(reports)
    guard.close()
    alive = weakref.ref(parameters[0])
    del guard, parameters
    gc.collect()
    assert alive() is None
    assert all(report.threshold > 0 and len(report.norms) == 4 for report in reports)


def test_a_guard_that_goes_back_to_the_start_follows_the_loss_anew():
    parameters = weights()
    guard = Guard(named(parameters), lag=0, clipper=SpikeClip())
    run(guard, parameters, noise, loss=lambda step: 5.0)
    guard.roll_back(None)
    run(guard, parameters, noise, 40, loss=lambda step: 3.0)
    assert guard.record.loss_start == 3.0
