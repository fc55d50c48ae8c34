"""What detectors see of the running statistics at one step; what nobody asks for is not computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.signals.stats import GradStats

#: Steps that establish what is usual, before a z-score means anything.
WARM_UP = 25
#: Steps with a loss after which it can be called flat.
_FLAT_AFTER = 60
#: From natural logarithms to decades.
DECADES = 1 / math.log(10)


class TrendState(NamedTuple):
    """What is carried from step to step; P-vectors and scalars, float32."""

    steps: Tensor
    seen: Tensor
    level: Tensor
    early: Tensor
    drift: Tensor
    variance: Tensor
    profile: Tensor
    offset: Tensor
    tilt: Tensor
    first_losses: Tensor
    loss_start: Tensor
    loss: Tensor
    loss_spread: Tensor
    slow_loss: Tensor
    best_loss: Tensor
    loss_steps: Tensor


@dataclass(frozen=True)
class Trends:
    """The statistics at one step; what is not asked for is not computed.

    Attributes:
        stats: The step.
        before: The state before it.
        state: The state after it.
        usual: float32 [], log of the usual global norm (geometric mean).
        deviation: float32 [], log of this step's norm over that.
        sigma: float32 [], usual size of the deviation.
        live: Bool [P], tensors with a gradient that is not all zero.
    """

    stats: GradStats
    before: TrendState
    state: TrendState
    usual: Tensor
    deviation: Tensor
    sigma: Tensor
    live: Tensor

    @property
    def steps(self) -> Tensor:
        """Good steps so far, this one included, float32 []."""
        return self.state.steps

    @property
    def profile(self) -> Tensor:
        """Running mean of log10(‖g‖/‖w‖), decades, float32 [P]."""
        return self.state.profile

    @property
    def offset(self) -> Tensor:
        """Distance of a layer's profile from that of the middle one at the last closer look, decades, float32 [P].

        NaN for what is no live layer.
        """
        return self.state.offset

    @property
    def tilt(self) -> Tensor:
        """Depth tilt in decades at the last closer look, float32 []; NaN with fewer than four live layers."""
        return self.state.tilt

    @property
    def loss_start(self) -> Tensor:
        """Median of the first five losses, float32 []; NaN when none was given."""
        return self.state.loss_start

    @cached_property
    def jump(self) -> Tensor:
        """Global norm divided by its usual value, dimensionless, float32 []."""
        return self.deviation.exp()

    @cached_property
    def spike_score(self) -> Tensor:
        """z-score of the log global norm against its own past, float32 []; 0 during warm-up."""
        number = self.stats.layout.constant
        return (
            self.deviation / torch.maximum(self.sigma, number(1e-3)) * (self.before.steps >= number(WARM_UP))
        )

    @cached_property
    def first_loss(self) -> Tensor:
        """The very first loss, of weights that no step has touched, float32 []."""
        return self.state.first_losses[0]

    @cached_property
    def surge(self) -> Tensor:
        """Decades by which the usual norm has grown since the tenth step, float32 []."""
        return (self.usual - self.before.early) * self.stats.layout.constant(DECADES)

    @cached_property
    def loss(self) -> Tensor:
        """Running mean of the loss, winsorised, float32 []."""
        number = self.stats.layout.constant
        return torch.where(self.state.loss_steps > number(0.0), self.state.loss, number(torch.nan))

    @cached_property
    def loss_jump(self) -> Tensor:
        """How far this loss lies above its mean, in mean absolute deviations, float32 []."""
        spread = torch.maximum(self.before.loss_spread, self.stats.layout.constant(1e-30))
        return (self.stats.loss - self.before.loss) / spread

    @cached_property
    def stuck(self) -> Tensor:
        """Whether the mean loss is still above 90 % of its start, or of the first loss if that was lower, bool [].

        False when no loss is given.
        """
        # The first loss is of weights that no wild step has touched yet.
        start = torch.minimum(self.loss_start, self.first_loss)
        return self.state.loss > start - 0.1 * start.abs()

    @cached_property
    def flat(self) -> Tensor:
        """Whether the loss falls no more, and has not fallen to half, bool [].

        Its mean over 20 steps is within 3 % of that over 100 then. Further down it is as likely that there is nothing
        left to learn.
        """
        loss, slow = self.state.loss, self.state.slow_loss
        start = torch.minimum(self.loss_start, self.first_loss)
        still = (loss > slow - 0.03 * slow.abs()) & (self.state.loss_steps >= _FLAT_AFTER)
        return still & (loss > start - 0.5 * start.abs())

    @cached_property
    def relapsed(self) -> Tensor:
        """Whether the mean loss is more than ten times the lowest it had been, bool []."""
        best = self.before.best_loss
        return (best > 0) & (self.state.loss > 10 * best)
