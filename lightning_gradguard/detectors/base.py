"""Interface of all detectors, and shared helpers.

A detector is a frozen dataclass with a ``fault``, ``measures``, ``init`` and ``update``; no registry and no base class.
Its state is a NamedTuple of tensors that `Guard` keeps, saves and restores. Severity, patience and messages are not its
business: `lightning_gradguard.engine.fault_tracker` decides them from its readings.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_gradguard.results import Fault, Quantity
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.grad_stats import NoState as NoState


class Reading(NamedTuple):
    """Result of a detector at one step.

    Attributes:
        raised: Bool [], the condition holds.
        cleared: Bool [], the condition is over. If neither raised nor cleared, an active fault stays (hysteresis).
        value: Number [] that the decision rests on.
        limit: float32 [], the value at which the condition begins, same unit.
        score: float32 [P], how strongly each tensor is affected, larger is worse; -inf where it is not.
        ceiling: Number [], highest `Severity` that the condition may reach: 0 info, 1 warning, 2 critical.
        measure: Number [], index into the detector's ``measures``, which says what ``value`` is.
        near: Bool [], the condition is not raised and may soon be, so that full evaluations stay frequent; None for
            never.
    """

    raised: Tensor
    cleared: Tensor
    value: Tensor
    limit: Tensor
    score: Tensor
    ceiling: Tensor
    measure: Tensor
    near: Tensor | None = None


class Detector(Protocol):
    """Rule that turns gradient statistics into a `Reading`.

    A detector is a frozen dataclass, configuration only.

    A detector may also declare the class attributes of `DetectorTraits`.

    Attributes:
        fault: What a raised reading means; `Fault.custom` makes a fault of your own.
        measures: What ``value`` is, in words with a unit.
    """

    fault: ClassVar[Fault]
    measures: ClassVar[tuple[str, ...]]

    def init(self, stats: GradStats) -> Any:
        """Return the first state, a NamedTuple of tensors."""

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Return reading and new state, without a host read."""


class DetectorTraits(NamedTuple):
    """Optional class attributes of a detector.

    Attributes:
        event: Each raised reading stands for itself and never becomes critical.
        needs_loss: The detector is silent unless a loss is given.
        slow: What it measures changes slowly. It is evaluated at full evaluations only, and its reading stands until
            the next. ``stats.elapsed`` is the number of steps since the last one, counted up to eight.
        fast_path_safe: It never raises at a step whose gradients and loss are finite and whose global norm is between
            half and twice its baseline, so it is not evaluated there. Counts only where the detector's own class
            declares it, since a subclass may override ``update``: a subclass that wants it declares it again.
        quantities: For each of ``measures`` the `Quantity` that a replay measures again, or None.
    """

    event: bool = False
    needs_loss: bool = False
    slow: bool = False
    fast_path_safe: bool = False
    quantities: tuple[Quantity | None, ...] = ()


def traits_of(detector: Detector) -> DetectorTraits:
    """Return a detector's traits, declared or default."""
    found = {name: getattr(detector, name) for name in DetectorTraits._fields if hasattr(detector, name)}
    if hasattr(detector, "quiet") and "fast_path_safe" not in found:
        warnings.warn(
            f"{type(detector).__name__}.quiet is now fast_path_safe; quiet has no effect",
            FutureWarning,
            stacklevel=2,
        )
    if "fast_path_safe" not in vars(type(detector)):
        found.pop("fast_path_safe", None)
    return DetectorTraits(**found)


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
    near: Tensor | None = None,
) -> Reading:
    """Return a `Reading`, filling in defaults.

    Args:
        stats: The step.
        raised: Bool [], the condition holds.
        value: Number [] that the decision rests on.
        limit: The value at which the condition begins, same unit.
        score: float32 [P], how strongly each tensor is affected, larger is worse; None names no tensor.
        cleared: Bool [], the condition is over; None stands for "not raised".
        ceiling: Number [], highest `Severity` that the condition may reach; None stands for critical.
        measure: Number [], index into the detector's ``measures``; None stands for the first.
        near: Bool [], the condition may soon be raised; None stands for never.
    """
    constant = stats.layout.constant
    return Reading(
        raised=raised,
        cleared=~raised if cleared is None else cleared,
        value=value,
        limit=limit if isinstance(limit, Tensor) else constant(limit),
        score=constant(-torch.inf).expand_as(stats.norms) if score is None else score,
        ceiling=constant(2.0) if ceiling is None else ceiling,
        measure=constant(0.0) if measure is None else measure,
        near=None if near is None else near & ~raised,
    )


#: `Layout.floors` is this part of what a common initialization gives.
_FLOOR = 0.1


def updates_of_small(stats: GradStats) -> Tensor:
    """Return the applied update ratios of weights that began small, float32 [P].

    They count as large as a common initialization, since they have to grow.
    """
    usual = torch.maximum(stats.weights, stats.layout.floors / _FLOOR)
    return stats.updates * stats.weights / usual


def is_norm_spike(stats: GradStats, z: float, ratio: float) -> Tensor:
    """Test the global norm for a spike, bool [].

    Args:
        stats: The step.
        z: Smallest z-score of its logarithm.
        ratio: Smallest multiple of the baseline.
    """
    trends, number = stats.trends, stats.layout.constant
    return (trends.spike_score > number(z)) & (trends.jump > number(ratio))


def profile_score(stats: GradStats, *, worst_low: bool) -> Tensor:
    """Return each layer's offset as a score.

    Args:
        stats: The step.
        worst_low: Whether the layers with the smallest gradients are the worst, or those with the largest.

    Returns:
        Distance from the middle layer of its column in decades (factors of ten), float32 [P]; -inf for what is no live
        layer.
    """
    offset = stats.trends.offset
    return torch.nan_to_num(-offset if worst_low else offset, nan=-torch.inf)
