"""What detectors see of the running statistics at one step; what nobody asks for is not computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.stats.depth_profile import depth_tilt as depth_tilt
from lightning_gradguard.stats.depth_profile import shape_of
from lightning_gradguard.stats.grad_stats import GradStats

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
        baseline: float32 [], log of the usual global norm (geometric mean).
        deviation: float32 [], log of this step's norm over that.
        sigma: float32 [], usual size of the deviation.
        live: Bool [P], tensors with a gradient that is not all zero.
    """

    stats: GradStats
    before: TrendState
    state: TrendState
    baseline: Tensor
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
        return (self.baseline - self.before.early) * self.stats.layout.constant(DECADES)

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
    def no_progress(self) -> Tensor:
        """Whether the mean loss is still above 90 % of its start, or of the first loss if that was lower, bool [].

        False when no loss is given.
        """
        # The first loss is of weights that no wild step has touched yet.
        start = torch.minimum(self.loss_start, self.first_loss)
        return self.state.loss > start - 0.1 * start.abs()

    @cached_property
    def plateau(self) -> Tensor:
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


_GAIN, _SLOW_GAIN = 0.05, 0.01
_FIRST = 5
_FIELDS = ("first_losses", "loss_start", "loss", "loss_spread", "slow_loss", "best_loss", "loss_steps")


def _init_losses(zero: Tensor) -> dict[str, Tensor]:
    """No loss yet.

    Args:
        zero: float32 [], on the device.
    """
    return {
        "first_losses": zero.new_full((_FIRST,), torch.nan),
        "loss_start": torch.full_like(zero, torch.nan),
        "loss": zero,
        "loss_spread": zero,
        "slow_loss": zero,
        "best_loss": torch.full_like(zero, torch.inf),
        "loss_steps": zero,
    }


def _follow_losses(stats: GradStats, state: TrendState) -> dict[str, Tensor]:
    """What is known after this step, of which one outlier moves little; as it was where no loss is given.

    Returns:
        First losses, float32 [5], their median, winsorised mean, mean absolute deviation, slower mean, lowest mean, and
        count, float32 [] each: fields of `TrendState`.
    """
    known = {name: getattr(state, name) for name in _FIELDS}
    if not stats.has_loss:
        return known
    number, before = stats.layout.constant, state.loss_steps
    count, offset = before + number(1.0), stats.loss - state.loss
    # The loss itself at least, or one that was constant could not be seen to move.
    reach = torch.maximum(number(3.0) * state.loss_spread, state.loss.abs())
    winsorised = torch.clamp(offset, -reach, reach)
    share = count.reciprocal()
    gain = torch.maximum(share, number(_GAIN))
    if stats.elapsed:
        # Each of the first losses comes with a closer look.
        places, begun = torch.arange(_FIRST, device=count.device), before < number(_FIRST)
        known["first_losses"] = torch.where(places == before, stats.loss, state.first_losses)
        known["loss_start"] = torch.nanmedian(known["first_losses"], 0).values
        winsorised = torch.where(begun, offset, winsorised)
    loss = torch.addcmul(state.loss, gain, winsorised)
    # The first offset is the loss itself, and no deviation.
    spread = state.loss_spread.lerp(winsorised.abs(), gain) * (before > number(0.0))
    settled = count >= number(_FIRST)
    return {
        **known,
        "loss": loss,
        "loss_spread": spread,
        "slow_loss": state.slow_loss.lerp(loss, torch.maximum(share, number(_SLOW_GAIN))),
        "best_loss": torch.where(settled, torch.minimum(state.best_loss, loss), state.best_loss),
        "loss_steps": count,
    }


#: Spike score at which a step counts as an alarm.
ALARM_Z = 6.0
#: Deviation, in standard deviations, up to which a step enters the statistics. At the alarm level a spike
#: in every twentieth step would make the spread grow without bound; at 3 its share may be a tenth.
WINSOR_Z = 3.0

_NORM_GAIN = 0.03
_PROFILE_GAIN = 0.1
_EARLY = 9


def init(stats: GradStats) -> TrendState:
    """A state that knows nothing yet."""
    zero, zeros = torch.zeros_like(stats.total), torch.zeros_like(stats.norms)
    unknown = torch.full_like(zero, torch.nan)
    return TrendState(
        steps=zero,
        seen=zeros,
        level=zeros,
        early=unknown,
        drift=zero,
        variance=zero,
        profile=zeros,
        offset=torch.full_like(zeros, torch.nan),
        tilt=unknown,
        **_init_losses(zero),
    )


def update(stats: GradStats, state: TrendState) -> tuple[Trends, TrendState]:
    """Judges one step against the past and returns it with the past that the next step is judged against."""
    number, live = stats.layout.constant, stats.norms > stats.layout.zeros
    known = live & (state.seen > stats.layout.zeros)
    usual, deviation, any_known = _deviation(stats, state, known)
    sigma = state.variance.sqrt()
    # At least e-fold, so that the fast first steps pass before the spread is known.
    reach = torch.maximum(number(WINSOR_Z) * sigma, number(1.0))
    change = torch.clamp(deviation, -reach, reach)
    # What the whole norm has in excess of that is taken off every tensor alike.
    excess = deviation - change
    calm = stats.log_norms - excess
    steps = state.steps + number(1.0)
    moved = torch.maximum(steps.reciprocal(), number(_NORM_GAIN)) * any_known
    variance = torch.addcmul(state.variance, moved, change.square())

    share = (state.seen + number(1.0)).reciprocal()
    ratios = (calm - stats.log_weights) * number(DECADES)
    profile = _mean(state.profile, ratios, live, torch.maximum(share, number(_PROFILE_GAIN)))
    early, offset, tilt = state.early, state.offset, state.tilt
    if stats.elapsed:
        early = torch.where(state.steps == number(_EARLY), usual, early)
        offset, tilt = shape_of(profile, live, stats.layout)
    new = TrendState(
        steps=steps,
        seen=state.seen + live,
        level=_mean(state.level, calm, live, torch.maximum(share, number(_NORM_GAIN))),
        early=early,
        drift=torch.addcmul(state.drift, moved, change),
        variance=torch.addcmul(variance, moved, variance, value=-1),
        profile=profile,
        offset=offset,
        tilt=tilt,
        **_follow_losses(stats, state),
    )
    return Trends(stats, state, new, usual, deviation, sigma, live), new


def _mean(before: Tensor, value: Tensor, counts: Tensor, gain: Tensor) -> Tensor:
    """A running mean, which stays where a value does not count."""
    return before.lerp(torch.where(counts, value, before), gain)


def _deviation(stats: GradStats, state: TrendState, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the global norm over what is usual, from tensors seen before, so that thawing a layer is no spike.

    Returns:
        Log of the usual norm, the deviation of this step's from it, 0 if no tensor had been seen, and whether any had.
    """
    observed = torch.linalg.vector_norm(stats.norms * known).log()
    usual = torch.linalg.vector_norm(state.level.exp() * known).log() + state.drift
    # A norm whose square is below float32 says nothing, as if it had not been seen.
    any_known = torch.minimum(observed, usual) > -torch.inf
    return usual, torch.where(any_known, observed - usual, stats.layout.constant(0.0)), any_known
