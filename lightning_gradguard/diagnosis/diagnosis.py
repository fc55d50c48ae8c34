"""What a person in trouble is told: what happened, where, since when, why, and what to do, best first."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from lightning_gradguard.diagnosis import rendering
from lightning_gradguard.results import Fault

if TYPE_CHECKING:
    from lightning_gradguard.diagnosis.trials.change import Change


class Cause(str, Enum):
    """Why gradients fall sick."""

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
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Remedy:
    """Something to do about it.

    Attributes:
        name: What, in a few words.
        how: A line of code that does it.
        tried: Whether it was tried on the live model.
        before: Tilt before, in decades from the input (or the first step of a sequence) to the output; None if it was
            not tried, or could not be measured.
        after: The same with the remedy.
        loss: Loss on the batch of the trial after a few virtual steps with the remedy; None if they were not taken.
        note: Why it could not be tried; empty otherwise.
        change: What a trial of it changes; None if it cannot be tried.
        profile: log10(‖g‖/‖w‖) of each of `Diagnosis.layers` with the remedy; -inf where there is no gradient, inf
            where it is not finite, NaN where the layer is no longer there. Empty if it was not tried.
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
    """The newest n steps, as a picture shows them.

    Attributes:
        steps: Their numbers, oldest first.
        layers: Names of L tensors, input first.
        rms_log10: [L][n], log10 of the root mean square of each gradient before clipping; NaN where it is not finite,
            -inf where there is none or all is zero.
        skipped: [n], whether the step was skipped; empty if none was.
        clipped: [n], whether it was clipped; empty if none was.
        losses: [n], NaN where it is not known; empty if none is.

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
    """Why a critical finding came about.

    Attributes:
        fault: What is wrong.
        step: Where the condition began.
        parameters: Tensors concerned, worst first.
        signs: What was measured, a sentence each.
        causes: Most likely first; never empty.
        evidence: For each cause, the numbers that speak for it.
        remedies: Best first.
        trials: How remedies were tried, or why none could be: a sentence each; empty if that was not asked for.
        timeline: The newest steps before the diagnosis, if they are known.
        layers: Names of the layers' weights that remedies were tried on, input first; empty if none was.
        profile: log10(‖g‖/‖w‖) of each in the trial without a remedy, as `Remedy.profile`.
    """

    fault: Fault
    step: int
    parameters: tuple[str, ...]
    signs: tuple[str, ...]
    causes: tuple[Cause, ...]
    evidence: dict[Cause, str] = field(default_factory=dict)
    remedies: tuple[Remedy, ...] = ()
    trials: tuple[str, ...] = ()
    # What is only drawn is not compared: it may hold NaN, which is not equal to itself.
    timeline: Timeline | None = field(default=None, repr=False, compare=False)
    layers: tuple[str, ...] = field(default=(), repr=False, compare=False)
    profile: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        """What happened, where, since when; then signs, causes with their evidence, remedies: plain text."""
        return rendering.to_text(self)

    def to_markdown(self) -> str:
        """The same in Markdown, for TensorBoard's text tab and the like."""
        return rendering.to_markdown(self)

    def to_html(self) -> str:
        """The same as one self-contained HTML page, with pictures of the newest steps and of what was tried."""
        return rendering.to_html(self)
