"""Detectors of gradients that vanish over depth or time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.detectors.base import NoState, Reading, profile_score, reading
from lightning_gradguard.results import Fault, Quantity
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.trends import WARM_UP
from lightning_gradguard.validation import check_above, check_positive

#: Depth tilt in decades below which gradients grow towards the input.
_EXPLODING_TILT = -1.5


@dataclass(frozen=True)
class DepthTilt:
    """Detect gradients that vanish over depth.

    The depth tilt is the number of decades (factors of ten) by which gradients, relative to their weights, fall from
    the last layer to the first (`lightning_gradguard.stats.trends.column_tilts`). Convergence lowers all layers
    together and leaves the tilt unchanged. Nets side by side are judged one by one, each along its own path to the
    loss. Raised in one of four cases:

    - The tilt is at or above ``limit`` while the loss makes no progress, from step 30 on.
    - The tilt is at or above 1.5 times ``limit``, even while the loss falls, and at least half of the layers lie on
      that path: other layers learn in place of these.
    - All layers up to some depth lie ``limit`` decades below all layers after it
      (`lightning_gradguard.stats.trends.find_cliff`), as behind a normalization over a single element, and the loss
      makes no progress, from step 30 on.
    - A single layer lies ``limit`` decades below the middle one, as behind a saturated softmax, and the loss makes no
      progress. Counts from step 100 on, and only if the layer is updated less than the others: at the start of a
      transformer, queries and keys get almost no gradient (2.6 decades below the middle), and soon more.

    It stays a warning while the loss falls, or while the update ratio of the worst layer is above ``moving`` and the
    value below twice the limit: an adaptive optimizer may still train it.

    Args:
        limit: Tilt in decades, above ``clear``. Default 3: healthy runs stay below 2.5 even when converged; while the
            loss makes no progress, their cliffs stay below 2.1 and their single layers below 2.6. The mildest cliffs of
            faulty ones are of 5.
        clear: Decades below which the condition is over. Default 2.5.
        moving: Update ratio ‖Δw‖/‖w‖ above which a layer still learns, dimensionless. Default 1e-6.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is out of range.
    """

    limit: float = 3.0
    clear: float = 2.5
    moving: float = 1e-6
    fault: ClassVar[Fault] = Fault.VANISHING
    measures: ClassVar[tuple[str, ...]] = (
        "depth tilt in decades from input to output",
        "decades by which a layer lies below the middle one",
        "decades by which all layers up to some depth lie below those after it",
    )
    quantities: ClassVar[tuple[Quantity | None, ...]] = (Quantity.DEPTH_TILT, Quantity.LAYER_GAP, None)
    slow: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("clear", self.clear)
        check_above("limit", self.limit, self.clear)
        check_positive("moving", self.moving)

    def init(self, stats: GradStats) -> Any:
        """Return an empty state."""
        return NoState()

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Evaluate one step."""
        trends, number = stats.trends, stats.layout.constant
        offset = profile_score(stats, worst_low=True)
        no_progress, warm = trends.no_progress | trends.plateau, trends.steps >= WARM_UP + 5
        # What others learn in place of these: a side branch that is starved, such as a gate, hinders none.
        layers = stats.layout.is_layer
        is_main = (trends.in_worst & layers).sum() >= 0.5 * layers.sum()
        steep = (trends.tilt >= 1.5 * self.limit) & is_main
        tilted = (trends.tilt >= self.limit) & (no_progress | steep) & warm
        cliff = trends.cliff
        cut = (cliff.height >= self.limit) & no_progress & warm & ~tilted
        score = torch.where(
            cut, cliff.below, torch.where(tilted & ~trends.in_worst, number(-torch.inf), offset)
        )
        # Where gradients grow towards the input, the last layers lie below the middle one; that is no gap.
        gap = torch.where(trends.tilt <= _EXPLODING_TILT, number(0.0), offset.max())
        over = ~(trends.tilt >= self.clear) & ~(gap >= self.clear) & ~(cliff.height >= self.clear)
        # By gather: indexing with a tensor would read the index on the host.
        worst_update = stats.updates.gather(0, torch.argmax(score).reshape(1)).reshape(())
        live_layers = stats.layout.is_layer & trends.live
        median_update = torch.nanmedian(torch.where(live_layers, stats.updates, number(torch.nan)), 0).values
        left_behind = (trends.steps >= 4 * WARM_UP) & ~(worst_update > 0.1 * median_update)
        starved = (gap >= self.limit) & no_progress & left_behind & ~tilted & ~cut
        value = torch.where(cut, cliff.height, torch.where(starved, gap, trends.tilt))
        may_recover = (worst_update > self.moving) & (value < 2 * self.limit)
        return (
            reading(
                stats,
                tilted | cut | starved,
                value,
                self.limit,
                score=score,
                cleared=over | ~(no_progress | steep),
                ceiling=torch.where(may_recover | ~no_progress, number(1.0), number(2.0)),
                measure=torch.where(cut, number(2.0), torch.where(starved, number(1.0), number(0.0))),
                near=~over & (no_progress | steep),
            ),
            state,
        )


class LastTilt(NamedTuple):
    """State of `TimeTilt`: newest tilt, decades, float32 []."""

    decades: Tensor


@dataclass(frozen=True)
class TimeTilt:
    """Detect gradients that vanish over a sequence.

    Measured at full evaluations while the loss makes no progress, and only in nets that apply a layer repeatedly.

    Args:
        limit: Decades (factors of ten) that gradients lose from the last to the first tenth of the sequence. Default 6:
            healthy LSTM and GRU stay below 3.8.

    Raises:
        TypeError: If ``limit`` is no number.
        ValueError: If ``limit`` is not positive and finite.
    """

    limit: float = 6.0
    fault: ClassVar[Fault] = Fault.VANISHING_IN_TIME
    measures: ClassVar[tuple[str, ...]] = ("decades lost from the last to the first steps of the sequence",)
    quantities: ClassVar[tuple[Quantity, ...]] = (Quantity.TIME_TILT,)
    slow: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)

    def init(self, stats: GradStats) -> Any:
        """Return a state without a measurement so far."""
        return LastTilt(torch.full_like(stats.total, torch.nan))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Evaluate one step by the newest measurement."""
        tilt = torch.where(stats.time_tilt.isnan(), state.decades, stats.time_tilt)
        raised = (tilt >= self.limit) & stats.trends.no_progress
        score = torch.where(stats.recurrent, 1.0, -torch.inf)
        return reading(stats, raised, tilt, self.limit, score=score), LastTilt(tilt)
