"""Detectors of updates, as applied: too large a part of the weight, or too small to move anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.detectors.base import Reading, above, positive, reading
from lightning_gradguard.results import Fault
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.trends import WARM_UP

#: Steps without progress after which large updates are known to be good for nothing; fewer than it takes to call
#: units dead.
_WAIT = 17
#: Steps for which large updates are remembered: the weights that they have made do not heal.
_MEMORY = 4 * WARM_UP
#: Update ratio below which nothing moves, whatever it did before.
_MOVING = 1e-6


class LargeUpdates(NamedTuple):
    """What is remembered of each tensor.

    Attributes:
        large: float32 [P], steps in a row with a large update.
        since: float32 [P], steps since there were enough of them.
        idle: float32 [P], steps without progress since then.
        solid: Bool [P], whether the weight was more than nothing at the start.
        largest: float32 [P], largest update that is remembered; 0 without.
    """

    large: Tensor
    since: Tensor
    idle: Tensor
    solid: Tensor
    largest: Tensor


@dataclass(frozen=True)
class UpdateRatio:
    """Flags layers whose applied update is too large a part of their weight.

    ratio = ‖Δw‖ / ‖w‖, from a strided sample taken before and after the step, in the first steps and then in every
    eighth. Raised when a layer has exceeded the limit in all samples of ``steps`` steps and the loss, if given, has
    made no progress in 17 steps more than it has since: the first steps may be large, and with normalisation behind
    them even many. Large updates are remembered for 100 steps, since the weights that they have made do not heal; a
    layer that has stopped moving is another matter.

    Args:
        limit: Largest healthy ratio, dimensionless. Default 0.1; 1e-3 is usual.
        steps: Steps for which it has to hold.

    Source: CS231n notes, "ratio of weights:updates".
    """

    limit: float = 0.1
    steps: int = 4
    fault: ClassVar[Fault] = Fault.OVERSIZED_UPDATE
    measures: ClassVar[tuple[str, ...]] = ("largest applied update over weight",)
    slow: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("limit", self.limit)
        above("steps", self.steps, 0)

    def init(self, stats: GradStats) -> Any:
        """Nothing large yet."""
        zeros = torch.zeros_like(stats.norms)
        return LargeUpdates(
            zeros, torch.full_like(zeros, torch.inf), zeros, stats.weights > stats.layout.floors, zeros
        )

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        trends = stats.trends
        grown = state.solid | (trends.steps > 2 * WARM_UP)
        large = (stats.updates > self.limit) & stats.layout.is_layer & grown
        count = torch.where(large, state.large + float(stats.sampled_steps), 0.0)
        # One step that leaves nothing of a weight will do, except at the start.
        wiped = large & (stats.updates > 0.9) & (trends.steps > 2 * WARM_UP)
        since = torch.where((count >= self.steps) | wiped, 0.0, state.since + stats.elapsed)
        unknown = trends.loss.isnan()
        # This loss too: the mean may still carry what the first steps did.
        here = stats.loss > 0.9 * torch.minimum(trends.loss_start, trends.first_loss)
        idle = (
            state.idle + torch.where((trends.no_progress & here) | trends.relapsed, 1.0, -1.0) * stats.elapsed
        )
        remembered = (since <= _MEMORY) | (state.idle > _WAIT)
        idle = torch.where(remembered, torch.clamp(idle, 0.0, 2.0 * _WAIT), 0.0)
        moving = remembered & ~(stats.updates <= _MOVING)
        found = moving & ((idle > _WAIT) | unknown)
        over = ~(moving & ((idle > 0) | unknown)).any()
        # What is newest may be small again: the verdict rests on the largest that is remembered.
        largest = torch.maximum(state.largest, torch.where(large, stats.updates, 0.0))
        largest = torch.where(remembered, largest, 0.0)
        score = torch.where(remembered, largest, -torch.inf)
        value = largest.max()
        seen = reading(stats, found.any(), value, self.limit, score=score, cleared=over)
        return seen, LargeUpdates(count, since, idle, state.solid, largest)


class StillSteps(NamedTuple):
    """For how many steps nothing has moved, float32 []."""

    steps: Tensor


@dataclass(frozen=True)
class Stalled:
    """Flags a training whose weights do not move, although the loss makes no progress.

    Raised when, for ``steps`` steps, the median applied update ratio of the layers has been below ``limit``, and that
    of none above a hundred times as much, from step 30 on. Suspended while the learning rate is below a tenth of its
    peak. A tilt of the profile, or dead units, explain it better and go before.

    Args:
        limit: Smallest update ratio that moves anything, dimensionless.
        steps: Steps for which it has to hold: three samples, since the gradient of a net that has converged is large
            in one batch and nothing in the next.
    """

    limit: float = 1e-6
    steps: int = 24
    fault: ClassVar[Fault] = Fault.STALLED
    measures: ClassVar[tuple[str, ...]] = ("median applied update over weight",)
    slow: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("limit", self.limit)
        above("steps", self.steps, 0)

    def init(self, stats: GradStats) -> Any:
        """Nothing held yet."""
        return StillSteps(torch.zeros_like(stats.total))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        trends = stats.trends
        carries = stats.layout.is_layer & trends.live
        ratios = torch.where(carries, stats.updates, torch.nan)
        median = torch.nanmedian(ratios, 0).values
        fastest = torch.nan_to_num(ratios, nan=0.0).max()
        still = (median < self.limit) & (fastest < 100 * self.limit)
        held = torch.where(still, state.steps + stats.elapsed, 0.0)
        raised = (
            (held >= self.steps) & trends.no_progress & (trends.steps >= WARM_UP + 5) & (not stats.resting)
        )
        score = torch.where(carries, -stats.updates, -torch.inf)
        return reading(stats, raised, median, self.limit, score=score), StillSteps(held)
