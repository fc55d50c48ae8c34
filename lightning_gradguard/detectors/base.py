"""What a detector gives, the interface of all of them, and the scores by which they name tensors."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_gradguard.results import Fault
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.grad_stats import NoState as NoState


class Reading(NamedTuple):
    """What a detector sees at one step.

    Attributes:
        raised: Bool [], the condition holds.
        cleared: Bool [], the condition is over; neither raised nor cleared leaves things as they are (hysteresis).
        value: Number [] that the verdict rests on.
        limit: float32 [], where the verdict begins, same unit.
        score: float32 [P], how sick each tensor is, larger is worse; -inf for those not concerned.
        ceiling: Number [], highest `Severity` that the condition may reach: 0 info, 1 warning, 2 critical.
        measure: Number [], index into the detector's ``measures``: what ``value`` is.
    """

    raised: Tensor
    cleared: Tensor
    value: Tensor
    limit: Tensor
    score: Tensor
    ceiling: Tensor
    measure: Tensor


class Detector(Protocol):
    """The interface of all detectors.

    Attributes:
        fault: What a raised reading means.
        measures: What ``value`` is, in words with a unit.
        quantities: For each of ``measures`` the `Quantity` that a replay measures again, or None; optional, default
            ``()``.
        event: True if each raised reading stands for itself and never becomes critical; optional, default False.
        needs_loss: True if the detector is silent unless the loss is given; optional, default False.
        slow: True if what it looks at changes slowly, so that it is asked at closer looks only, ``stats.elapsed`` steps
            after the last one, and its reading stands until the next; optional, default False.
        fast_path_safe: True if it has nothing to say of a step whose gradients and loss are finite, and whose global
            norm is between half and twice the usual, so that it need not be asked then; optional, default False. A
            subclass that overrides ``update`` has to say so again.
    """

    fault: ClassVar[Fault]
    measures: ClassVar[tuple[str, ...]]

    def init(self, stats: GradStats) -> Any:
        """A state that knows nothing yet."""

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""


class Held(NamedTuple):
    """For how many steps each tensor has met a condition, float32 [P]."""

    steps: Tensor


def reading(
    stats: GradStats,
    raised: Tensor,
    value: Tensor,
    limit: float | Tensor,
    *,
    score: Tensor | None = None,
    cleared: Tensor | None = None,
    ceiling: Tensor | None = None,
    measure: Tensor | None = None,
) -> Reading:
    """A `Reading` with the usual defaults.

    Args:
        stats: Of the step.
        raised: Bool [], the condition holds.
        value: Number [] that the verdict rests on.
        limit: Where the verdict begins, same unit.
        score: float32 [P], how sick each tensor is, larger is worse; no tensor is named when None.
        cleared: Bool [], the condition is over; as soon as it is not raised when None.
        ceiling: Number [], highest `Severity` that the condition may reach; critical when None.
        measure: Number [], index into the detector's ``measures``; the first when None.
    """
    return Reading(
        raised=raised,
        cleared=~raised if cleared is None else cleared,
        value=value,
        limit=limit if isinstance(limit, Tensor) else stats.layout.constant(limit),
        score=stats.layout.constant(-torch.inf).expand_as(stats.norms) if score is None else score,
        ceiling=stats.layout.constant(2.0) if ceiling is None else ceiling,
        measure=stats.layout.constant(0.0) if measure is None else measure,
    )


def hot(stats: GradStats, z: float, ratio: float) -> Tensor:
    """Whether the step's norm is far above the usual one, bool []."""
    trends, number = stats.trends, stats.layout.constant
    return (trends.spike_score > number(z)) & (trends.jump > number(ratio))


def profile_score(stats: GradStats, *, worst_low: bool) -> Tensor:
    """Distance of each layer's profile from the middle one, float32 [P]; -inf for what is no live layer."""
    offset = stats.trends.offset
    return torch.nan_to_num(-offset if worst_low else offset, nan=-torch.inf)


def share(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is a number above 0 and up to 1."""
    if not (isinstance(value, (int, float)) and 0 < value <= 1):
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")


def positive(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is a positive finite number."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def above(name: str, value: float, bound: float) -> None:
    """Raises ValueError unless ``value`` is a finite number above ``bound``."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > bound):
        raise ValueError(f"{name} must be a finite number above {bound:g}, got {value!r}")
