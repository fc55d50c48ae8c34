"""Definition of a case: a small training, and the diagnosis that an expert would give."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from benchmarks.zoo.training import Training
from lightning_gradguard import Cause, Fault

Build = Callable[[int], Training]


@dataclass(frozen=True)
class Case:
    """Training with its known truth.

    The truth is not taken from the package under test. A healthy training reaches ``level`` on unseen data,
    or its twin on learnable data does. A faulty training stays below ``level`` and its fixed twin reaches it.
    `benchmarks.zoo.facts` measures the facts that define the fault, and ``establish.py`` writes everything to
    a file.

    Attributes:
        id: Short and unique; V, D, X, E, N, U, O are faulty, H is healthy.
        title: One-line description.
        build: Function from seed to module; call it through `make`.
        level: Quality (accuracy, R squared, ...) that separates learning from not learning.
        fault: The fault, or None for a healthy case.
        cause: The cause of the fault, or None.
        culprits: Patterns of the parameter names that an expert would name.
        also: Other faults that are equally right for a run whose facts support them.
        why: Reason why those are right too.
        onset: First step with the fault.
        kind: An ``"event"`` lasts one step and must not halt training.
        fixed: The same training without the fault; for a healthy case that cannot learn, the same with labels
            that can be learned.
        steps: Number of optimizer steps.
        trainer: Returns further arguments of the Trainer.
        fixed_trainer: The same for the fixed twin; ``trainer`` when None.
        fixed_steps: Number of steps of the fixed twin; ``steps`` when None.
        kin: Families that the case belongs to, such as "convolutional".
    """

    id: str
    title: str
    build: Build
    level: float
    fault: Fault | None = None
    cause: Cause | None = None
    culprits: tuple[str, ...] = ()
    also: tuple[Fault, ...] = ()
    why: str = ""
    onset: int = 0
    kind: Literal["condition", "event"] = "condition"
    fixed: Build | None = None
    steps: int = 300
    trainer: Callable[[], dict[str, Any]] = field(default=dict)
    fixed_trainer: Callable[[], dict[str, Any]] | None = None
    fixed_steps: int | None = None
    kin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.fault is None and (self.culprits or self.also or self.cause):
            raise ValueError(f"case {self.id}: a healthy case has no culprit, cause or other name")
        if self.fault is not None and not (self.culprits and self.cause):
            raise ValueError(f"case {self.id}: a faulty case must name its culprits and its cause")
        if self.also and not self.why:
            raise ValueError(f"case {self.id}: why must say what makes {self.also} right too")

    @property
    def faulty(self) -> bool:
        return self.fault is not None

    @property
    def names(self) -> tuple[Fault, ...]:
        """All faults that count as right, the best first."""
        return () if self.fault is None else (self.fault, *self.also)

    def make(self, seed: int, *, fixed: bool = False) -> Training:
        """Build the module, or its fixed twin, from its own seed."""
        build = self.fixed if fixed else self.build
        if build is None:
            raise ValueError(f"case {self.id} has no fixed twin")
        torch.manual_seed(seed)
        return build(seed)

    def is_culprit(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.culprits)


def select(cases: Iterable[Case], pattern: str | None) -> list[Case]:
    """Return the cases whose id, title or kin match comma-separated patterns; all when None.

    Raises:
        ValueError: If no case matches.
    """
    if pattern is None:
        return list(cases)
    wanted = [p.strip() for p in pattern.split(",")]
    chosen = [
        case
        for case in cases
        if any(fnmatch.fnmatchcase(text, p) for p in wanted for text in (case.id, case.title, *case.kin))
    ]
    if not chosen:
        raise ValueError(f"cases must match at least one case, got {pattern!r}")
    return chosen
