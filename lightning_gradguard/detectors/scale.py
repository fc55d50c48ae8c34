"""Detector of outputs that are far from the scale of their targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.detectors.base import Reading, reading
from lightning_gradguard.results import Fault
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.trends import WARM_UP
from lightning_gradguard.validation import check_positive


class FarSteps(NamedTuple):
    """State of `TargetScale`: steps out of reach, float32 []."""

    steps: Tensor


@dataclass(frozen=True)
class TargetScale:
    """Detect outputs that are nothing beside their targets.

    ratio = RMS of the outputs / RMS of the targets, from the arguments of a squared or Huber loss.

    Raised while the loss makes no progress, from step 30 on, when the ratio has been below ``limit`` for ``steps``
    steps: the weights move as they should, and the outputs have to grow a thousandfold first. Never more than a
    warning, since they may get there. Silent where the loss function is not known.

    Args:
        limit: Smallest healthy ratio, dimensionless. Default 1e-3: targets of size 100 under Adam at 1e-3
            are above it after 15 steps, and are learned.
        steps: Steps for which the condition has to hold.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is not positive and finite.
    """

    limit: float = 1e-3
    steps: int = 24
    fault: ClassVar[Fault] = Fault.STALLED
    measures: ClassVar[tuple[str, ...]] = ("size (RMS) of the outputs over that of the targets",)
    slow: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)
        check_positive("steps", self.steps)

    def init(self, stats: GradStats) -> Any:
        """Return a state without a step so far."""
        return FarSteps(torch.zeros_like(stats.total))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Evaluate one step."""
        trends, reach = stats.trends, stats.reach
        held = torch.where(reach < self.limit, state.steps + stats.elapsed, 0.0)
        raised = (held >= self.steps) & trends.no_progress & (trends.steps >= WARM_UP + 5)
        near = (held > 0) & trends.no_progress
        return reading(
            stats, raised, reach, self.limit, ceiling=stats.layout.constant(1.0), near=near
        ), FarSteps(held)
