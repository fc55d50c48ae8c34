"""One step in plain numbers, as it comes out of the mailbox."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_gradguard.verdicts.faults import Fault, Severity


class Sight(NamedTuple):
    """A detector's reading of one step.

    Attributes:
        detector: Its class name.
        fault: What it means when raised.
        event: Each raised sight stands for itself, and never becomes critical.
        needs_loss: It says nothing unless the loss is given.
        raised: The condition holds.
        cleared: The condition is over; neither leaves things as they are.
        ceiling: Highest severity that the condition may reach.
        value: The number the verdict rests on.
        limit: Where the verdict begins.
        measure: What ``value`` is.
        parameters: Tensors concerned, worst first.
    """

    detector: str
    fault: Fault
    event: bool
    needs_loss: bool
    raised: bool
    cleared: bool
    ceiling: Severity
    value: float
    limit: float
    measure: str
    parameters: tuple[str, ...]

    def to_plain(self) -> list[object]:
        """Itself in plain types, for `from_plain`."""
        fault, ceiling = self.fault.value, int(self.ceiling)
        flags = self.event, self.needs_loss, self.raised, self.cleared
        return [
            self.detector,
            fault,
            *flags,
            ceiling,
            self.value,
            self.limit,
            self.measure,
            list(self.parameters),
        ]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> Sight:
        """What `to_plain` gave."""
        sight = cls(*plain)
        return sight._replace(
            fault=Fault(sight.fault), ceiling=Severity(sight.ceiling), parameters=tuple(sight.parameters)
        )


#: Stands in where no detector of non-finite steps is set: such steps are skipped all the same.
UNSEEN = Sight(
    detector="Guard",
    fault=Fault.NONFINITE,
    event=True,
    needs_loss=False,
    raised=True,
    cleared=False,
    ceiling=Severity.CRITICAL,
    value=1.0,
    limit=0.0,
    measure="steps with a non-finite gradient or loss",
    parameters=(),
)


@dataclass(frozen=True)
class Letter:
    """One step; NaN stands for what is not known.

    Attributes:
        total_norm: Global norm before clipping.
        clipped_norm: Global norm after clipping.
        threshold: Largest global norm the clipper allows.
        clipped: Whether the clipper shortened any gradient, be it by too little to show in the global norm.
        finite: Whether the gradients, their norm, and the loss are.
        loss: Of this step.
        loss_start: Median of the first five losses.
        loss_mean: Running mean of the loss.
        loss_first: The very first, of weights that no step has touched.
        loss_scale: Of a gradient scaler.
        tilt: Depth tilt in decades.
        update_ratio: Median applied update ratio of the layers.
        usual_norm: Usual global norm; 0 before there is one.
        norms: Name of each tensor with a gradient to its norm before clipping, from input to output.
        sights: One for each detector.
    """

    total_norm: float
    clipped_norm: float
    threshold: float
    clipped: bool
    finite: bool
    loss: float
    loss_start: float
    loss_mean: float
    loss_first: float
    loss_scale: float
    tilt: float
    update_ratio: float
    usual_norm: float
    norms: dict[str, float]
    sights: list[Sight]
