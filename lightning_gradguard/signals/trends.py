"""Running statistics that detectors share: the usual norm of each tensor, the depth profile, the loss's progress.

All are scale-free: multiplying the loss by a constant changes no ratio, z-score or tilt. The guard advances
the state on good steps only, so one NaN leaves no trace.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.signals.layout import Layout
from lightning_gradguard.signals.stats import GradStats

#: Steps that establish what is usual, before a z-score means anything.
WARM_UP = 25
#: Spike score at which a step counts as an alarm.
ALARM_Z = 6.0
#: Deviation, in standard deviations, up to which a step enters the statistics. At the alarm level a spike
#: in every twentieth step would make the spread grow without bound; at 3 its share may be a tenth.
WINSOR_Z = 3.0
#: Fewest layers for which a tilt over depth is a statement.
MIN_LAYERS = 4

_NORM_GAIN = 0.03
_PROFILE_GAIN = 0.1
_LOSS_GAIN, _SLOW_GAIN, _FLAT_AFTER = 0.05, 0.01, 60
_EARLY = 9
_FIRST = 5


class TrendState(NamedTuple):
    """What is carried from step to step; P-vectors and scalars, float32."""

    steps: Tensor
    seen: Tensor
    level: Tensor
    early: Tensor
    drift: Tensor
    variance: Tensor
    profile: Tensor
    first_losses: Tensor
    loss: Tensor
    loss_spread: Tensor
    slow_loss: Tensor
    best_loss: Tensor
    loss_steps: Tensor


class Trends(NamedTuple):
    """The statistics at one step.

    Attributes:
        steps: float32 [], good steps so far, this one included.
        spike_score: float32 [], z of the log global norm against its own past; 0 during warm-up.
        jump: float32 [], global norm divided by its usual value (geometric mean), dimensionless.
        surge: float32 [], decades by which the usual norm has grown since the tenth step.
        profile: float32 [P], running mean of log10(‖g‖/‖w‖), decades.
        live: Bool [P], tensors with a gradient that is not all zero.
        starved: Bool [P], layers with a gradient of exactly zero before the first one that has any.
        offset: float32 [P], distance of a layer's profile from that of the middle one, decades; NaN for what is no
            live layer.
        tilt: float32 [], depth tilt in decades from input to output; NaN with fewer than four live layers.
        loss_start: float32 [], median of the first five losses; NaN when none was given.
        first_loss: float32 [], the very first, of weights that no step has touched.
        loss: float32 [], running mean of the loss, winsorised.
        loss_jump: float32 [], how far this loss lies above its mean, in mean absolute deviations.
        stuck: Bool [], the mean loss is still above 90 % of its start, or of the first loss if that was lower;
            False when no loss is given.
        relapsed: Bool [], the mean loss is more than ten times the lowest it has been.
        flat: Bool [], the loss falls no more, and has not fallen to half: its mean over 20 steps is within 3 % of
            that over 100. Further down it is as likely that there is nothing left to learn.
    """

    steps: Tensor
    spike_score: Tensor
    jump: Tensor
    surge: Tensor
    profile: Tensor
    live: Tensor
    starved: Tensor
    offset: Tensor
    tilt: Tensor
    loss_start: Tensor
    first_loss: Tensor
    loss: Tensor
    loss_jump: Tensor
    stuck: Tensor
    relapsed: Tensor
    flat: Tensor


def init(stats: GradStats) -> TrendState:
    """A state that knows nothing yet."""
    zero, zeros = torch.zeros_like(stats.total), torch.zeros_like(stats.norms)
    return TrendState(
        steps=zero,
        seen=zeros,
        level=zeros,
        early=torch.full_like(zero, torch.nan),
        drift=zero,
        variance=zero,
        profile=zeros,
        first_losses=zero.new_full((_FIRST,), torch.nan),
        loss=zero,
        loss_spread=zero,
        slow_loss=zero,
        best_loss=torch.full_like(zero, torch.inf),
        loss_steps=zero,
    )


def update(stats: GradStats, state: TrendState) -> tuple[Trends, TrendState]:
    """Judges one step against the past and returns it with the past that the next step is judged against."""
    live = stats.present & (stats.norms > 0)
    log_norms = torch.log(torch.where(live, stats.norms, 1.0))
    residual, known, expected = _residual(log_norms, live, state)
    usual_norm = expected + state.drift
    sigma = torch.sqrt(state.variance)
    deviation = residual - state.drift
    # At least e-fold, so that the fast first steps pass before the spread is known.
    reach = torch.clamp(WINSOR_Z * sigma, min=1.0)
    usual = state.drift + torch.clamp(deviation, -reach, reach)
    # What the whole norm has in excess of that is taken off every tensor alike.
    calm = log_norms - (residual - usual)
    gain = torch.clamp(1 / (state.steps + 1), min=_NORM_GAIN)
    warm = (state.steps >= WARM_UP) & known
    score = torch.where(warm, deviation / torch.clamp(sigma, min=1e-3), 0.0)
    jump = torch.where(known, torch.exp(deviation), 1.0)

    tensor_gain = torch.where(live, torch.clamp(1 / (state.seen + 1), min=_NORM_GAIN), 0.0)
    profile_gain = torch.where(live, torch.clamp(1 / (state.seen + 1), min=_PROFILE_GAIN), 0.0)
    ratios = (calm - torch.log(torch.clamp(stats.weights, min=1e-30))) / math.log(10)
    profile = state.profile + profile_gain * (ratios - state.profile)
    tail = _loss(stats, state) if stats.has_loss else _same_loss(state)
    first, loss, spread, slow, loss_steps = tail
    known_loss = loss_steps >= _FIRST
    start = torch.nanmedian(first)
    # The first loss is of weights that no wild step has touched yet.
    lower = torch.minimum(start, first[0])
    layered = torch.where(live & stats.layout.is_layer, profile, torch.nan)
    trends = Trends(
        steps=state.steps + 1,
        spike_score=score,
        jump=jump,
        surge=(usual_norm - state.early) / math.log(10),
        profile=profile,
        live=live,
        starved=_starved(stats, live),
        offset=layered - torch.nanmedian(layered),
        tilt=depth_tilt(profile, live, stats.layout),
        loss_start=start,
        first_loss=first[0],
        loss=torch.where(loss_steps > 0, loss, torch.nan),
        loss_jump=(stats.loss - state.loss) / torch.clamp(state.loss_spread, min=1e-30),
        stuck=loss > lower - 0.1 * lower.abs(),
        relapsed=(state.best_loss > 0) & (loss > 10 * state.best_loss),
        flat=(loss > slow - 0.03 * slow.abs())
        & (loss_steps >= _FLAT_AFTER)
        & (loss > lower - 0.5 * lower.abs()),
    )
    moved = torch.where(known, gain, 0.0)
    new = TrendState(
        steps=state.steps + 1,
        seen=state.seen + live,
        early=torch.where(state.steps == _EARLY, usual_norm, state.early),
        level=state.level + tensor_gain * (calm - state.level),
        drift=state.drift + moved * (usual - state.drift),
        variance=(1 - moved) * (state.variance + moved * (usual - state.drift) ** 2),
        profile=profile,
        first_losses=first,
        loss=loss,
        loss_spread=spread,
        slow_loss=slow,
        best_loss=torch.where(known_loss, torch.minimum(state.best_loss, loss), state.best_loss),
        loss_steps=loss_steps,
    )
    return trends, new


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


def depth_tilt(profile: Tensor, live: Tensor, layout: Layout) -> Tensor:
    """Decades by which the profile rises from the first to the last layer, float32 [].

    (L-1) times the Theil-Sen slope over depth, the median of the slopes of pairs of layers, so that single
    odd layers do not matter. Positive: gradients shrink towards the input.

    Args:
        profile: float32 [P], decades.
        live: Bool [P], tensors that count. With fewer than four layers among them the tilt is NaN.
        layout: Tells which tensors are layers, and their order.

    Source: Sen 1968, "Estimates of the regression coefficient based on Kendall's tau".
    """
    if layout.layers.numel() < MIN_LAYERS:
        return profile.new_tensor(torch.nan)
    values, counts = profile[layout.layers], live[layout.layers]
    depth = torch.cumsum(counts, 0) - 1
    first, second = layout.pairs
    rise = values[second] - values[first]
    slopes = torch.where(counts[first] & counts[second], rise / (depth[second] - depth[first]), torch.nan)
    total = counts.sum()
    return torch.where(total >= MIN_LAYERS, torch.nanmedian(slopes) * (total - 1), torch.nan)


def _starved(stats: GradStats, live: Tensor) -> Tensor:
    """Layers with a gradient of exactly zero before the first one that has any, bool [P]."""
    layout = stats.layout
    first = torch.where(layout.is_layer & live, layout.depth, torch.inf).min()
    return layout.is_layer & stats.present & ~live & (layout.depth < first) & first.isfinite()


def _residual(log_norms: Tensor, live: Tensor, state: TrendState) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the norm over its expectation, from tensors seen before, so that thawing a layer is no spike.

    Returns:
        That, whether any tensor had been seen, and the log of the expectation.
    """
    known = live & (state.seen > 0)
    any_known = known.any()
    observed = torch.logsumexp(torch.where(known, 2 * log_norms, -torch.inf), 0) / 2
    expected = torch.logsumexp(torch.where(known, 2 * state.level, -torch.inf), 0) / 2
    return torch.where(any_known, observed - expected, 0.0), any_known, expected


def _same_loss(state: TrendState) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What is known of the loss stays as it is where none was given."""
    return state.first_losses, state.loss, state.loss_spread, state.slow_loss, state.loss_steps


def _loss(stats: GradStats, state: TrendState) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """First losses, winsorised mean, mean absolute deviation, slower mean, count: one outlier moves them little."""
    count = state.loss_steps
    first = torch.where(torch.arange(_FIRST, device=count.device) == count, stats.loss, state.first_losses)
    # The loss itself at least, or one that was constant could not be seen to move.
    offset, reach = stats.loss - state.loss, torch.maximum(3 * state.loss_spread, state.loss.abs())
    offset = torch.where(count < _FIRST, offset, torch.clamp(offset, -reach, reach))
    gain = torch.clamp(1 / (count + 1), min=_LOSS_GAIN)
    # The first offset is the loss itself, and no deviation.
    spread = torch.where(count > 0, state.loss_spread + gain * (offset.abs() - state.loss_spread), 0.0)
    loss = state.loss + gain * offset
    slow = state.slow_loss + torch.clamp(1 / (count + 1), min=_SLOW_GAIN) * (loss - state.slow_loss)
    return first, loss, spread, slow, count + 1
