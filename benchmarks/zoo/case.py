"""What a case of the zoo is: a small training, and what a person who knows would say of it."""

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
    """One training, with its truth.

    The truth is not taken from the package under test. A healthy training reaches ``level`` on data it has not seen,
    or its twin on learnable data does. A sick one stays below it, its mended twin reaches it, and the facts that its
    fault's name stands for are measured by `benchmarks.zoo.facts`; ``establish.py`` writes all of that down.

    Attributes:
        id: Short and unique; V, D, X, E, N, U, O are sick, H is healthy.
        title: What it is, in a line.
        build: Seed to module, through `make`.
        level: Quality (accuracy, R squared, ...) that tells learning from not learning.
        fault: What is wrong, or None.
        cause: Why, or None.
        culprits: Patterns of the parameter names that a person would name.
        also: Other names that are as right for a run whose facts bear them out.
        why: What makes them right too.
        onset: Step at which it begins.
        kind: An ``"event"`` is a matter of one step, and must not halt training.
        mended: The same training without the fault; for a healthy case that cannot learn, the same with labels that
            can be learned.
        steps: Optimizer steps.
        trainer: Gives further arguments of the Trainer.
        mended_trainer: The same for the twin; as ``trainer`` when None.
        mended_steps: Steps of the twin; as ``steps`` when None.
        kin: Families it belongs to, such as "convolutional".
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
            raise ValueError(f"case {self.id}: a sick case must name its culprits and its cause")
        if self.also and not self.why:
            raise ValueError(f"case {self.id}: why must say what makes {self.also} right too")

    @property
    def faulty(self) -> bool:
        return self.fault is not None

    @property
    def names(self) -> tuple[Fault, ...]:
        """All faults that are a right answer, the best first."""
        return () if self.fault is None else (self.fault, *self.also)

    def make(self, seed: int, *, fixed: bool = False) -> Training:
        """The module, or its mended twin, with its own random numbers."""
        build = self.fixed if fixed else self.build
        if build is None:
            raise ValueError(f"case {self.id} has no mended twin")
        torch.manual_seed(seed)
        return build(seed)

    def is_culprit(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.culprits)


def select(cases: Iterable[Case], pattern: str | None) -> list[Case]:
    """Cases whose id, title or kin match a comma-separated list of patterns; all when None.

    Raises:
        ValueError: If nothing matches.
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
