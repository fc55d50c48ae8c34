"""`SpikeClip`, which leaves ordinary gradients alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import (
    WINDOW,
    Bounds,
    Clip,
    among,
    check_exclude,
    included_names,
    included_tensors,
    tensor_clip,
)
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.validation import check_decay, check_positive, check_whole

#: Sigma of log‖g‖ before there is evidence, and how many steps of evidence it counts for. With it a factor of 7 in all
#: tensors is a spike at step 1, while the first steps of healthy trainings pass.
PRIOR_SIGMA, PRIOR_STEPS = 0.4, 10

#: Smallest sigma of log‖g‖, so that a nearly deterministic training may vary: a factor below 2.1 in all is no spike.
SIGMA_FLOOR = 0.15

#: Weight of the past in the variances, a memory of 33 steps: the spread changes more slowly than the level.
SPREAD_DECAY = 0.97

#: Sigmas to which an outlier's distance, and any change, is limited before the averages learn it.
INFLUENCE = 2.5

#: Part of the outlier distance that steps within `Bounds` may use over a window, with a margin.
_BOUNDS_SHARE = 0.8
#: Steps that a level must rest on before it has bounds. After so many, a window cannot shrink sigma by more than
#: `_BOUNDS_SHARE` allows for.
_BOUNDS_FROM = 16.0


@dataclass(frozen=True)
class SpikeClip:
    """Cut spikes to the typical norm.

    A spike is of a single tensor, or of all tensors where they rise together.

    Let x = log‖g‖ of a tensor, its level the moving mean of x, and d = x - level. The tensor spikes where
    d > z_threshold · sigma. All tensors spike where the mean of d over them exceeds joint_threshold times the sigma of
    that mean: a bad batch moves all tensors at once while their noise partly cancels, so the mean shows it where no
    single tensor does. A spike is cut to exp(level), the tensor's typical norm; anything else is unchanged. Multiplying
    all gradients by a constant changes nothing.

    Sigma is that of the change from one step to the next, divided by √2, so a drift does not widen it. At the start,
    norms may fall by powers of ten; a later spike must not hide in that. Outliers in either direction move the level by
    at most 2.5 sigmas and leave sigma unchanged, so neither a spike nor an empty batch distorts it. A prior on sigma
    makes step 1 testable. Outliers become the new level if there are more in a row than steps behind the level, or more
    than ``patience``: then data or batch size changed. Norms that are 0 or not finite are ignored.

    Norms that grow by more than 8 % at each step count as a spike for up to ``patience`` steps.

    Args:
        z_threshold: z-score from which a single tensor spikes.
        joint_threshold: z-score from which all tensors spike. With both defaults fewer than one step in a hundred of a
            healthy training is clipped, see benchmarks/clipping.md.
        decay: Weight of the past in the level. Default 0.9, a memory of 10 steps.
        patience: Largest number of outliers in a row that are cut. Default 20: spikes last for a few steps, and a level
            that changed for good should not be clipped for longer.
        exclude: Names or patterns of tensors that are never scaled.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.

    Source: z-scores of norms after ZClip (Kumar et al. 2025, arXiv:2504.02507); sigma of differences as in control
    charts of individual values (Shewhart's moving range); bounded influence after Huber 1964; combined by experiment on
    a small language model.
    """

    z_threshold: float = 9.0
    joint_threshold: float = 5.0
    decay: float = 0.9
    patience: int = 20
    exclude: tuple[str, ...] = field(default=(), kw_only=True)
    fast_path_safe: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("z_threshold", self.z_threshold)
        check_positive("joint_threshold", self.joint_threshold)
        check_decay("decay", self.decay)
        check_whole("patience", self.patience)
        check_exclude(self.exclude)

    def init(self, stats: GradStats) -> Any:
        """Return a state with the prior variances."""
        included_names(stats.layout.names, self.exclude)
        zero = torch.zeros_like(stats.norms)
        var = torch.full_like(zero, PRIOR_SIGMA**2)
        joint = torch.full_like(stats.total, PRIOR_SIGMA**2)
        return SpikeClipState(zero, zero.clone(), var, zero.clone(), zero.clone(), joint)

    def update(self, stats: GradStats, state: Any) -> tuple[Clip, Any]:
        """Compare each norm, and their mean, with levels."""
        number, zeros = stats.layout.constant, stats.layout.zeros
        included = included_tensors(stats, self.exclude)
        counts = among(stats, included, stats.finite & (stats.norms > zeros))
        fresh = state.seen == zeros
        known = counts & ~fresh
        # A norm that does not count, or has no past, is taken to be at its level.
        x = torch.where(counts, stats.log_norms, state.mean)
        distance = (x - state.mean) * known
        known_count = torch.maximum(known.sum(), number(1.0))
        sigma, joint_sigma = _sigma(stats, state.var), _sigma(stats, state.joint_var)
        reach, joint_reach = number(self.z_threshold) * sigma, number(self.joint_threshold) * joint_sigma
        # Clamped, so that no single tensor can make a spike of all.
        joint = torch.clamp(distance, -reach, reach).sum() / known_count
        outlier = ((distance.abs() > reach) | (joint.abs() > joint_reach)) & known
        streak = state.streak + number(1.0)
        fresh = fresh | (outlier & (streak > torch.minimum(state.seen, number(self.patience))))

        # Relative to the norm itself, so that no rounding in log or exp puts the limit of an ordinary norm below it.
        spike = (distance > reach) | (joint > joint_reach)
        excess = reach * ~spike - distance
        typical = state.mean.exp()
        norms = torch.where(counts, stats.norms, typical)
        limits = torch.where(fresh, number(math.inf), norms * excess.exp())

        # A new level starts from this step alone.
        starts = fresh & counts
        inlier = known & ~outlier
        ordinary = starts | inlier
        change = (x - state.last) * inlier
        learned = torch.where(inlier, distance, _limited(number, distance, sigma))
        gain = torch.maximum((state.seen + number(1.0)).reciprocal(), number(1 - self.decay))
        var = _next_variance(number, state.var, change, sigma, state.seen, inlier)
        steps, joint_change = (state.seen * known).amax(), change.sum() / known_count
        new = SpikeClipState(
            seen=state.seen * ~starts + ordinary,
            mean=torch.where(starts, x, torch.addcmul(state.mean, gain, learned)),
            var=torch.where(starts, number(PRIOR_SIGMA**2), var),
            streak=(state.streak + counts) * ~ordinary,
            last=torch.where(ordinary, x, state.last),
            joint_var=_next_variance(number, state.joint_var, joint_change, joint_sigma, steps, inlier.any()),
        )
        clip = tensor_clip(stats, included, limits)
        # A step that is not finite has the threshold of a step in which all norms are at their levels.
        compared = torch.where(stats.finite, known, among(stats, included, state.seen > zeros))
        norms, after = (torch.where(stats.finite, x, typical * compared) for x in (stats.norms, clip.norms))
        room = _room(number, compared, distance, reach, joint_reach)
        threshold = _threshold(stats, included, compared | counts, counts & ~known, norms, after, room)
        return clip._replace(threshold=threshold), new

    def bounds(self, stats: GradStats, state: Any) -> Bounds:
        """Return bounds for the next steps.

        Steps within them are not clipped.

        Steps within a part f of the outlier distance move a level over a window by at most (1 - decay^(WINDOW-1)) f of
        that distance, since it learns from all of them at one rate. Sigma shrinks to 0.85 of itself at most. So
        f = 0.8 / (1 + (1 - decay^(WINDOW-1))) leaves a margin.

        Args:
            stats: The newest step.
            state: The state after it.
        """
        number, zeros = stats.layout.constant, stats.layout.zeros
        included = included_tensors(stats, self.exclude)
        thresholds, spread = (self.z_threshold, self.joint_threshold), 2 - self.decay ** (WINDOW - 1)
        alone, joint = (number(threshold * _BOUNDS_SHARE / spread) for threshold in thresholds)
        has_gradient = stats.norms > zeros
        counts = among(stats, included, has_gradient)
        is_known = state.seen >= number(max(_BOUNDS_FROM, 1 / (1 - self.decay)))
        away = torch.where(is_known, _sigma(stats, state.var) * alone, number(torch.nan))
        reach = torch.maximum(counts.sum(), number(1.0)) * _sigma(stats, state.joint_var) * joint
        weights = counts / reach
        # An excluded tensor may have any norm, as long as it goes on having a gradient.
        free = torch.where(has_gradient, number(torch.inf), zeros)
        return Bounds(
            low=torch.where(counts, (state.mean - away).exp(), zeros),
            high=torch.where(counts, (state.mean + away).exp(), free),
            weights=weights,
            level=(weights * state.mean).sum(),
        )

    def fold_in(self, rows: Sequence[GradStats], state: Any) -> tuple[Tensor, Any]:
        """Fold deferred steps into the state.

        All of them lay within `bounds`. Gives what `update` gives one step at a time: no tensor spikes, and no level
        starts anew.

        Args:
            rows: The k steps, oldest first.
            state: The state before them.

        Returns:
            Threshold at each step, float32 [k], and the state after them.
        """
        number, norms = rows[0].layout.constant, torch.stack([row.norms for row in rows])
        included = included_tensors(rows[0], self.exclude)
        counts = among(rows[0], included, norms[0] > number(0.0))
        x = torch.where(counts, norms.log(), state.mean)
        change = (x - torch.cat([state.last.unsqueeze(0), x[:-1]])) * counts
        joint_change = change.sum(1, keepdim=True) / torch.maximum(counts.sum(), number(1.0))
        # The last column is all tensors together, whose variance is averaged in the same way.
        changes = torch.cat([change, joint_change], 1) * number(math.sqrt(0.5))
        learns = torch.cat([counts, counts.any().unsqueeze(0)])
        seen = torch.cat([state.seen, (state.seen * counts).amax().unsqueeze(0)])
        gains = (
            _variance_gain(number, seen + torch.arange(len(rows), device=seen.device).unsqueeze(1)) * learns
        )
        mean, var = state.mean, torch.cat([state.var, state.joint_var.unsqueeze(0)])
        means, sigmas = [], []
        for now, moved, gain in zip(x.unbind(), changes.unbind(), gains.unbind(), strict=True):
            sigma = _sigma(rows[0], var)
            means.append(mean)
            sigmas.append(sigma)
            var = var.lerp(_limited(number, moved, sigma).square(), gain)
            mean = torch.addcmul(mean, number(1 - self.decay), now - mean)
        sigma = torch.stack(sigmas)
        room = _room(
            number,
            counts.expand_as(x),
            (x - torch.stack(means)) * counts,
            number(self.z_threshold) * sigma[:, :-1],
            number(self.joint_threshold) * sigma[:, -1],
        )
        fresh = counts & (state.seen == number(0.0))
        return _threshold(rows[0], included, counts, fresh, norms, norms, room), SpikeClipState(
            seen=state.seen + counts * len(rows),
            mean=mean,
            var=var[:-1],
            streak=state.streak * ~counts,
            last=torch.where(counts, x[-1], state.last),
            joint_var=var[-1],
        )


class SpikeClipState(NamedTuple):
    """State of `SpikeClip`, float32: [P], but ``joint_var`` [].

    Attributes:
        seen: Ordinary steps that a tensor's level rests on; 0 before its first gradient.
        mean: Moving mean of log‖g‖, the level.
        var: Moving variance of log‖g‖, half the mean square of its change from one ordinary step to the next.
        streak: Outliers since the last ordinary step.
        last: log‖g‖ of the last ordinary step.
        joint_var: Moving variance of the mean of log‖g‖ over the tensors, by the same rule.
    """

    seen: Tensor
    mean: Tensor
    var: Tensor
    streak: Tensor
    last: Tensor
    joint_var: Tensor


def _room(
    number: Callable[[float], Tensor], known: Tensor, distance: Tensor, reach: Tensor, joint_reach: Tensor
) -> Tensor:
    """Return by how much larger a step's gradients could be before they are cut.

    Args:
        number: `Layout.constant`.
        known: Bool [..., P], tensors that are compared with their level.
        distance: [..., P], distance of log‖g‖ from the level.
        reach: [..., P], distance at which a tensor spikes.
        joint_reach: [...], mean distance at which all spike.

    Returns:
        Logarithm of a factor, [...]: negative for a spike, inf if no tensor is compared.
    """
    room = torch.where(known, reach - distance, number(math.inf)).amin(-1)
    count, lowest = known.sum(-1), -reach
    enough, is_any = joint_reach * count, count > 0
    # Newton's method from above. The mean of all, in which a tensor far below its level counts with a fixed distance,
    # is convex in the factor's logarithm, and linear but for such tensors.
    for _ in range(2):
        moved = distance + room.unsqueeze(-1)
        excess = (torch.maximum(moved, lowest) * known).sum(-1) - enough
        follow = (known & (moved > lowest)).sum(-1)
        step = torch.where(excess > number(0.0), excess / follow, number(0.0))
        room = torch.where(is_any, room - step, number(math.inf))
    return room


def _threshold(
    stats: GradStats,
    included: Tensor,
    counts: Tensor,
    fresh: Tensor,
    norms: Tensor,
    after: Tensor,
    room: Tensor,
) -> Tensor:
    """Return the global norm from which a step is cut.

    It is that of gradients that are larger or smaller than this step's by one factor, which a spike does not change.

    Args:
        stats: A step with the same layout.
        included: Bool [P], tensors that may be scaled.
        counts: Bool [P], those of them with a gradient.
        fresh: Bool [P], those of them without a past.
        norms: [..., P], norms of the step.
        after: [..., P], norms after clipping.
        room: Result of `_room`, [...].

    Returns:
        float32 [...]; inf where a tensor has no past.
    """
    zero, endless = stats.layout.constant(0.0), stats.layout.constant(math.inf)
    finite = torch.where(norms < endless, norms, zero)
    cut = torch.linalg.vector_norm(torch.where(counts, finite, zero), dim=-1) * room.exp()
    cut = torch.where(counts.any(), cut, endless)
    if included is not stats.layout.everywhere:
        others = torch.linalg.vector_norm(torch.where(included, zero, finite), dim=-1)
        cut = torch.hypot(cut, others)
    # Where tensors are cut one by one, the others stay as they are.
    least = torch.linalg.vector_norm(torch.where(after < endless, after, zero), dim=-1)
    return torch.where(fresh.any(), endless, torch.maximum(cut, least))


def _sigma(stats: GradStats, var: Tensor) -> Tensor:
    """Return sigma of log‖g‖, at least its floor."""
    return torch.maximum(var.sqrt(), stats.layout.constant(SIGMA_FLOOR))


def _limited(number: Callable[[float], Tensor], distance: Tensor, sigma: Tensor) -> Tensor:
    """Limit a distance to `INFLUENCE` sigmas."""
    reach = number(INFLUENCE) * sigma
    return torch.clamp(distance, -reach, reach)


def _variance_gain(number: Callable[[float], Tensor], seen: Tensor) -> Tensor:
    """Return a step's weight in a variance."""
    return torch.maximum((seen + number(PRIOR_STEPS)).reciprocal(), number(1 - SPREAD_DECAY))


def _next_variance(
    number: Callable[[float], Tensor],
    var: Tensor,
    change: Tensor,
    sigma: Tensor,
    seen: Tensor,
    counts: Tensor,
) -> Tensor:
    """Return the variance after one more change."""
    # The sigma of a change is larger than that of a norm by √2.
    square = _limited(number, change * number(math.sqrt(0.5)), sigma).square()
    return var.lerp(square, _variance_gain(number, seen) * counts)
