"""One step on the device: trends, then detectors, then clipper, and the state that all of them carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import Clip, Clipper
from lightning_gradguard.detectors.base import Detector, Reading
from lightning_gradguard.stats import trends
from lightning_gradguard.stats.grad_stats import GradStats

#: States of the trends, of each detector, and of the clipper if there is one: NamedTuples of tensors.
States = tuple[Any, ...]


class Evaluation(NamedTuple):
    """What one step gives: statistics with trends, readings of the detectors that were asked, the clip or None."""

    stats: GradStats
    readings: tuple[Reading | None, ...]
    clip: Clip | None


def init(stats: GradStats, detectors: Sequence[Detector], clipper: Clipper | None) -> States:
    """States that know nothing yet."""
    own = [clipper.init(stats)] if clipper is not None else []
    return (trends.init(stats), *(detector.init(stats) for detector in detectors), *own)


def advance(
    stats: GradStats, states: States, detectors: Sequence[Detector], clipper: Clipper | None, passed: int = 0
) -> tuple[Evaluation, States]:
    """Judges one step, ``passed`` quiet ones after the last; the new states are valid only if ``stats.finite``."""
    trend, trend_state = trends.update(stats, states[0])
    stats = stats.with_trends(trend, passed)
    readings: list[Reading | None] = []
    new = [trend_state]
    for detector, state in zip(detectors, states[1:], strict=False):
        asked = stats.elapsed or not getattr(detector, "slow", False)
        seen, after = detector.update(stats, state) if asked else (None, state)
        readings.append(seen)
        new.append(after)
    clip = None
    if clipper is not None:
        clip, after = clipper.update(stats, states[-1])
        new.append(after)
    return Evaluation(stats, tuple(readings), clip), tuple(new)


def pass_over(rows: Sequence[GradStats], states: States, clipper: Any) -> tuple[Sequence[Tensor], States]:
    """Quiet steps, at least one: what is usual learns from them, and no detector is asked.

    Args:
        rows: The k steps, oldest first.
        states: The states before them.
        clipper: One that has ``bounds``, or None.

    Returns:
        The clipper's threshold in each, k times float32 [], NaN without one; and the states after the steps.
    """
    trend = states[0]
    for stats in rows:
        _, trend = trends.update(stats, trend)
    if clipper is None:
        return [rows[0].layout.constant(torch.nan)] * len(rows), (trend, *states[1:])
    thresholds, after = clipper.fold_in(rows, states[-1])
    return thresholds.unbind(), (trend, *states[1:-1], after)


def choose_states(good: Tensor, new: States, old: States) -> States:
    """New states where the step was good, else the old ones, decided on the device."""
    return tuple(
        type(after)(*(torch.where(good, a, b) for a, b in zip(after, before, strict=True)))
        for after, before in zip(new, old, strict=True)
    )


def to_plain(states: States) -> list[dict[str, Tensor]]:
    """The states as dicts of tensors, which load under ``weights_only=True``."""
    return [{field: getattr(state, field).clone() for field in state._fields} for state in states]


def from_plain(plain: Sequence[dict[str, Tensor]], blank: States) -> States:
    """The states that `to_plain` wrote, on the devices and of the types of ``blank``."""
    return tuple(
        type(b)(**{field: p[field].to(getattr(b, field).device) for field in b._fields})
        for p, b in zip(plain, blank, strict=True)
    )
