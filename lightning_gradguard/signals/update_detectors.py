"""Detectors of updates, as applied: too large a part of the weight, or too small to move anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_gradguard.signals.reading import Held, Nothing, Reading, above, positive, reading
from lightning_gradguard.signals.stats import GradStats
from lightning_gradguard.signals.trends import WARM_UP, trends_of
from lightning_gradguard.verdicts.faults import Fault


@dataclass(frozen=True)
class UpdateRatio:
    """Flags layers whose applied update is too large a part of their weight.

    ratio = ‖Δw‖ / ‖w‖, from a strided sample taken before and after the step, in the first steps and then in every
    eighth; raised when a layer exceeds the limit in all samples of ``steps`` steps, and the loss, if given, makes
    no progress: a first step or two may be large.

    Args:
        limit: Largest healthy ratio, dimensionless. Default 0.1; 1e-3 is usual.
        steps: Steps for which it has to hold.

    Source: CS231n notes, "ratio of weights:updates".
    """

    limit: float = 0.1
    steps: int = 8
    fault: ClassVar[Fault] = Fault.OVERSIZED_UPDATE
    measures: ClassVar[tuple[str, ...]] = ("applied update over weight",)

    def __post_init__(self) -> None:
        positive("limit", self.limit)
        above("steps", self.steps, 0)

    def init(self, stats: GradStats) -> Held:
        """Nothing held yet."""
        return Held(torch.zeros_like(stats.norms))

    def update(self, stats: GradStats, state: Held) -> tuple[Reading, Held]:
        """Judges one step."""
        large = (stats.updates > self.limit) & stats.layout.is_layer
        held = torch.where(large, state.steps + float(stats.sampled_steps), 0.0)
        found = held >= self.steps
        trends = trends_of(stats)
        still = trends.stuck | trends.loss.isnan()
        score = torch.where(found, stats.updates, -torch.inf)
        value = torch.where(stats.layout.is_layer, torch.nan_to_num(stats.updates), 0.0).max()
        return reading(stats, found.any() & still, value, self.limit, score=score), Held(held)


@dataclass(frozen=True)
class Stalled:
    """Flags a training whose weights do not move, although the loss makes no progress.

    Raised when the median applied update ratio of the layers is below ``limit`` from step 30 on. Suspended while the
    learning rate is below a tenth of its peak. A tilt of the profile, or dead units, explain it better and go before.

    Args:
        limit: Smallest update ratio that moves anything, dimensionless.
    """

    limit: float = 1e-6
    fault: ClassVar[Fault] = Fault.STALLED
    measures: ClassVar[tuple[str, ...]] = ("median applied update over weight",)
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("limit", self.limit)

    def init(self, stats: GradStats) -> Nothing:
        """Remembers nothing."""
        return Nothing()

    def update(self, stats: GradStats, state: Nothing) -> tuple[Reading, Nothing]:
        """Judges one step."""
        trends = trends_of(stats)
        carries = stats.layout.is_layer & trends.live
        ratios = torch.where(carries, stats.updates, torch.nan)
        median = torch.nanmedian(ratios)
        still = (median < self.limit) & trends.stuck & (trends.steps >= WARM_UP + 5)
        raised = still & (not stats.resting)
        score = torch.where(carries, -stats.updates, -torch.inf)
        return reading(stats, raised, median, self.limit, score=score), state
