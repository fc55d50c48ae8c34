"""Detectors of updates, as applied: too large a part of the weight, or too small to move anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lightning_gradguard.signals.reading import Held, Nothing, Reading, above, positive, reading
from lightning_gradguard.signals.stats import GradStats
from lightning_gradguard.signals.trends import WARM_UP, trends_of
from lightning_gradguard.verdicts.faults import Fault

#: Steps that large updates are given to show what they are good for; fewer than it takes to call units dead.
_WAIT = 17


@dataclass(frozen=True)
class UpdateRatio:
    """Flags layers whose applied update is too large a part of their weight.

    ratio = ‖Δw‖ / ‖w‖, from a strided sample taken before and after the step, in the first steps and then in every
    eighth. Raised when a layer has exceeded the limit in all samples of ``steps`` steps and the loss, if given, makes
    no progress from 17 to 100 steps later: the first steps may be large, and with normalisation behind them even many.
    It stays raised until there is progress, since the weights that large steps have made do not heal.

    Args:
        limit: Largest healthy ratio, dimensionless. Default 0.1; 1e-3 is usual.
        steps: Steps for which it has to hold.

    Source: CS231n notes, "ratio of weights:updates".
    """

    limit: float = 0.1
    steps: int = 4
    fault: ClassVar[Fault] = Fault.OVERSIZED_UPDATE
    measures: ClassVar[tuple[str, ...]] = ("applied update over weight",)

    def __post_init__(self) -> None:
        positive("limit", self.limit)
        above("steps", self.steps, 0)

    def init(self, stats: GradStats) -> Any:
        """Nothing held yet."""
        return Held(torch.zeros_like(stats.norms))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        large = (stats.updates > self.limit) & stats.layout.is_layer
        trends = trends_of(stats)
        # Negative: the limit was exceeded for long enough, so many steps ago.
        grown = torch.where(large, state.steps + float(stats.sampled_steps), 0.0)
        # One step that leaves nothing of a weight will do, except at the start, where a weight may begin at zero.
        wiped = large & (stats.updates > 0.9) & (trends.steps > 2 * WARM_UP)
        grown = torch.where(wiped, float(self.steps), grown)
        held = torch.where(state.steps < 0, state.steps - 1, torch.where(grown >= self.steps, -1.0, grown))
        unknown = trends.loss.isnan()
        still = trends.stuck | trends.relapsed
        expired = (held < -4 * WARM_UP) & ~(still | unknown)
        held = torch.where(expired, 0.0, held)
        # This loss too: the mean may still carry what the first steps did.
        here = stats.loss > 0.9 * torch.minimum(trends.loss_start, trends.first_loss)
        found = ((held < -_WAIT) & still & here) | ((held < 0) & unknown)
        score = torch.where(held < 0, torch.nan_to_num(stats.updates), -torch.inf)
        value = torch.where(stats.layout.is_layer, torch.nan_to_num(stats.updates), 0.0).max()
        return reading(stats, found.any(), value, self.limit, score=score), Held(held)


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

    def init(self, stats: GradStats) -> Any:
        """Remembers nothing."""
        return Nothing()

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        trends = trends_of(stats)
        carries = stats.layout.is_layer & trends.live
        ratios = torch.where(carries, stats.updates, torch.nan)
        median = torch.nanmedian(ratios)
        still = (median < self.limit) & trends.stuck & (trends.steps >= WARM_UP + 5)
        raised = still & (not stats.resting)
        score = torch.where(carries, -stats.updates, -torch.inf)
        return reading(stats, raised, median, self.limit, score=score), state
