"""Updates, learning rates and batch sizes that a tracker follows."""

import pytest
import torch
from torch import nn

from lightning_gradguard.engine.parameter_tracker import ParameterTracker, RateHistory


def test_a_tensor_that_was_not_stepped_keeps_its_newest_update():
    parameters = {name: nn.Parameter(torch.ones(4)) for name in ("a", "b")}
    tracker = ParameterTracker(parameters.items(), None)
    for moved in ("ab", "a", "a"):
        for name, parameter in parameters.items():
            parameter.grad = torch.ones(4) if name in moved else None
        stats = tracker.measure(None, None)
        tracker.schedule.commit(taken=True)
        with torch.no_grad():
            for name in moved:
                parameters[name].mul_(1.25)
    # The newest sampled step has moved one of them.
    assert stats.updates.tolist() == pytest.approx([0.2, 0.2])


def followed(*rates):
    history = RateHistory()
    for step, rate in enumerate(rates):
        history = history.after(rate, step, 1)
    return history


def test_a_rest_begins_with_the_first_step_at_a_low_rate():
    history = followed(*[1.0] * 10, *[0.01] * 5)
    assert (history.peak, history.rested, history.fell_at) == (1.0, 5, 10)
    assert history.rest == pytest.approx(5 / 10.05)
    again = followed(*[1.0] * 10, *[0.01] * 5, 1.0)
    assert (again.rested, again.fell_at, again.rest) == (0, 0, 0)


def test_stairs_are_rates_that_stay_the_same_before_they_are_raised():
    assert followed(*[0.1] * 16, *[0.2] * 3).stair == 16
    assert followed(*[0.2] * 16, *[0.1] * 3).stair == 0
    assert followed(*[0.1] * 16, *[0.2] * 3).steady == 3


def test_a_restored_tracker_knows_the_usual_size_of_a_batch():
    def tracker_of():
        parameter = nn.Parameter(torch.ones(4))
        return parameter, ParameterTracker([("w", parameter)], None)

    def loss(parameter, rows):
        return (torch.ones(rows, 4) * parameter).square().mean()

    (weight, first), (other, second) = tracker_of(), tracker_of()
    assert [first.noise_of(loss(weight, 64)) for _ in range(5)] == pytest.approx([1.0] * 5)
    second.load_state_dict(first.state_dict())
    # The noise of a gradient grows as the square root of the number of samples falls.
    assert 2.0 < second.noise_of(loss(other, 8)) <= 8**0.5
