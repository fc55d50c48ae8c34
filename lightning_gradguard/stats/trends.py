"""Running statistics of the global norm, the depth profile and the loss, which all detectors share.

`init` and `update` carry a `TrendState` from step to step; `Trends` is what detectors read at one step. A property of
`Trends` is computed only if it is read. Norms and losses are winsorised (outliers are limited before they are
averaged), so one bad step moves the statistics little.

Three groups of statistics:

- The norm has a baseline: the global norm that the tensors seen before would have at their running means of log‖g‖.
  Each step's deviation from it gives a z-score.
- The depth profile is the running mean of log10(‖g‖/‖w‖) of each tensor, from which come the depth tilt and each
  layer's offset from the middle one.
- The loss has a start, a mean, a slower mean and a minimum, from which progress is judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.stats.depth_profile import offsets_and_tilt
from lightning_gradguard.stats.grad_stats import GradStats

#: Steps that establish the baseline, before a z-score means anything.
WARM_UP = 25
#: Spike score from which a step counts as a spike of the norm.
ALARM_Z = 6.0
#: Deviation, in standard deviations, to which a step is limited before it enters the statistics. At the alarm level a
#: spike in every twentieth step would make the spread grow without bound; at 3 every tenth step may be one.
WINSOR_Z = 3.0
#: From natural logarithms to decades (factors of ten).
DECADES = 1 / math.log(10)

#: Smallest weight of a step in the running means of the norms, the profile, the loss, and the slower one of the loss.
_NORM_GAIN, _PROFILE_GAIN, _LOSS_GAIN, _SLOW_LOSS_GAIN = 0.03, 0.1, 0.05, 0.01
#: Good steps before the one whose baseline is kept as the early one.
_EARLY = 9
#: Losses whose median is the start.
_FIRST_LOSSES = 5
#: Steps with a loss before there can be a plateau.
_PLATEAU_FROM = 60


class TrendState(NamedTuple):
    """What is carried from step to step, float32.

    Attributes:
        steps: [], good steps so far.
        seen: [P], steps with a gradient that is not all zero.
        level: [P], running mean of log‖g‖.
        early: [], log of the baseline at the tenth step; NaN before.
        drift: [], log of what the baseline moved beyond the levels.
        variance: [], of the deviation of the log global norm.
        profile: [P], running mean of log10(‖g‖/‖w‖), decades.
        offset: [P], `Trends.offset` at the last full evaluation.
        tilt: [], depth tilt at the last full evaluation, decades.
        first_losses: [5], NaN where there is none yet.
        loss_start: [], their median.
        loss: [], winsorised mean of the loss.
        loss_spread: [], its mean absolute deviation.
        slow_loss: [], mean of that mean over about 100 steps.
        best_loss: [], lowest mean; inf before the fifth loss.
        loss_steps: [], steps with a loss.
    """

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
    """Running statistics at one step.

    Attributes:
        stats: The step.
        before: The state before it.
        state: The state after it.
        baseline: float32 [], log of the global norm to expect (geometric mean).
        deviation: float32 [], log of this step's norm over that.
        sigma: float32 [], standard deviation of ``deviation``.
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
        """Distance of each layer from the middle one, decades, float32 [P].

        As of the last full evaluation; NaN for what is no live layer.
        """
        return self.state.offset

    @property
    def tilt(self) -> Tensor:
        """Depth tilt at the last full evaluation, decades, float32 []; NaN with few layers."""
        return self.state.tilt

    @cached_property
    def jump(self) -> Tensor:
        """Global norm divided by its baseline, dimensionless, float32 []."""
        return self.deviation.exp()

    @cached_property
    def spike_score(self) -> Tensor:
        """z-score of the log global norm, float32 []; 0 during warm-up."""
        number = self.stats.layout.constant
        return (
            self.deviation / torch.maximum(self.sigma, number(1e-3)) * (self.before.steps >= number(WARM_UP))
        )

    @cached_property
    def surge(self) -> Tensor:
        """Growth of the baseline since the tenth step, decades, float32 []; NaN before."""
        return (self.baseline - self.before.early) * self.stats.layout.constant(DECADES)

    @property
    def loss_start(self) -> Tensor:
        """Median of the first five losses, float32 []; NaN if none was given."""
        return self.state.loss_start

    @cached_property
    def first_loss(self) -> Tensor:
        """Loss before any step, float32 []."""
        return self.state.first_losses[0]

    @cached_property
    def loss(self) -> Tensor:
        """Running mean of the loss, winsorised, float32 []; NaN if none was given."""
        number = self.stats.layout.constant
        return torch.where(self.state.loss_steps > number(0.0), self.state.loss, number(torch.nan))

    @cached_property
    def loss_jump(self) -> Tensor:
        """Distance of the loss from its mean, in mean absolute deviations, float32 []."""
        spread = torch.maximum(self.before.loss_spread, self.stats.layout.constant(1e-30))
        return (self.stats.loss - self.before.loss) / spread

    @cached_property
    def no_progress(self) -> Tensor:
        """True if the mean loss is still above 90 % of its start, bool [].

        False if no loss is given. The first loss counts as the start if it was lower: it is of weights that no bad step
        has changed.
        """
        start = torch.minimum(self.loss_start, self.first_loss)
        return self.state.loss > start - 0.1 * start.abs()

    @cached_property
    def plateau(self) -> Tensor:
        """True if the loss stopped falling above half of its start, bool [].

        Its mean over 20 steps is then within 3 % of that over 100. Below half of the start a flat loss may as well mean
        that there is nothing left to learn.
        """
        loss, slow = self.state.loss, self.state.slow_loss
        start = torch.minimum(self.loss_start, self.first_loss)
        flat = (loss > slow - 0.03 * slow.abs()) & (self.state.loss_steps >= _PLATEAU_FROM)
        return flat & (loss > start - 0.5 * start.abs())

    @cached_property
    def relapsed(self) -> Tensor:
        """True if the mean loss is over ten times its lowest value, bool []."""
        best = self.before.best_loss
        return (best > 0) & (self.state.loss > 10 * best)


def init(stats: GradStats) -> TrendState:
    """Return the state before the first step."""
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
        first_losses=zero.new_full((_FIRST_LOSSES,), torch.nan),
        loss_start=torch.full_like(zero, torch.nan),
        loss=zero,
        loss_spread=zero,
        slow_loss=zero,
        best_loss=torch.full_like(zero, torch.inf),
        loss_steps=zero,
    )


def update(stats: GradStats, state: TrendState) -> tuple[Trends, TrendState]:
    """Compare one step with the past; return both it and the new state."""
    number, live = stats.layout.constant, stats.norms > stats.layout.zeros
    known = live & (state.seen > stats.layout.zeros)
    baseline, deviation, any_known = _baseline_and_deviation(stats, state, known)
    sigma = state.variance.sqrt()
    # At least e-fold, so that the fast first steps pass before the spread is known.
    reach = torch.maximum(number(WINSOR_Z) * sigma, number(1.0))
    change = torch.clamp(deviation, -reach, reach)
    # What the global norm exceeds that by is taken off every tensor alike.
    log_norms = stats.log_norms - (deviation - change)
    steps = state.steps + number(1.0)
    norm_gain = torch.maximum(steps.reciprocal(), number(_NORM_GAIN)) * any_known
    variance = torch.addcmul(state.variance, norm_gain, change.square())

    gain = (state.seen + number(1.0)).reciprocal()
    ratios = (log_norms - stats.log_weights) * number(DECADES)
    profile = _mean(state.profile, ratios, live, torch.maximum(gain, number(_PROFILE_GAIN)))
    early, offset, tilt = state.early, state.offset, state.tilt
    if stats.elapsed:
        early = torch.where(state.steps == number(_EARLY), baseline, early)
        offset, tilt = offsets_and_tilt(profile, live, stats.layout)
    new = TrendState(
        steps=steps,
        seen=state.seen + live,
        level=_mean(state.level, log_norms, live, torch.maximum(gain, number(_NORM_GAIN))),
        early=early,
        drift=torch.addcmul(state.drift, norm_gain, change),
        variance=torch.addcmul(variance, norm_gain, variance, value=-1),
        profile=profile,
        offset=offset,
        tilt=tilt,
        **_next_losses(stats, state),
    )
    return Trends(stats, state, new, baseline, deviation, sigma, live), new


def _mean(before: Tensor, value: Tensor, counts: Tensor, gain: Tensor) -> Tensor:
    """Return the next running mean of values that count."""
    return before.lerp(torch.where(counts, value, before), gain)


def _baseline_and_deviation(
    stats: GradStats, state: TrendState, known: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare the global norm with its baseline.

    Over tensors seen before, so that thawing a layer is no spike.

    Args:
        stats: The step.
        state: The state before it.
        known: Bool [P], tensors that count.

    Returns:
        Log of the baseline; the deviation from it, 0 if no tensor counts; and whether any does. [] each.
    """
    observed = torch.linalg.vector_norm(stats.norms * known).log()
    baseline = torch.linalg.vector_norm(state.level.exp() * known).log() + state.drift
    # A norm whose square is below float32 says nothing, as if no tensor counted.
    any_known = torch.minimum(observed, baseline) > -torch.inf
    deviation = torch.where(any_known, observed - baseline, stats.layout.constant(0.0))
    return baseline, deviation, any_known


_LOSS_FIELDS = (
    "first_losses",
    "loss_start",
    "loss",
    "loss_spread",
    "slow_loss",
    "best_loss",
    "loss_steps",
)


def _next_losses(stats: GradStats, state: TrendState) -> dict[str, Tensor]:
    """Return the fields of the next state that follow the loss."""
    known = {name: getattr(state, name) for name in _LOSS_FIELDS}
    if not stats.has_loss:
        return known
    number, before = stats.layout.constant, state.loss_steps
    count, offset = before + number(1.0), stats.loss - state.loss
    # At least the loss itself, or one that was constant could never be seen to move.
    reach = torch.maximum(number(3.0) * state.loss_spread, state.loss.abs())
    winsorised = torch.clamp(offset, -reach, reach)
    share = count.reciprocal()
    gain = torch.maximum(share, number(_LOSS_GAIN))
    if stats.elapsed:
        # The first losses all fall into full evaluations.
        places, early = torch.arange(_FIRST_LOSSES, device=count.device), before < number(_FIRST_LOSSES)
        known["first_losses"] = torch.where(places == before, stats.loss, state.first_losses)
        known["loss_start"] = torch.nanmedian(known["first_losses"], 0).values
        winsorised = torch.where(early, offset, winsorised)
    loss = torch.addcmul(state.loss, gain, winsorised)
    # The first offset is the loss itself, and no deviation.
    spread = state.loss_spread.lerp(winsorised.abs(), gain) * (before > number(0.0))
    has_start = count >= number(_FIRST_LOSSES)
    return {
        **known,
        "loss": loss,
        "loss_spread": spread,
        "slow_loss": state.slow_loss.lerp(loss, torch.maximum(share, number(_SLOW_LOSS_GAIN))),
        "best_loss": torch.where(has_start, torch.minimum(state.best_loss, loss), state.best_loss),
        "loss_steps": count,
    }
