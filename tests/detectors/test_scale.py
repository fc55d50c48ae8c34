"""Outputs that are nothing beside their targets, and models that do not beat a constant guess."""

import pytest
import torch

from lightning_gradguard.detectors.scale import TargetScale
from lightning_gradguard.detectors.updates import UpdateRatio
from tests.detectors.test_detectors import Stream


def raised(detector, steps=120, **facts):
    """Return the steps at which the detector is raised."""
    stream = Stream(detector)
    if "updates" in facts:
        stream.updates = facts.pop("updates")
    found = []
    for step in range(steps):
        known = {
            name: value(step) if callable(value) else torch.tensor(value) for name, value in facts.items()
        }
        loss = known.pop("loss", torch.tensor(1.0))
        if step < 8 and "first" in known:
            stream.updates = torch.full((6,), 0.4)
        elif "first" in known:
            stream.updates = torch.full((6,), 0.01)
        known.pop("first", None)
        (reading,) = stream.feed([1.0] * 6, loss=float(loss), sampled_steps=1, **known)
        if reading.raised:
            found.append(step)
    return found


def test_outputs_a_thousandth_of_their_targets():
    assert raised(TargetScale(), reach=1e-4)[0] == 29
    assert raised(TargetScale(), reach=1e-2) == []
    assert raised(TargetScale(), reach=float("nan")) == []
    # The loss falls.
    assert raised(TargetScale(), reach=1e-4, loss=lambda step: torch.tensor(1.0 / (1 + step))) == []
    # They are large enough now and then.
    assert raised(TargetScale(), reach=lambda step: torch.tensor(1e-4 if step % 20 else 1.0)) == []
    # They grow.
    assert raised(TargetScale(), reach=lambda step: torch.tensor(1e-5 * 1.4**step)) == []


def test_a_reading_is_never_critical():
    stream = Stream(TargetScale())
    for _ in range(40):
        (reading,) = stream.feed([1.0] * 6, reach=torch.tensor(1e-5))
    assert reading.raised
    assert reading.ceiling == 1


def falling(step):
    return torch.tensor(2.0 if step < 5 else 1.0)


def test_large_first_steps_after_which_a_guess_is_not_beaten():
    found = raised(UpdateRatio(), first=1.0, loss=falling, excess=0.98)
    assert 40 <= found[0] <= 70
    assert raised(UpdateRatio(), first=1.0, loss=falling, excess=0.6) == []
    assert raised(UpdateRatio(), first=1.0, loss=falling) == []  # not known


def test_a_guess_that_is_beaten_soon_or_small_steps_are_healthy():
    assert (
        raised(UpdateRatio(), first=1.0, loss=falling, excess=lambda s: torch.tensor(1.0 if s < 30 else 0.8))
        == []
    )
    assert raised(UpdateRatio(), loss=falling, excess=1.0) == []


@pytest.mark.parametrize("argument", ["limit", "steps"])
def test_arguments_must_be_positive(argument):
    with pytest.raises(ValueError, match=argument):
        TargetScale(**{argument: 0})
