"""Steps that are too small or too large, on small trainings, each with healthy ones that look alike."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from lightning_gradguard.detectors.updates import Stalled
from tests.detectors.small_trainings import (
    adam,
    mlp,
    random_labels,
    regression,
    scaler,
    sgd,
    templates,
    train,
)
from tests.detectors.test_detectors import Stream


def clip_scaled(norm):
    return lambda model, optimizer, scaling: nn.utils.clip_grad_norm_(model.parameters(), norm)


def clip_unscaled(norm):
    def clip(model, optimizer, scaling):
        scaling.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), norm)

    return clip


def normalise(model, optimizer, scaling):
    scaling.unscale_(optimizer)
    total = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    for p in model.parameters():
        p.grad.div_(total)


def half(**options):
    return mlp(**options).to(torch.bfloat16)


class TestASchedulePerBatch:
    @pytest.mark.parametrize(
        ("optimizer", "schedule"),
        [
            (adam(1e-3), lambda o: lr_scheduler.ExponentialLR(o, 0.8)),
            (sgd(0.02), lambda o: lr_scheduler.LambdaLR(o, lambda e: max(0, 1 - e / 20))),
            (adam(3e-4), lambda o: lr_scheduler.MultiStepLR(o, [15, 20, 25, 30, 35], 0.1)),
            (adam(1e-3), lambda o: lr_scheduler.StepLR(o, 10, 0.1)),
        ],
    )
    def test_is_found_and_named(self, optimizer, schedule):
        out = train(mlp(), templates(), optimizer, schedule=schedule)
        assert out.found[0] == "stalled"
        assert out.cause == "learning_rate_too_low"
        assert "epoch" in out.fix

    @pytest.mark.parametrize(
        ("draw", "schedule"),
        [
            (random_labels, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 25)),
            (random_labels, lambda o: lr_scheduler.LambdaLR(o, lambda e: max(0.0, 1 - e / 150))),
            (templates(), lambda o: lr_scheduler.CosineAnnealingLR(o, 150)),
            (templates(noise=0.3), lambda o: lr_scheduler.StepLR(o, 50, 0.01)),
        ],
    )
    def test_healthy_schedules_are_quiet(self, draw, schedule):
        assert train(mlp(), draw, adam(1e-3), schedule=schedule, steps=150).said == ""


class TestUpdatesLostToRounding:
    @pytest.mark.parametrize(
        ("options", "optimizer"),
        [
            ({}, adam(1e-5)),
            ({}, sgd(5e-4)),
            ({"norm": nn.LayerNorm}, adam(3e-6)),
            ({"width": 256}, sgd(3e-4, momentum=0.9)),
        ],
    )
    def test_are_found_and_named(self, options, optimizer):
        out = train(half(**options), templates(), optimizer, steps=60)
        assert out.found[0] == "stalled"
        assert out.cause == "low_precision"
        assert "float32" in out.fix

    def test_the_same_training_in_float32_has_no_rounding(self):
        out = train(mlp(width=256), templates(), sgd(3e-4, momentum=0.9), steps=60)
        assert out.said == ""

    @pytest.mark.parametrize(
        ("draw", "optimizer"),
        [(templates(), adam(1e-3)), (templates(), sgd(0.1)), (random_labels, adam(1e-3))],
    )
    def test_larger_steps_are_quiet(self, draw, optimizer):
        assert train(half(), draw, optimizer).said == ""

    def test_a_schedule_that_ends_is_quiet(self):
        plan = {"schedule": lambda o: lr_scheduler.CosineAnnealingLR(o, 120)}
        assert train(half(), random_labels, adam(1e-3), **plan).said == ""

    def test_inputs_that_are_always_zero_do_not_count(self):
        def border(step, x, y):
            return torch.cat([x[:, :3], torch.zeros_like(x[:, 3:])], 1), y

        assert train(half(), templates(), adam(2e-3), spoil=border).said == ""

    def test_a_net_that_has_learned_everything_is_quiet(self):
        assert train(half(), templates(noise=0.1), sgd(0.2), steps=200).said == ""


class TestClippingBeforeUnscaling:
    @pytest.mark.parametrize(
        ("scale", "norm", "momentum"), [(65536.0, 1.0, 0.0), (1024.0, 0.5, 0.9), (2.0**20, 5.0, 0.9)]
    )
    def test_is_found_and_named(self, scale, norm, momentum):
        optimizer = sgd(0.1, momentum=momentum)
        out = train(mlp(), templates(), optimizer, scaling=scaler(scale), clip=clip_scaled(norm), steps=60)
        assert out.found[0] == "stalled"
        assert out.cause == "gradient_scaling"
        assert "unscale_" in out.fix

    @pytest.mark.parametrize(
        ("draw", "clip"),
        [(templates(), clip_unscaled(0.1)), (random_labels, normalise), (random_labels, clip_unscaled(1e-2))],
    )
    def test_clipping_to_a_constant_norm_is_quiet(self, draw, clip):
        assert train(mlp(), draw, sgd(0.05), scaling=scaler(), clip=clip).said == ""


class TestUpdatesBeforeANormalization:
    @pytest.mark.parametrize(("norm", "deviation"), [(nn.LayerNorm, 1e-3), (nn.BatchNorm1d, 2e-3)])
    def test_small_weights_may_change_at_once(self, norm, deviation):
        model = mlp(norm=norm)
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=deviation)
        assert train(model, templates(noise=3.0), adam(1e-3), steps=150).said == ""

    def test_an_equilibrium_with_weight_decay_is_quiet(self):
        out = train(mlp(norm=nn.BatchNorm1d), templates(), sgd(1.0, weight_decay=1e-2), steps=150)
        assert out.losses[-1] < out.losses[0]
        assert out.said == ""


def test_a_batch_of_one_sample_is_no_spike():
    def size(step):
        return 1 if step % 9 == 8 else 64

    draw, options = regression(noise=1.0), {"loss": F.mse_loss, "size": size, "steps": 200}
    assert train(mlp(16, 1), draw, adam(1e-3), **options).said == ""


def small_head(gain=0.01, **options):
    model = mlp(**options)
    with torch.no_grad():
        model[-1].weight.mul_(gain)
        model[-1].bias.zero_()
    return model


class TestAHeadThatBeginsSmall:
    @pytest.mark.parametrize(
        ("gain", "options", "optimizer"),
        [
            (0.01, {}, adam(3e-3)),
            (0.0, {}, adam(3e-3)),
            (0.003, {"outputs": 40}, adam(3e-3)),
            (0.01, {"depth": 1}, adam(1e-2)),
        ],
    )
    def test_may_grow_while_nothing_is_learnt(self, gain, options, optimizer):
        out = train(small_head(gain, **options), random_labels, optimizer, steps=120)
        assert "oversized_update" not in out.found

    @pytest.mark.parametrize(
        ("gain", "optimizer"), [(0.01, adam(0.5)), (0.0, adam(0.5)), (0.01, sgd(30.0, momentum=0.9))]
    )
    def test_steps_as_large_as_usual_weights_are_found(self, gain, optimizer):
        out = train(small_head(gain), templates(), optimizer, steps=200)
        assert out.found
        assert out.cause == "learning_rate_too_high"


class TestAWarmUpOnceAnEpoch:
    @pytest.mark.parametrize(("length", "stair"), [(4000, 24), (20000, 30)])
    def test_is_found_and_named(self, length, stair):
        schedule = lambda o: lr_scheduler.LambdaLR(o, lambda n: (n // stair + 1) / length)  # noqa: E731
        out = train(mlp(), templates(), adam(1e-3), schedule=schedule, steps=150)
        assert out.found[0] == "stalled"
        assert out.cause == "learning_rate_too_low"
        assert "shorter warm-up" in out.fix.lower()

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda n: (n + 1) / 4000,  # by steps
            lambda n: min(1.0, (n // 24 + 1) / 5),
            lambda n: 1e-2 if n < 30 else 1.0,
        ],
    )
    def test_other_warm_ups_are_quiet(self, schedule):
        out = train(mlp(), templates(), adam(1e-3), schedule=lambda o: lr_scheduler.LambdaLR(o, schedule))
        assert not out.found


class TestFewElementsChange:
    """Half-precision weights of which 15 % of the elements move in a step: few, but more than next to none."""

    @staticmethod
    def is_raised(share=0.15, excess=1.0, steady=1000, loss=1.0):
        stream = Stream(Stalled())
        facts = {"changed": torch.full((6,), share), "excess": torch.tensor(excess), "steady": steady}
        readings = [stream.feed([1.0] * 6, loss=loss, **facts)[0] for _ in range(90)]
        return bool(readings[-1].raised)

    def test_while_the_loss_is_that_of_a_guess_is_found(self):
        assert self.is_raised()

    @pytest.mark.parametrize(
        "facts", [{"excess": 0.5}, {"excess": math.nan}, {"share": 0.4}, {"share": math.nan}, {"steady": 10}]
    )
    def test_otherwise_is_quiet(self, facts):
        assert not self.is_raised(**facts)

    def test_next_to_none_needs_no_guess(self):
        assert self.is_raised(share=0.05, excess=math.nan)


class TestStepsWithoutAnyGradient:
    def saturated(self, every):
        def reshape(step, loss, model):
            return loss * 0 + 1.0 if step % every == 0 else loss

        return reshape

    def test_are_found_while_the_loss_is_high(self):
        out = train(mlp(), random_labels, adam(1e-5), steps=200, reshape=self.saturated(3))
        assert "stalled" in out.found

    def test_are_quiet_where_they_are_rare(self):
        out = train(mlp(), random_labels, adam(1e-3), steps=200, reshape=self.saturated(50))
        assert "stalled" not in out.found
