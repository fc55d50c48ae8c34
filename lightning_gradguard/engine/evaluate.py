"""Evaluation of one step on the device, and its state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import Clip, Clipper, is_memoryless, supports_fast_path
from lightning_gradguard.detectors.base import Detector, DetectorTraits, Reading, traits_of
from lightning_gradguard.stats import trends
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.trends import TrendState


class GuardParts(NamedTuple):
    """Configuration of a guard: what judges and what clips.

    Attributes:
        detectors: All detectors.
        traits: Optional abilities of each.
        clipper: The clipper, or None.
    """

    detectors: tuple[Detector, ...]
    traits: tuple[DetectorTraits, ...]
    clipper: Clipper | None

    @classmethod
    def of(cls, detectors: Sequence[Detector], clipper: Clipper | None) -> GuardParts:
        """Return the parts with their detectors' traits."""
        return cls(tuple(detectors), tuple(traits_of(detector) for detector in detectors), clipper)


class GuardState(NamedTuple):
    """State carried from one good step to the next.

    Attributes:
        trends: State of the running statistics.
        detectors: State of each detector, in their order.
        clipper: State of the clipper; None without one.
    """

    trends: TrendState
    detectors: tuple[Any, ...]
    clipper: Any = None

    @property
    def parts(self) -> tuple[Any, ...]:
        """Trends, detectors and clipper in one tuple."""
        return (self.trends, *self.detectors, *(() if self.clipper is None else (self.clipper,)))

    def with_parts(self, parts: Sequence[Any]) -> GuardState:
        """Return a state of the same shape with other parts."""
        count = len(self.detectors)
        return GuardState(
            parts[0], tuple(parts[1 : 1 + count]), parts[-1] if self.clipper is not None else None
        )


class Evaluation(NamedTuple):
    """Results of one step on the device.

    Attributes:
        stats: Statistics of the step, with ``trends`` set.
        readings: Reading of each detector, None for a slow one that was not asked.
        clip: Decision of the clipper, None without one.
    """

    stats: GradStats
    readings: tuple[Reading | None, ...]
    clip: Clip | None


def init_state(stats: GradStats, parts: GuardParts) -> GuardState:
    """Return the state before the first step."""
    return GuardState(
        trends.init(stats),
        tuple(detector.init(stats) for detector in parts.detectors),
        None if parts.clipper is None else parts.clipper.init(stats),
    )


def evaluate(
    stats: GradStats,
    state: GuardState,
    parts: GuardParts,
    accepted: int = 0,
    asked: tuple[Clip, Any] | None = None,
) -> tuple[Evaluation, GuardState]:
    """Evaluate one step against the past.

    Args:
        stats: The step.
        state: State before it.
        parts: Detectors and clipper. Slow detectors are asked only if ``stats.elapsed`` is not 0.
        accepted: Steps accepted by the fast path since detectors were last asked.
        asked: What the clipper said of this step, if it was asked already: its clip and its state after it.

    Returns:
        The evaluation, and the state after the step, which is valid only if ``stats.finite``.
    """
    trend, trend_state = trends.update(stats, state.trends)
    stats = stats.with_trends(trend, accepted)
    readings: list[Reading | None] = []
    after: list[Any] = []
    for detector, traits, own in zip(parts.detectors, parts.traits, state.detectors, strict=True):
        is_asked = stats.elapsed or not traits.slow
        reading, own = detector.update(stats, own) if is_asked else (None, own)
        readings.append(reading)
        after.append(own)
    clip, clip_state = asked or (None, None)
    if parts.clipper is not None and asked is None:
        clip, clip_state = parts.clipper.update(stats, state.clipper)
    return Evaluation(stats, tuple(readings), clip), GuardState(trend_state, tuple(after), clip_state)


def fold_in(
    rows: Sequence[GradStats], state: GuardState, clipper: Any
) -> tuple[Sequence[Tensor], GuardState]:
    """Fold accepted steps into the running statistics.

    Args:
        rows: The k steps, oldest first, at least one.
        state: State before them.
        clipper: One that supports the fast path, reads norms only or has no memory, or None.

    Returns:
        The clipper's threshold at each step, k tensors float32 [], NaN without a clipper; and the state after them.
    """
    trend = trends.fold_in(rows, state.trends)
    if clipper is None or is_memoryless(clipper):
        return [rows[0].layout.constant(torch.nan)] * len(rows), state._replace(trends=trend)
    if supports_fast_path(clipper):
        limits, clip_state = clipper.fold_in(rows, state.clipper)
        return limits.unbind(), state._replace(trends=trend, clipper=clip_state)
    thresholds, clip_state = [], state.clipper
    for stats in rows:
        clip, clip_state = clipper.update(stats, clip_state)
        thresholds.append(clip.threshold)
    return thresholds, state._replace(trends=trend, clipper=clip_state)


def choose_state(good: Tensor, new: GuardState, old: GuardState) -> GuardState:
    """Choose between two states on the device.

    Args:
        good: Bool [].
        new: State after the step.
        old: State before it.
    """
    return old.with_parts(
        [
            type(after)(*(torch.where(good, a, b) for a, b in zip(after, before, strict=True)))
            for after, before in zip(new.parts, old.parts, strict=True)
        ]
    )


def to_plain(state: GuardState) -> list[dict[str, Tensor]]:
    """Return the state as dicts of tensors."""
    return [{field: getattr(part, field).clone() for field in part._fields} for part in state.parts]


def from_plain(plain: Sequence[dict[str, Tensor]], blank: GuardState) -> GuardState:
    """Return the state that `to_plain` wrote.

    Devices are those of ``blank``. A field that an older version did not have begins as it is there.

    Raises:
        ValueError: If a tensor is of another shape or type than in ``blank``.
    """

    def restored(name: str, saved: Tensor | None, own: Tensor) -> Tensor:
        if saved is None:
            return own
        if (saved.shape, saved.dtype) != (own.shape, own.dtype):
            raise ValueError(
                f"{name} must be a tensor of {tuple(own.shape)}, {own.dtype}, got {tuple(saved.shape)}, {saved.dtype}"
            )
        return saved.to(own.device)

    return blank.with_parts(
        [
            type(b)(**{field: restored(field, p.get(field), getattr(b, field)) for field in b._fields})
            for p, b in zip(plain, blank.parts, strict=True)
        ]
    )
