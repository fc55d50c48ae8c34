"""One step in plain numbers on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lightning_gradguard.results import Fault, Severity


class DetectorResult(NamedTuple):
    """A detector's reading of one step.

    Attributes:
        detector: Class name of the detector.
        fault: Fault that it finds.
        event: True if each raised result stands for itself and never becomes critical.
        needs_loss: True if the detector is silent unless a loss is given.
        raised: True if the fault is present.
        cleared: True if the fault is over. If neither raised nor cleared, things stay as they are.
        ceiling: Highest severity that the fault may reach.
        value: Number that the verdict rests on.
        limit: Value at which the verdict begins.
        measure: Meaning of ``value``, in words with a unit.
        parameters: Names of the tensors concerned, worst first.
        near: True if the fault is not present, and may soon be. Not saved, since it counts at its own step only.
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
    near: bool = False

    def to_plain(self) -> list[object]:
        """Return the result as plain types."""
        plain = self._replace(fault=self.fault.value, ceiling=int(self.ceiling))  # type: ignore[arg-type]
        return [*plain[:-2], list(self.parameters)]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> DetectorResult:
        """Return the result that `to_plain` wrote."""
        result = cls(*plain)
        return result._replace(
            fault=Fault(result.fault),
            ceiling=Severity(result.ceiling),
            parameters=tuple(result.parameters),
        )


#: Result for a non-finite step if no detector of such steps is set: they are skipped all the same.
NONFINITE_STEP = DetectorResult(
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
class StepRecord:
    """Numbers of one step; NaN if unknown.

    Attributes:
        total_norm: Global gradient norm before clipping.
        clipped_norm: Global gradient norm after clipping.
        threshold: Global norm above which the clipper clips.
        clipped: True if the clipper shortened any gradient, even by too little to show in the global norm.
        finite: True if gradients, their norm and the loss are finite.
        loss: Loss of this step.
        loss_start: Median of the first five losses.
        loss_mean: Running mean of the loss.
        loss_first: The very first loss, of weights that no step has changed.
        loss_scale: Scale of the gradient scaler.
        tilt: Depth tilt, in decades.
        update_ratio: Median over the layers of ‖Δw‖/‖w‖.
        baseline_norm: Usual global norm; 0 before there is one.
        norms: Gradient norm before clipping by tensor name, from input to output.
        results: One result for each detector.
        carried: 1 if the gradient of the step before was still there when this one's was added, 0 if not.
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
    baseline_norm: float
    norms: dict[str, float]
    results: list[DetectorResult]
    carried: float = math.nan

    def unclipped(self) -> StepRecord:
        """Return the record of the same step where the clipper is not in force."""
        return replace(self, clipped_norm=self.total_norm, threshold=math.nan, clipped=False)
