"""What a person in trouble is told: what happened, where, since when, why, and what to do, best first."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from lightning_gradguard.doctor import rendering
from lightning_gradguard.verdicts.faults import Fault

if TYPE_CHECKING:
    from lightning_gradguard.doctor.trials.change import Change


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
        change: What the trial changed; None if there was none.
    """

    name: str
    how: str
    tried: bool = False
    before: float | None = None
    after: float | None = None
    loss: float | None = None
    note: str = ""
    change: Change | None = None


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
    """

    fault: Fault
    step: int
    parameters: tuple[str, ...]
    signs: tuple[str, ...]
    causes: tuple[Cause, ...]
    evidence: dict[Cause, str] = field(default_factory=dict)
    remedies: tuple[Remedy, ...] = ()
    trials: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What happened, where, since when; then signs, causes with their evidence, remedies: plain text."""
        return rendering.to_text(self)

    def to_markdown(self) -> str:
        """The same in Markdown, for TensorBoard's text tab and the like."""
        return rendering.to_markdown(self)

    def to_html(self) -> str:
        """The same as one self-contained HTML page."""
        return rendering.to_html(self)
