"""Diagnosis of a fault, with causes and fixes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from lightning_gradguard.diagnosis import rendering
from lightning_gradguard.results import Fault

if TYPE_CHECKING:
    from lightning_gradguard.diagnosis.trials.change import Change


class Cause(str, Enum):
    """Causes of a fault."""

    SATURATING_ACTIVATION = "saturating_activation"
    BAD_INITIALIZATION = "bad_initialization"
    LEARNING_RATE_TOO_HIGH = "learning_rate_too_high"
    LEARNING_RATE_TOO_LOW = "learning_rate_too_low"
    UNNORMALIZED_INPUT = "unnormalized_input"
    TARGET_SCALE = "target_scale"
    TOO_DEEP = "too_deep"
    RECURRENCE = "recurrence"
    DEAD_ACTIVATION = "dead_activation"
    DETACHED_GRAPH = "detached_graph"
    BAD_DATA = "bad_data"
    LOSS_FUNCTION = "loss_function"
    LOW_PRECISION = "low_precision"
    OPTIMIZER_EPSILON = "optimizer_epsilon"
    MOMENTUM = "momentum"
    OUTLIER_BATCH = "outlier_batch"
    WEIGHT_DECAY = "weight_decay"
    STALE_OPTIMIZER = "stale_optimizer"
    UNREGISTERED_MODULES = "unregistered_modules"
    NORMALIZATION = "normalization"
    GRADIENT_SCALING = "gradient_scaling"
    STALE_GRADIENTS = "stale_gradients"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Remedy:
    """A fix for a fault.

    Attributes:
        name: Name of the fix, in a few words.
        how: A line of code that makes it.
        tried: True if it was tried on copies of the live model.
        before: Tilt without the fix: decades (factors of ten) by which gradients shrink from the output to the input,
            or from the last to the first step of a sequence. None if it was not tried or could not be measured.
        after: Tilt with the fix.
        loss: Loss on the batch of the trial after a few trial steps with the fix; None if none were taken.
        note: What a trial of it showed, or why it could not be tried; empty otherwise.
        change: What a trial of it changes; None if it cannot be tried.
        profile: log10(‖g‖/‖w‖) of each of `Diagnosis.layers` with the fix; -inf without a gradient, inf if it is NaN or
            Inf, NaN if the layer no longer exists. Empty if it was not tried.
        key: Identity: the same for the same fix with other numbers in its name. The name if not given.
    """

    name: str
    how: str
    tried: bool = False
    before: float | None = None
    after: float | None = None
    loss: float | None = None
    note: str = ""
    change: Change | None = None
    profile: tuple[float, ...] = field(default=(), repr=False, compare=False)
    key: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key or self.name)


@dataclass(frozen=True)
class Timeline:
    """The newest n steps, for a heat map.

    Attributes:
        steps: Numbers of the steps, oldest first.
        layers: Names of L tensors, input first.
        rms_log10: [L][n], log10 of the root mean square of each gradient before clipping; NaN if it is NaN or Inf, -inf
            if there is none or all of it is zero.
        skipped: [n], True if the step was skipped; may be empty.
        clipped: [n], True if the step was clipped; may be empty.
        losses: [n], loss of the step, NaN if it is not known; may be empty.

    Raises:
        ValueError: If the lengths do not agree.
    """

    steps: tuple[int, ...]
    layers: tuple[str, ...]
    rms_log10: tuple[tuple[float, ...], ...]
    skipped: tuple[bool, ...] = ()
    clipped: tuple[bool, ...] = ()
    losses: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.rms_log10) != len(self.layers):
            raise ValueError(
                f"rms_log10 must have one row for each of {len(self.layers)} layers, got {len(self.rms_log10)}"
            )
        columns = [("rms_log10", row) for row in self.rms_log10]
        columns += [(name, own) for name in ("skipped", "clipped", "losses") if (own := getattr(self, name))]
        for name, column in columns:
            if len(column) != len(self.steps):
                raise ValueError(
                    f"{name} must have one entry for each of {len(self.steps)} steps, got {len(column)}"
                )


@dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of a critical finding.

    Attributes:
        fault: The fault.
        step: Step at which it began.
        parameters: Affected tensors, worst first.
        signs: Symptoms: what was measured, one sentence each.
        causes: Causes, most likely first; never empty.
        evidence: A sentence for each cause, with the numbers that support it.
        remedies: Fixes, best first.
        trials: How fixes were tried, or why none could be, one sentence each; empty if trials were not requested.
        course: The newest steps before the diagnosis; None if they are not known.
        layers: Names of the layers' weights in the trials, input first; empty if no fix was tried.
        profile: log10(‖g‖/‖w‖) of each layer in the trial without a fix, as `Remedy.profile`.
        measure: What was measured, as `Finding.measure`; empty if it is not known.
    """

    fault: Fault
    step: int
    parameters: tuple[str, ...]
    signs: tuple[str, ...]
    causes: tuple[Cause, ...]
    evidence: dict[Cause, str] = field(default_factory=dict)
    remedies: tuple[Remedy, ...] = ()
    trials: tuple[str, ...] = ()
    # Not compared, since they may hold NaN, which is not equal to itself.
    course: Timeline | None = field(default=None, repr=False, compare=False)
    layers: tuple[str, ...] = field(default=(), repr=False, compare=False)
    profile: tuple[float, ...] = field(default=(), repr=False, compare=False)
    measure: str = field(default="", repr=False, compare=False)

    def __str__(self) -> str:
        """Return the diagnosis as plain text.

        In order: what happened, where, since when; symptoms, causes, fixes; where to look further.
        """
        return rendering.to_text(self)

    def to_markdown(self) -> str:
        """Return Markdown, as TensorBoard's Text tab shows it."""
        return rendering.to_markdown(self)

    def to_html(self) -> str:
        """Return one self-contained HTML page with charts.

        The charts show the newest steps and the fixes that were tried.
        """
        return rendering.to_html(self)
