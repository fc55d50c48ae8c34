"""Facts about a step that only the caller knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_gradguard.introspection.graph_problems import GraphProblem
    from lightning_gradguard.introspection.loss_comparison import LossComparison
    from lightning_gradguard.introspection.sandbox import SandboxedStep


@dataclass(frozen=True)
class StepContext:
    """Facts for messages and diagnosis.

    None of them but ``comparison`` changes a verdict; that is averaged over the ranks before.

    Attributes:
        batch: Input of the loss, or None. Searched for values that are not finite, and measured.
        sandboxed_step: Builds the training step that fixes are tried on and a non-finite value is traced with; None if
            there is none. It raises ValueError, with the reason, if the training step cannot be run by itself.
        run_trials: Try fixes on the live model when something critical is found.
        notes: Sentences to add to the symptoms, such as the course of a metric.
        without_loss: Warning, once, if no loss is given; empty for none, None for the one of `Guard.step`.
        problems: Mistakes that were warned of elsewhere in the same training. They are not said again, and may explain
            what is found at this optimizer.
        comparison: Comparison of this step's loss with a constant guess, from before its backward pass.
    """

    batch: object = None
    sandboxed_step: Callable[[], SandboxedStep] | None = None
    run_trials: bool = False
    notes: tuple[str, ...] = ()
    without_loss: str | None = None
    problems: tuple[GraphProblem, ...] = ()
    comparison: LossComparison | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.notes, tuple):
            raise TypeError(f"notes must be a tuple of sentences, got {self.notes!r}")
