"""Detectors of gradients that vanish: over the depth of a net, in single layers of it, or over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.detectors.base import NoState, Reading, above, positive, profile_score, reading
from lightning_gradguard.results import Fault, Quantity
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.trends import WARM_UP

#: Depth tilt below which gradients grow towards the input.
_EXPLODING = -1.5


@dataclass(frozen=True)
class DepthTilt:
    """Flags gradients that vanish from output to input, or in single layers.

    Raised when the depth tilt (`lightning_gradguard.stats.trends.depth_tilt`) is at or above ``limit`` while the
    loss falls no more, from step 30 on; half as much again, and it is raised even if the loss falls, for
    then other layers learn in place of the sick ones. Convergence lowers all layers together and leaves the tilt
    alone. A single layer whose gradient, in relation to its weight, lies ``limit`` decades below that of the middle
    layer counts as much, as behind a softmax that is saturated, from step 100 on and unless the layer is moved as the
    others are: at the start of a transformer queries and keys get next to nothing, and soon more. Only a warning
    while the loss falls, or the applied update ratio of the sick layers stays above ``moving``: an adaptive optimizer
    still moves them.

    Args:
        limit: Decades. Default 3: healthy runs stay below 2.5 even when converged, and single layers of them below 1
            while the loss stands still.
        clear: Decades below which the condition is over. Default 2.5.
        moving: Update ratio above which a layer still learns, dimensionless. Default 1e-6.
    """

    limit: float = 3.0
    clear: float = 2.5
    moving: float = 1e-6
    fault: ClassVar[Fault] = Fault.VANISHING
    measures: ClassVar[tuple[str, ...]] = (
        "depth tilt in decades from input to output",
        "decades by which a layer lies below the middle one",
    )
    quantities: ClassVar[tuple[Quantity, ...]] = (Quantity.DEPTH_TILT, Quantity.LAYER_GAP)
    slow: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("clear", self.clear)
        above("limit", self.limit, self.clear)
        positive("moving", self.moving)

    def init(self, stats: GradStats) -> Any:
        """Remembers nothing; the profile is in the shared trends."""
        return NoState()

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        trends = stats.trends
        score = profile_score(stats, worst_low=True)
        still, warm = trends.no_progress | trends.plateau, trends.steps >= WARM_UP + 5
        steep = trends.tilt >= 1.5 * self.limit
        tilted = (trends.tilt >= self.limit) & (still | steep) & warm
        # Where gradients grow towards the input, it is the last layers that lie below the middle.
        gap = torch.where(trends.tilt <= _EXPLODING, 0.0, score.max())
        over = ~(trends.tilt >= self.clear) & ~(gap >= self.clear)
        # Not by indexing, which would read the index on the host.
        sickest = stats.updates.gather(0, torch.argmax(score).reshape(1)).reshape(())
        usual = torch.nanmedian(
            torch.where(stats.layout.is_layer & trends.live, stats.updates, torch.nan), 0
        ).values
        left_behind = (trends.steps >= 4 * WARM_UP) & ~(sickest > 0.1 * usual)
        starved = (gap >= self.limit) & still & left_behind & ~tilted
        return (
            reading(
                stats,
                tilted | starved,
                torch.where(starved, gap, trends.tilt),
                self.limit,
                score=score,
                cleared=over | ~(still | steep),
                ceiling=torch.where((sickest > self.moving) | ~still, 1.0, 2.0),
                measure=torch.where(starved, 1.0, 0.0),
            ),
            state,
        )


class LastTilt(NamedTuple):
    """The newest time tilt, decades, float32 []; NaN before the first."""

    decades: Tensor


@dataclass(frozen=True)
class TimeTilt:
    """Flags recurrent nets whose gradients vanish from the last to the first steps of a sequence.

    Looked at every eight steps while the loss makes no progress, and only where something is applied again and again.

    Args:
        limit: Decades from the last to the first tenth of the steps. Default 6: healthy LSTM and GRU stay below 3.8.
    """

    limit: float = 6.0
    fault: ClassVar[Fault] = Fault.VANISHING_IN_TIME
    measures: ClassVar[tuple[str, ...]] = ("decades lost from the last to the first steps of the sequence",)
    quantities: ClassVar[tuple[Quantity, ...]] = (Quantity.TIME_TILT,)
    slow: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive("limit", self.limit)

    def init(self, stats: GradStats) -> Any:
        """Nothing asked yet."""
        return LastTilt(torch.full_like(stats.total, torch.nan))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step by the newest answer."""
        tilt = torch.where(stats.time_tilt.isnan(), state.decades, stats.time_tilt)
        raised = (tilt >= self.limit) & stats.trends.no_progress
        score = torch.where(stats.recurrent, 1.0, -torch.inf)
        return reading(stats, raised, tilt, self.limit, score=score), LastTilt(tilt)
