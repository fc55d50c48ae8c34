"""Running statistics that detectors share: the usual norm of each tensor, the depth profile, the loss's progress.

All are scale-free: multiplying the loss by a constant changes no ratio, z-score or tilt. The guard advances
the state on good steps only, so one NaN leaves no trace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradguard.signals import losses
from lightning_gradguard.signals.profile import depth_tilt as depth_tilt
from lightning_gradguard.signals.profile import shape_of
from lightning_gradguard.signals.stats import GradStats
from lightning_gradguard.signals.view import DECADES, Trends, TrendState
from lightning_gradguard.signals.view import WARM_UP as WARM_UP

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
        **losses.init(zero),
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
        **losses.follow(stats, state),
    )
    return Trends(stats, state, new, usual, deviation, sigma, live), new


def trends_of(stats: GradStats) -> Trends:
    """The shared running statistics of this step.

    Raises:
        ValueError: If they have not been set, which the guard does.
    """
    if stats.trends is None:
        raise ValueError(
            "stats.trends must be set before detectors run: trends, state = trends.update(stats, state)"
        )
    return stats.trends


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
