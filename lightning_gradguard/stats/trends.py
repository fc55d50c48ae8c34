"""Running statistics that all detectors share.

`init` and `update` carry a `TrendState` from step to step; `Trends` is what detectors read at one step. A property of
`Trends` is computed only if it is read. Norms and losses are winsorised (outliers are limited before they are
averaged), so one bad step moves the statistics little.

Three groups of statistics:

- The norm has a baseline: the global norm that the tensors seen before would have at their running means of log‖g‖.
  Each step's deviation from it gives a z-score.
- The depth profile is the running mean of log10(‖g‖/‖w‖) of each tensor, from which come the depth tilt, the largest
  cliff over depth, and each layer's offset from the middle one. Nets side by side are columns of their own.
- The loss has a start, a mean, a slower mean and a minimum, from which progress is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.layout import Layout

#: Steps that establish the baseline, before a z-score means anything.
WARM_UP = 25
#: Spike score from which a step counts as a spike of the norm.
ALARM_Z = 6.0
#: Deviation, in standard deviations, to which a step is limited before it enters the statistics. At the alarm level a
#: spike in every twentieth step would make the spread grow without bound; at 3 every tenth step may be one.
WINSOR_Z = 3.0
#: From natural logarithms to decades (factors of ten).
DECADES = 1 / math.log(10)
#: Fewest layers for which a depth tilt means anything.
MIN_LAYERS = 4
#: Range of healthy depth tilts in decades. The lower end is the limit of `Exploding`; healthy trainings reach -1.56
#: (benchmarks/detection.md). The upper end is where `DepthTilt` clears; healthy trainings reach 1.5, and 2.58 in cases
#: that were held out (benchmarks/held_out.md).
HEALTHY_DEPTH_TILT = (-1.8, 2.5)

#: Smallest weight of a step in the running means of the norms, the profile, the loss, and the slower one of the loss.
_NORM_GAIN, _PROFILE_GAIN, _LOSS_GAIN, _SLOW_LOSS_GAIN = 0.03, 0.1, 0.05, 0.01
#: Good steps before the one whose baseline is kept as the early one.
_EARLY = 9
#: Losses whose median is the start.
_FIRST_LOSSES = 5
#: Multiple of the median of the first losses, or of their median deviation from it, beyond which one is an outlier.
#: The losses of healthy trainings fall tenfold in them.
_OUTLIER = 30.0
#: Steps with a loss before there can be a plateau.
_PLATEAU_FROM = 60


class TrendState(NamedTuple):
    """State carried from step to step, float32.

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
        in_worst: [P], 1 for the layers of the column with that tilt, else 0.
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
    in_worst: Tensor
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
        """Good steps so far, with this one, float32 []."""
        return self.state.steps

    @property
    def profile(self) -> Tensor:
        """Running mean of log10(‖g‖/‖w‖), decades, float32 [P]."""
        return self.state.profile

    @property
    def offset(self) -> Tensor:
        """Offset of each layer, decades, float32 [P].

        Its distance from the middle layer of its column. As of the last full evaluation; NaN for what is no live layer.
        """
        return self.state.offset

    @property
    def tilt(self) -> Tensor:
        """Depth tilt, decades, float32 [].

        That of the worst column, as of the last full evaluation; NaN with few layers.
        """
        return self.state.tilt

    @property
    def in_worst(self) -> Tensor:
        """True for the layers of the column with that tilt, bool [P]."""
        return self.state.in_worst > self.stats.layout.zeros

    @cached_property
    def cliff(self) -> Cliff:
        """Largest cliff over depth.

        As of this step, so it is to be read at a full evaluation.
        """
        layout = self.stats.layout
        return find_cliff(self.profile, self.live, layout, self.stats.weights <= layout.floors)

    @cached_property
    def jump(self) -> Tensor:
        """Global norm over its baseline, dimensionless, float32 []."""
        return self.deviation.exp()

    @cached_property
    def spike_score(self) -> Tensor:
        """z-score of the log global norm, float32 [].

        It is 0 during warm-up.
        """
        number = self.stats.layout.constant
        return (
            self.deviation / torch.maximum(self.sigma, number(1e-3)) * (self.before.steps >= number(WARM_UP))
        )

    @cached_property
    def surge(self) -> Tensor:
        """Growth of the baseline, decades, float32 [].

        Since the tenth step; NaN before.
        """
        return (self.baseline - self.before.early) * self.stats.layout.constant(DECADES)

    @property
    def loss_start(self) -> Tensor:
        """Median of the first five losses, float32 [].

        It is NaN if none was given.
        """
        return self.state.loss_start

    @cached_property
    def first_loss(self) -> Tensor:
        """Loss before any step, float32 []."""
        return self.state.first_losses[0]

    @cached_property
    def loss(self) -> Tensor:
        """Winsorised running mean of the loss, float32 [].

        It is NaN if none was given.
        """
        number = self.stats.layout.constant
        return torch.where(self.state.loss_steps > number(0.0), self.state.loss, number(torch.nan))

    @cached_property
    def loss_jump(self) -> Tensor:
        """Distance of the loss from its mean, float32 [].

        In mean absolute deviations.
        """
        spread = torch.maximum(self.before.loss_spread, self.stats.layout.constant(1e-30))
        return (self.stats.loss - self.before.loss) / spread

    @cached_property
    def no_progress(self) -> Tensor:
        """True if the loss makes no progress, bool [].

        Its mean is then still above 90 % of its start. False if no loss is given. The first loss counts as the start if
        it was lower: it is of weights that no bad step has changed.
        """
        start = torch.minimum(self.loss_start, self.first_loss)
        return self.state.loss > start - 0.1 * start.abs()

    @cached_property
    def plateau(self) -> Tensor:
        """True if the loss has plateaued, bool [].

        Its mean over 20 steps is within 3 % of that over 100, and above half of its start. Below that, a flat loss may
        as well mean that there is nothing left to learn.
        """
        loss, slow = self.state.loss, self.state.slow_loss
        start = torch.minimum(self.loss_start, self.first_loss)
        flat = (loss > slow - 0.03 * slow.abs()) & (self.state.loss_steps >= _PLATEAU_FROM)
        return flat & (loss > start - 0.5 * start.abs())

    @cached_property
    def falling(self) -> Tensor:
        """True if the loss is below its start and falls, bool [].

        Its mean is then below its start and its slower mean by more than its mean absolute deviation.
        """
        start, loss = torch.minimum(self.loss_start, self.first_loss), self.state.loss
        distance = self.state.loss_spread
        return (loss < start - distance) & (loss < self.state.slow_loss - distance)

    @cached_property
    def fell_and_rose(self) -> Tensor:
        """True if the loss had fallen and is above its start again, bool [].

        It had fallen by half, and its mean is now 10 % above its start, which is positive.
        """
        start, best = self.loss_start, self.before.best_loss
        return (start > 0) & (best < 0.5 * start) & (self.state.loss > 1.1 * start)

    @cached_property
    def reach(self) -> Tensor:
        """Change of the loss that a step may make, float32 [].

        Over the mean loss, or its start if that is larger. The sum over the tensors of gradient times applied update is
        the largest change to first order.
        """
        stats = self.stats
        moved = torch.nan_to_num(stats.updates, nan=0.0) * stats.weights
        size = torch.maximum(self.state.loss.abs(), self.loss_start.abs())
        return (stats.norms * moved).sum() / size

    @cached_property
    def relapsed(self) -> Tensor:
        """True if the mean loss rose tenfold, bool []."""
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
        in_worst=zeros,
        first_losses=zero.new_full((_FIRST_LOSSES,), torch.nan),
        loss_start=torch.full_like(zero, torch.nan),
        loss=zero,
        loss_spread=zero,
        slow_loss=zero,
        best_loss=torch.full_like(zero, torch.inf),
        loss_steps=zero,
    )


def update(stats: GradStats, state: TrendState) -> tuple[Trends, TrendState]:
    """Compare one step with the past."""
    number, live = stats.layout.constant, stats.norms > stats.layout.zeros
    known = live & (state.seen > stats.layout.zeros)
    baseline = _baseline(state.level, known, state.drift)
    deviation, any_known = _deviation(number, torch.linalg.vector_norm(stats.norms * known).log(), baseline)
    sigma = state.variance.sqrt()
    change = _winsorised(number, deviation, sigma)
    # What the global norm exceeds that by is taken off every tensor alike.
    log_norms = stats.log_norms - (deviation - change)
    steps = state.steps + number(1.0)
    norm_gain = torch.maximum(steps.reciprocal(), number(_NORM_GAIN)) * any_known
    drift, variance = _next_drift(state.drift, state.variance, norm_gain, change)

    gain = (state.seen + number(1.0)).reciprocal()
    ratios = (log_norms - stats.log_weights) * number(DECADES)
    profile = _mean(state.profile, ratios, live, torch.maximum(gain, number(_PROFILE_GAIN)))
    early, offset, tilt, in_worst = state.early, state.offset, state.tilt, state.in_worst
    if stats.elapsed:
        early = torch.where(state.steps == number(_EARLY), baseline, early)
        offset, tilt, in_worst = offsets_and_tilt(profile, live, stats.layout)
    new = TrendState(
        steps=steps,
        seen=state.seen + live,
        level=_mean(state.level, log_norms, live, torch.maximum(gain, number(_NORM_GAIN))),
        early=early,
        drift=drift,
        variance=variance,
        profile=profile,
        offset=offset,
        tilt=tilt,
        in_worst=in_worst,
        **_next_losses(stats, state),
    )
    return Trends(stats, state, new, baseline, deviation, sigma, live), new


def fold_in(rows: Sequence[GradStats], state: TrendState) -> TrendState:
    """Return the state after several steps without a full evaluation.

    Gives what `update` gives one step at a time, to the bit, in two thirds of the operations: whatever does not depend
    on the step before is worked out for all of them together.

    Args:
        rows: The k steps, oldest first, at least one. None is a full evaluation, and so none has one of the first
            losses.
        state: The state before them.
    """
    number, norms = rows[0].layout.constant, torch.stack([row.norms for row in rows])
    live = norms > number(0.0)
    counts = live.to(torch.float32)
    before = state.seen + torch.cumsum(counts, 0) - counts
    known = live & (before > number(0.0))
    observed = torch.linalg.vector_norm(norms * known, dim=1).log()
    log_norms = torch.where(live, norms.log(), number(0.0))
    share = (before + number(1.0)).reciprocal()
    norm_gains = (torch.maximum(share, number(_NORM_GAIN)) * live).unbind()
    profile_gains = (torch.maximum(share, number(_PROFILE_GAIN)) * live).unbind()
    steps = state.steps + torch.arange(1, len(rows) + 1, device=norms.device)
    gains = torch.maximum(steps.reciprocal(), number(_NORM_GAIN)).unbind()
    level, drift, variance, logs = state.level, state.drift, state.variance, []
    each = zip(observed.unbind(), known.unbind(), log_norms.unbind(), norm_gains, gains, strict=True)
    for norm, own, log_norm, norm_gain, gain in each:
        deviation, any_known = _deviation(number, norm, _baseline(level, own, drift))
        change = _winsorised(number, deviation, variance.sqrt())
        drift, variance = _next_drift(drift, variance, gain * any_known, change)
        logs.append(log_norm - (deviation - change))
        level = level.lerp(logs[-1], norm_gain)
    profile = state.profile
    ratios = (torch.stack(logs) - torch.stack([row.log_weights for row in rows])) * number(DECADES)
    for ratio, profile_gain in zip(ratios.unbind(), profile_gains, strict=True):
        profile = profile.lerp(ratio, profile_gain)
    # None of these is a view, which would keep what it is a view of.
    return state._replace(
        steps=state.steps + len(rows),
        seen=before[-1] + counts[-1],
        level=level,
        profile=profile,
        drift=drift,
        variance=variance,
        **_fold_in_losses([row for row in rows if row.has_loss], state),
    )


def _fold_in_losses(rows: Sequence[GradStats], state: TrendState) -> dict[str, Tensor]:
    """Return the loss fields after steps that all have a loss, none of them among the first."""
    if not rows:
        return {}
    number, loss, spread = rows[0].layout.constant, state.loss, state.loss_spread
    slow_loss, best_loss = state.slow_loss, state.best_loss
    counts = state.loss_steps + torch.arange(1, len(rows) + 1, device=loss.device)
    shares = counts.reciprocal()
    gains = torch.maximum(shares, number(_LOSS_GAIN)).unbind()
    slow_gains = torch.maximum(shares, number(_SLOW_LOSS_GAIN)).unbind()
    for row, gain, slow_gain in zip(rows, gains, slow_gains, strict=True):
        offset = _winsorised_loss(number, row.loss, loss, spread)
        loss = torch.addcmul(loss, gain, offset)
        spread = spread.lerp(offset.abs(), gain)
        slow_loss = slow_loss.lerp(loss, slow_gain)
        best_loss = torch.minimum(best_loss, loss)
    return {
        "loss": loss,
        "loss_spread": spread,
        "slow_loss": slow_loss,
        "best_loss": best_loss,
        "loss_steps": state.loss_steps + len(rows),
    }


def _winsorised_loss(number: Callable[[float], Tensor], loss: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Return the distance of a loss from its mean, within its limits."""
    # At least the loss itself, or one that was constant could never be seen to move.
    reach = torch.maximum(number(3.0) * spread, mean.abs())
    return torch.clamp(loss - mean, -reach, reach)


def _winsorised(number: Callable[[float], Tensor], deviation: Tensor, sigma: Tensor) -> Tensor:
    """Return a deviation within its limits."""
    # At least e-fold, so that the fast first steps pass before the spread is known.
    reach = torch.maximum(number(WINSOR_Z) * sigma, number(1.0))
    return torch.clamp(deviation, -reach, reach)


def _next_drift(drift: Tensor, variance: Tensor, gain: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Return drift and variance after one more deviation."""
    after = torch.addcmul(variance, gain, change.square())
    return torch.addcmul(drift, gain, change), torch.addcmul(after, gain, after, value=-1)


def _mean(before: Tensor, value: Tensor, counts: Tensor, gain: Tensor) -> Tensor:
    """Return the next mean of values that count."""
    return before.lerp(torch.where(counts, value, before), gain)


def expected_norm(state: TrendState, live: Tensor) -> Tensor:
    """Return the global norm to expect at the next step, float32 [].

    Args:
        state: The state before it.
        live: Bool [P], tensors that will have a gradient.
    """
    return _baseline(state.level, live, state.drift).exp()


def _baseline(level: Tensor, known: Tensor, drift: Tensor) -> Tensor:
    """Return the log of the baseline over known tensors, float32 []."""
    norm: Tensor = torch.linalg.vector_norm(level.exp() * known)
    return norm.log() + drift


def _deviation(
    number: Callable[[float], Tensor], observed: Tensor, baseline: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the deviation of a norm from its baseline, 0 if no tensor counts; and whether any does.

    Args:
        number: Gives constants.
        observed: Log of the global norm of the tensors seen before, so that thawing a layer is no spike; [].
        baseline: Log of the baseline over the same tensors, [].
    """
    # A norm whose square is below float32 says nothing, as if no tensor counted.
    any_known = torch.minimum(observed, baseline) > number(-torch.inf)
    return torch.where(any_known, observed - baseline, number(0.0)), any_known


def offsets_and_tilt(profile: Tensor, live: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return each layer's offset, the tilt, and the layers that have it.

    Args:
        profile: float32 [P], log10(‖g‖/‖w‖) of each tensor, decades (factors of ten).
        live: Bool [P], tensors that count.
        layout: Gives the layers and their columns.

    Returns:
        Distance from the middle layer of the column in decades, float32 [P], NaN for what is no live layer; the depth
        tilt of the worst column, float32 []; and 1 for the layers of that column, else 0, float32 [P].

        Of layers that belong to several columns, the worst column counts. Gradients that grow towards the input do so
        on each way from the loss: of columns that begin with the same layer, the one where they grow least counts.
    """
    layered = torch.where(live & layout.in_column, profile, layout.constant(torch.nan))
    offsets = layered - torch.nanmedian(layered, 1, keepdim=True).values
    tilts = column_tilts(profile, live, layout)
    if len(layout.columns) == 1:
        return offsets[0], tilts[0], layout.in_column[0].float()
    known = ~tilts.isnan()
    growing = torch.where(
        known,
        torch.where(layout.same_start & known, tilts, layout.constant(-torch.inf)).amax(1),
        layout.constant(torch.nan),
    )
    low, high = HEALTHY_DEPTH_TILT
    badness = torch.where(known, torch.maximum(tilts / high, growing / low), -1.0)
    nearest = torch.where(layout.in_column, badness[:, None], layout.constant(-torch.inf)).argmax(
        0, keepdim=True
    )
    worst = badness.argmax(0, keepdim=True)
    tilts = torch.where(tilts / high >= growing / low, tilts, growing)
    return (
        offsets.gather(0, nearest)[0],
        tilts.gather(0, worst).reshape(()),
        layout.in_column.index_select(0, worst)[0].float(),
    )


def depth_tilt(profile: Tensor, live: Tensor, layout: Layout) -> Tensor:
    """Return the depth tilt of the worst column, float32 [].

    See `column_tilts`. NaN with fewer than four live layers.

    Args:
        profile: float32 [P], decades.
        live: Bool [P], tensors that count.
        layout: Gives the layers and their columns.
    """
    return offsets_and_tilt(profile, live, layout)[1]


def column_tilts(profile: Tensor, live: Tensor, layout: Layout) -> Tensor:
    """Return the depth tilt of each column, float32 [C].

    The decades (factors of ten) by which the profile rises from the first to the last layer. It is (L - 1) times the
    Theil-Sen slope over depth, the median of the slopes of pairs of layers, so that single odd layers do not matter.
    Positive: gradients shrink towards the input. NaN with fewer than four live layers.

    Args:
        profile: float32 [P], decades.
        live: Bool [P], tensors that count.
        layout: Gives the layers and their columns.

    Source: Sen 1968, "Estimates of the regression coefficient based on Kendall's tau".
    """
    if layout.places.shape[1] < MIN_LAYERS:
        return layout.constant(torch.nan).expand(len(layout.columns))
    values, counts = profile[layout.places], live[layout.places] & layout.filled
    depth = torch.cumsum(counts, 1) - 1
    first, second = layout.pairs.long()
    rise = values.gather(1, second) - values.gather(1, first)
    both = counts.gather(1, first) & counts.gather(1, second) & (second > first)
    slopes = torch.where(
        both, rise / (depth.gather(1, second) - depth.gather(1, first)), layout.constant(torch.nan)
    )
    total = counts.sum(1)
    return torch.where(
        total >= MIN_LAYERS, torch.nanmedian(slopes, 1).values * (total - 1), layout.constant(torch.nan)
    )


class Cliff(NamedTuple):
    """A step in the depth profile.

    Attributes:
        height: Decades by which all layers before it lie below all layers after it, float32 []; -inf without one.
        below: Decades by which each layer lies below those after it, float32 [P]; -inf for what is no live layer of the
            column.
    """

    height: Tensor
    below: Tensor


def find_cliff(profile: Tensor, live: Tensor, layout: Layout, tiny: Tensor) -> Cliff:
    """Return the largest cliff in the profile of a column.

    It is where all layers up to some depth, at least two, lie far below all layers after it. A slope cannot see it if
    most layers are on one side. Each layer counts as the median of itself and its two neighbours, so that single odd
    layers do not hide a cliff; the first and the last count as they are. What lies before a layer that began at zero
    gets little until that layer has grown, and is no cliff.

    Args:
        profile: float32 [P], decades (factors of ten).
        live: Bool [P], tensors that count.
        layout: Gives the layers and their columns.
        tiny: Bool [P], weights far smaller than a common initialization.
    """
    number = layout.constant
    if layout.places.shape[1] < 3:
        return Cliff(number(-torch.inf), number(-torch.inf).expand_as(profile))
    counts = live[layout.places] & layout.filled
    # Live layers first, in their order.
    sorted_places = layout.places.gather(1, torch.argsort((~counts).int(), dim=1, stable=True))
    filled = torch.arange(counts.shape[1], device=counts.device) < counts.sum(1, keepdim=True)
    values = profile[sorted_places]
    smooth = values.clone()
    before, own, after = values[:, :-2], values[:, 1:-1], values[:, 2:]
    middle = torch.maximum(torch.minimum(before, own), torch.minimum(torch.maximum(before, own), after))
    smooth[:, 1:-1] = torch.where(filled[:, 2:], middle, own)
    highest = torch.where(filled, smooth, layout.constant(-torch.inf)).cummax(1).values
    lowest = torch.where(filled, smooth, layout.constant(torch.inf)).flip(1).cummin(1).values.flip(1)
    counted = filled[:, 2:] & ~tiny[sorted_places[:, 2:]]
    heights = torch.where(counted, lowest[:, 2:] - highest[:, 1:-1], layout.constant(-torch.inf))
    height, place = heights.flatten().max(0)
    level = lowest[:, 2:].flatten().gather(0, place.reshape(1))
    column = layout.in_column.index_select(0, place.reshape(1) // heights.shape[1])[0]
    return Cliff(height, torch.where(column & live, level - profile, layout.constant(-torch.inf)))


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
    """Return the loss fields of the next state."""
    known = {name: getattr(state, name) for name in _LOSS_FIELDS}
    if not stats.has_loss:
        return known
    number, before = stats.layout.constant, known["loss_steps"]
    count = before + number(1.0)
    winsorised = _winsorised_loss(number, stats.loss, known["loss"], known["loss_spread"])
    share = count.reciprocal()
    gain = torch.maximum(share, number(_LOSS_GAIN))
    if stats.elapsed:
        # The first losses all fall into full evaluations.
        places, early = torch.arange(_FIRST_LOSSES, device=count.device), before < number(_FIRST_LOSSES)
        first = torch.where(places == before, stats.loss, known["first_losses"])
        known = known | {"first_losses": first, "loss_start": torch.nanmedian(first, 0).values}
        winsorised = torch.where(early, stats.loss - known["loss"], winsorised)
    loss = torch.addcmul(known["loss"], gain, winsorised)
    # The first offset is the loss itself, and no deviation.
    spread = known["loss_spread"].lerp(winsorised.abs(), gain) * (before > number(0.0))
    slow_loss = known["slow_loss"].lerp(loss, torch.maximum(share, number(_SLOW_LOSS_GAIN)))
    if stats.elapsed:
        # The first losses were not limited, so an outlier among them would last for hundreds of steps.
        first, start = known["first_losses"], known["loss_start"]
        reach = _OUTLIER * torch.maximum((first - start).abs().nanmedian(0).values, start.abs())
        limited = torch.clamp(first, start - reach, start + reach)
        restarts = (before == number(_FIRST_LOSSES - 1.0)) & (limited != first).any()
        middle = limited.mean()
        loss = torch.where(restarts, middle, loss)
        spread = torch.where(restarts, (limited - middle).abs().mean(), spread)
        slow_loss = torch.where(restarts, middle, slow_loss)
    has_start = count >= number(_FIRST_LOSSES)
    return {
        **known,
        "loss": loss,
        "loss_spread": spread,
        "slow_loss": slow_loss,
        "best_loss": torch.where(has_start, torch.minimum(known["best_loss"], loss), known["best_loss"]),
        "loss_steps": count,
    }
