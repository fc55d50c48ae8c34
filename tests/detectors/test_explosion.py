"""Spikes and relapses on small trainings, each with healthy ones that look alike."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from lightning_gradguard.detectors.explosion import Spike
from tests.detectors.small_trainings import adam, mlp, regression, sgd, templates, train
from tests.detectors.test_detectors import Stream


def outliers(factor, *steps):
    return lambda step, x, y: (x, y * factor if step in steps else y)


class TestOutliersAmongTheFirstSteps:
    @pytest.mark.parametrize(("steps", "found_at"), [((0,), 4), ((1,), 1), ((10, 20), 10), ((2, 9, 16), 2)])
    def test_are_found_and_named(self, steps, found_at):
        options = {"loss": F.mse_loss, "spoil": outliers(1e8, *steps), "steps": 24}
        out = train(mlp(16, 1), regression(), adam(3e-3), **options)
        assert out.found[0] == "spike"
        assert out.guard.findings[0].step == found_at
        assert out.cause == "outlier_batch"

    def test_inputs_out_of_range_count_too(self):
        def spoil(step, x, y):
            return (x * 1e6 if step == 6 else x), y

        out = train(mlp(16, 1), regression(), adam(1e-3), loss=F.mse_loss, spoil=spoil, steps=24)
        assert out.found[0] == "spike"

    @pytest.mark.parametrize("factor", [65536.0, 1e-6])
    def test_the_scale_of_the_loss_does_not_matter(self, factor):
        options = {"spoil": outliers(1e6, 3), "steps": 24, "reshape": lambda step, loss, model: factor * loss}
        out = train(mlp(16, 1), regression(), adam(3e-3), loss=F.mse_loss, **options)
        assert [f.step for f in out.guard.findings][:1] == [3]

    @pytest.mark.parametrize("scale", [1.0, 1e3])
    def test_a_fast_start_is_quiet(self, scale):
        assert train(mlp(16, 1), regression(scale), adam(3e-2), loss=F.mse_loss).said == ""

    def test_a_quadratic_that_is_learned_at_once_is_quiet(self):
        draw, options = regression(100.0, noise=0.0), {"loss": F.mse_loss, "batch": 256}
        out = train(nn.Linear(16, 1), draw, sgd(0.3), **options)
        assert out.losses[10] < 1e-3 * out.losses[0]
        assert out.said == ""

    def test_a_head_of_zeros_with_warm_up_is_quiet(self):
        model = mlp()
        nn.init.zeros_(model[-1].weight)
        options = {"schedule": lambda o: lr_scheduler.LambdaLR(o, lambda e: min(1, (e + 1) / 20))}
        assert train(model, templates(), sgd(0.1), **options).said == ""


class TestAJumpOfALearnedLoss:
    """It jumps at once from an outlying batch, and over two steps when the training leaves its valley."""

    @staticmethod
    def ceilings(*jumps):
        """Return the ceiling of a spike at each of some steps after 200 quiet ones.

        Args:
            *jumps: Norm and loss of each step, as multiples of the usual norm and of the first loss.
        """
        stream = Stream(Spike())
        for step in range(200):
            wave = 1 + 0.1 * math.sin(step)
            stream.feed([wave] * 6, loss=max(1e-3, 0.8**step) * wave)
        readings = [stream.feed([norm] * 6, loss=loss)[0] for norm, loss in jumps]
        return [int(r.ceiling) if r.raised else None for r in readings]

    @pytest.mark.parametrize("height", [0.6, 1.0, 100.0])
    def test_out_of_nothing_is_a_warning(self, height):
        assert self.ceilings((1000.0, height)) == [1]

    def test_that_began_at_the_step_before_is_none(self):
        assert self.ceilings((200.0, 0.3), (2e4, 0.9))[1] == 0

    def test_after_a_quiet_step_is_a_warning_again(self):
        assert self.ceilings((200.0, 0.3), (1.0, 1e-3), (2e4, 0.9))[2] == 1

    def test_after_a_jump_of_the_norm_alone_is_a_warning(self):
        assert self.ceilings((200.0, 1e-3), (2e4, 0.9))[1] == 1


class TestALossThatHadFallen:
    @pytest.mark.parametrize(
        ("optimizer", "growth", "steps"),
        [
            (sgd(0.05, momentum=0.9), 1.02, 250),
            (adam(1e-3), 1.06, 160),
            (sgd(0.02, momentum=0.97), 1.015, 250),
        ],
    )
    def test_and_comes_apart_is_found(self, optimizer, growth, steps):
        options = {"schedule": lambda o: lr_scheduler.LambdaLR(o, lambda e: growth**e), "steps": steps}
        out = train(mlp(depth=4), templates(), optimizer, **options)
        assert min(out.losses) < 0.5 * out.losses[0]
        assert set(out.found) & {"exploding", "oversized_update", "dead", "nonfinite"}
        assert out.cause in ("learning_rate_too_high", "momentum")

    def test_other_labels_are_no_explosion(self):
        def switch(step, x, y):
            return x, y if step < 100 else (y + 3) % 10

        out = train(mlp(), templates(noise=0.3), adam(1e-3), spoil=switch, steps=200)
        assert "exploding" not in out.found

    def test_harder_data_are_quiet(self):
        def harder(step, x, y):
            return (x, y) if step < 100 else (3 * x, 3 * y)

        assert (
            train(mlp(16, 1), regression(), adam(1e-3), loss=F.mse_loss, spoil=harder, steps=200).said == ""
        )

    def test_heavy_tails_are_quiet(self):
        def tails(step, x, y):
            noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(step))
            return x, y + 0.3 / noise.abs().clamp(min=1e-3)

        out = train(mlp(16, 1), regression(), adam(1e-3), loss=F.smooth_l1_loss, spoil=tails, steps=200)
        assert out.said == ""

    def test_a_penalty_that_sets_in_is_quiet(self):
        def penalised(step, loss, model):
            return loss + min(1, step / 100) * 1e-2 * sum(p.square().sum() for p in model.parameters())

        assert train(mlp(), templates(), adam(1e-3), reshape=penalised, steps=200).said == ""

    def test_cyclic_rates_are_quiet(self):
        options = {"schedule": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=40), "steps": 200}
        assert train(mlp(), templates(), sgd(1e-3, momentum=0.9), **options).said == ""


class TestATargetThatIsCopiedNowAndThen:
    @pytest.mark.parametrize(("every", "rate"), [(50, 1e-3), (80, 2e-3), (100, 1e-3)])
    def test_is_quiet(self, every, rate):
        def copied(step, x, y):
            return x, 0.01 * y + (step // every) * 0.1 + 0.5

        out = train(mlp(16, 1), regression(), adam(rate), loss=F.mse_loss, spoil=copied, steps=400, batch=128)
        assert out.losses[-1] < 0.1 * out.losses[0]
        assert out.said == ""
