"""What is timed and how ratios are computed; never how long something takes."""

import math

import pytest
import torch
from torch import nn

from lightning_gradguard import Guard, NormClip, SpikeClip
from lightning_gradguard.cli import cost
from lightning_gradguard.cli.cost import (
    BARE,
    CLIP,
    CYCLE,
    WARM_UP,
    Spread,
    SyntheticTraining,
    Timings,
    measure,
    rounds,
)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


class Ticking:
    """A clock by which the first step after each reading takes one second more than the last one did."""

    def __init__(self):
        self.now, self.calls = 0.0, 0

    def __call__(self):
        self.calls += 1
        self.now += self.calls // 2
        return self.now


def test_every_arm_has_whole_cycles_of_positive_times():
    timings = measure(net(), SpikeClip(), steps=CYCLE + 1)
    assert list(timings.seconds) == [BARE, CLIP, "Guard", "Guard, SpikeClip"]
    for seconds in timings.seconds.values():
        assert len(seconds) == 2 * CYCLE
        assert all(0 < s < math.inf for s in seconds)
    assert (timings.findings, timings.clipped) == (0, 0.0)


def test_without_a_clipper_there_is_one_guard_and_more_arms_come_last():
    timings = measure(net(), steps=1, more={"mine": lambda: None})
    assert list(timings.seconds) == [BARE, CLIP, "Guard", "mine"]


def test_all_arms_of_a_round_find_the_same_gradients():
    model, seen = net(), []

    def look():
        seen.append([p.grad.clone() for p in model.parameters()])
        for p in model.parameters():
            p.grad.mul_(100)  # or removed, as a skipped step does
            p.grad = None

    measure(model, steps=CYCLE, more={"one": look, "other": look})
    assert len(seen) == 2 * 2 * CYCLE  # one cycle is their warm-up
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(seen[0][0], seen[2][0])


def test_gradients_are_new_tensors_in_each_round():
    model, seen = net(), []
    measure(model, steps=1, more={"one": lambda: seen.append(model[0].weight.grad)})
    assert len({id(gradient) for gradient in seen}) == len(seen)


def test_gradients_are_made_by_a_backward_pass_for_each_arm_alone():
    model, made = net(), []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: made.append(p.grad.data_ptr()))
    training = SyntheticTraining(model)
    kept = {g.data_ptr() for g in training._kept}
    for _ in range(3):
        training.restore()
    assert len(made) == 4
    assert kept.isdisjoint(made)


@pytest.mark.parametrize("width", [1, 8, 1500])
def test_other_memory_goes_through_the_caches_before_each_arm(width):
    """As much as a training step touches, at least a core's caches, at most a processor's."""
    training = SyntheticTraining(nn.Linear(width, width))
    assert 2**22 <= training._others.nbytes <= 2**27
    assert training._others.nbytes >= min(2**27, 3 * 4 * width**2)


def test_the_share_of_clipped_steps_is_reported():
    assert measure(net(), NormClip(1e-6), steps=1).clipped == 0.5  # all steps of one guard of two


def test_the_order_of_the_arms_changes_from_round_to_round():
    order = []
    more = {name: (lambda name=name: order.append(name)) for name in "abc"}
    measure(net(), steps=CYCLE, more=more)
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert {len(set(r)) for r in rounds} == {3}
    assert len(set(rounds)) > 3


def test_the_given_clock_is_used():
    timings = measure(net(), steps=CYCLE, clock=Ticking())
    # First the guard alone, then a cycle of all three arms that does not count.
    before = (WARM_UP - CYCLE) + 3 * CYCLE
    assert sorted(s for seconds in timings.seconds.values() for s in seconds) == [
        float(i) for i in range(before + 1, before + 3 * CYCLE + 1)
    ]


@pytest.mark.parametrize("steps", [1, CYCLE, CYCLE + 1])
def test_after_each_round_it_is_told(steps):
    calls = []
    measure(net(), steps=steps, after_round=lambda: calls.append(1))
    assert len(calls) == rounds(steps)


def test_guards_are_warm_before_they_are_timed(monkeypatch):
    """All arms run in the cycle before, and in each timed cycle a guard samples the weights once."""
    seen = []

    class Watched(Guard):
        def step(self, **kwargs):
            seen.append((self.tracker.schedule.good, self.tracker.schedule.sampled_last))
            return super().step(**kwargs)

    monkeypatch.setattr(cost, "Guard", Watched)
    begun = []
    measure(net(), steps=2 * CYCLE, more={"mine": lambda: begun.append(len(seen))})
    assert [good for good, _ in seen] == list(range(WARM_UP + 2 * CYCLE))
    assert begun[0] in (WARM_UP - CYCLE, WARM_UP - CYCLE + 1)
    assert len(begun) == 3 * CYCLE
    counted = [close for _, close in seen[WARM_UP:]]
    assert [sum(counted[:CYCLE]), sum(counted[CYCLE:])] == [1, 1]


def test_frozen_parameters_get_no_gradient():
    model = net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    measure(model, steps=1)
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, before)


def test_figures_are_means_over_cycles_so_that_a_costly_step_counts():
    cycle = [1.0] * (CYCLE - 1) + [CYCLE + 1.0]
    timings = Timings({"a": cycle * 3, "b": [2.0] * 3 * CYCLE})
    assert timings.median("a") == 1.0
    assert timings.step("a") == Spread(2.0, 2.0, 2.0)
    assert timings.ratio("a", "b") == Spread(1.0, 1.0, 1.0)


def test_an_interruption_by_another_program_does_not_count():
    cycle = [1.0] * (CYCLE - 1) + [CYCLE + 1.0]
    seconds = cycle * 5
    seconds[3], seconds[12], seconds[CYCLE - 1] = 1000.0, 1000.0, 1000.0
    assert Timings({"a": seconds}).step("a").median == 2.0


def test_a_machine_that_is_slow_for_a_while_changes_no_ratio():
    slow = [1.0] * CYCLE + [50.0] * CYCLE + [1.0] * CYCLE
    timings = Timings({"a": [3 * s for s in slow], "b": slow})
    assert timings.ratio("a", "b") == Spread(3.0, 3.0, 3.0)


def test_a_spread_is_a_median_and_quartiles():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_synthetic_gradients_stay_below_the_limit_and_weights_move_a_little():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    training = SyntheticTraining(model)
    losses = []
    for _ in range(200):
        training.advance()
        training.restore()
        losses.append(training.loss.item())
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert 0.3 < norm < 0.9
    assert losses[-1] < losses[0]
    moved = [(p - b).abs().max() for p, b in zip(model.parameters(), before, strict=True)]
    assert all(0 < m < 0.05 for m in moved)
