"""What is known of a training when something critical is found in it: plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_gradguard.doctor.anatomy import Anatomy
from lightning_gradguard.verdicts.faults import Finding

if TYPE_CHECKING:
    from lightning_gradguard.doctor.origin import Origin


@dataclass(frozen=True)
class Known:
    """The facts at the step of a critical finding. The P watched tensors stand in depth order, input first.

    Attributes:
        finding: What was found.
        names: Names of the P tensors.
        shapes: Their shapes.
        gradients_log10: log10 of each gradient's L2 norm: -inf for zero or none, inf or NaN if not finite.
        weight_norms: L2 norm of each tensor as it is, without a floor.
        update_ratios: Applied update ratio ‖Δw‖/‖w‖ of each tensor, newest sample; NaN if unknown.
        findings: All findings of the run so far, oldest first; may hold ``finding`` too.
        initial_weight_norms: L2 norms before the first step. Without them weights that a wild step has blown
            up are taken for a bad initialisation.
        anatomy: What the autograd graph says, if it was read.
        tilt: Depth tilt, decades from input to output; None if unknown.
        time_tilt: Gradient with respect to the last tenth of a sequence over the first tenth, decades.
        has_loss: Whether a loss was given; the next three are NaN without.
        loss_start: Median of the first five losses.
        loss_now: Running mean of the loss.
        loss_last: The loss of this step.
        optimizer: Its class name.
        learning_rates: One for each parameter group, as of now.
        defaults: The optimizer's settings: eps, momentum, betas, weight_decay, ...
        dtypes: Names of the dtypes that gradients or autocast use, such as "float16".
        steps: Steps judged so far.
        clipper: The clipper in force, as printed; empty if none.
        policy: The policy in force, as printed.
        input_rms: Root mean square of the newest batch's floating-point inputs, if it was looked at.
        target_rms: The same of its floating-point targets, if it has any.
        weight_means: Mean of each tensor's elements; None if unknown.
        bad_rows: Rows of the batch with a non-finite element: empty if there are none, None if nobody looked.
        origin: Where the first number that is not finite came from, as a replay showed; None if there was none.
    """

    finding: Finding
    names: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    gradients_log10: tuple[float, ...] = ()
    weight_norms: tuple[float, ...] = ()
    update_ratios: tuple[float, ...] = ()
    findings: tuple[Finding, ...] = ()
    initial_weight_norms: tuple[float, ...] | None = None
    anatomy: Anatomy | None = None
    tilt: float | None = None
    time_tilt: float | None = None
    has_loss: bool = True
    loss_start: float = math.nan
    loss_now: float = math.nan
    loss_last: float = math.nan
    optimizer: str = ""
    learning_rates: tuple[float, ...] = ()
    defaults: Mapping[str, object] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ()
    steps: int = 0
    clipper: str = ""
    policy: str = ""
    input_rms: float | None = None
    target_rms: float | None = None
    weight_means: tuple[float, ...] | None = None
    bad_rows: tuple[int, ...] | None = None
    origin: Origin | None = None

    def __post_init__(self) -> None:
        vectors = ("gradients_log10", "weight_norms", "update_ratios", "initial_weight_norms", "weight_means")
        for name in ("shapes", *vectors):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.names):
                raise ValueError(
                    f"{name} must have one entry for each of {len(self.names)} names, got {len(values)}"
                )
