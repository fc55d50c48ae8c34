"""Definition of a case: an ordinary training of a model from a package that others maintain."""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from torch import nn

from lightning_gradguard import Cause, Fault

#: Distribution to the module that it installs, where the two names differ.
IMPORTED_AS = {
    "pytorch-forecasting": "pytorch_forecasting",
    "pytorch-metric-learning": "pytorch_metric_learning",
    "rtdl-revisiting-models": "rtdl_revisiting_models",
    "scvi-tools": "scvi",
    "stable-baselines3": "stable_baselines3",
    "torch-geometric": "torch_geometric",
    "vector-quantize-pytorch": "vector_quantize_pytorch",
    "x-transformers": "x_transformers",
}


@dataclass
class Run:
    """One training that is ready to begin.

    Attributes:
        fit: Trains to the end with these callbacks in its Trainer.
        exam: Measures what the module has learned, before the first step and after the last; the losses of the
            first and the last steps are compared when None.
    """

    fit: Callable[[Sequence[Any]], None]
    exam: Callable[[nn.Module], float] | None = None


@dataclass(frozen=True)
class Falls:
    """Criterion of learning: the loss ends at or below this share of its start."""

    share: float

    def __call__(self, before: float, after: float) -> bool:
        return after <= self.share * before

    def __str__(self) -> str:
        return f"falls to {100 * self.share:.0f} % or less"


@dataclass(frozen=True)
class FallsBy:
    """Criterion for a loss that may be negative, such as a log-likelihood: it falls by this many units."""

    amount: float

    def __call__(self, before: float, after: float) -> bool:
        return after <= before - self.amount

    def __str__(self) -> str:
        return f"falls by {self.amount:g} or more"


@dataclass(frozen=True)
class EndsBelow:
    """Criterion of learning: the loss begins above this level and ends at or below it."""

    level: float

    def __call__(self, before: float, after: float) -> bool:
        return after <= self.level < before

    def __str__(self) -> str:
        return f"ends below {self.level:g}"


@dataclass(frozen=True)
class Reaches:
    """Criterion of learning: a score, such as an accuracy, begins below this level and ends at or above it."""

    level: float

    def __call__(self, before: float, after: float) -> bool:
        return before < self.level <= after

    def __str__(self) -> str:
        return f"reaches {self.level:g}"


@dataclass(frozen=True)
class Model:
    """Case: a training, and what is known of it without the guard.

    Attributes:
        id: Short and unique.
        title: Model and task in one line.
        package: Distribution that the model comes from.
        family: Kind of model, such as "language".
        build: Function from seed to the training; needs the package.
        learned: Criterion on the exam, or on the losses.
        order: Patterns of parameter names, input first: the order in which an expert lists these layers.
        faults: For a broken training: faults that may be warned of first.
        causes: For a broken training: causes that may stand first.
        said: For a broken training: words, one of which the warnings or the check-up hold, where no fault fits.
        broken: For a broken training: the change, in a few words.
        needs: Further distributions that must be installed.
    """

    id: str
    title: str
    package: str
    family: str
    build: Callable[[int], Run]
    learned: Callable[[float, float], bool]
    order: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    causes: tuple[Cause, ...] = ()
    said: tuple[str, ...] = ()
    broken: str = ""
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.broken and not (self.causes and (self.faults or self.said)):
            raise ValueError(f"case {self.id}: a broken training must name its fault and its cause")
        if not self.broken and (self.faults or self.causes or self.said):
            raise ValueError(f"case {self.id}: a healthy training has no fault and no cause")

    @property
    def version(self) -> str:
        """Installed version of the package."""
        return metadata.version(self.package)

    def missing(self) -> str | None:
        """Return why this case cannot run here, or None if it can."""
        absent = [p for p in (self.package, *self.needs) if not is_installed(p)]
        if not absent:
            return None
        return (
            f"{self.id} trains a model of {' and '.join(absent)}, which is not installed; "
            "pip install -r benchmarks/real/requirements.txt installs it"
        )


def is_installed(distribution: str) -> bool:
    """Return True if a distribution can be imported; nothing is imported."""
    return importlib.util.find_spec(IMPORTED_AS.get(distribution, distribution)) is not None


def in_order(names: Sequence[str], patterns: Sequence[str]) -> bool | None:
    """Return True if the tensors that match each pattern stand before all that match the next.

    Args:
        names: Names of tensors, input first.
        patterns: Patterns of names, input first.

    Returns:
        None without a pattern.

    Raises:
        ValueError: If a pattern matches no name.
    """
    last = -1
    for pattern in patterns:
        places = [i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)]
        if not places:
            raise ValueError(f"order: {pattern!r} matches none of {', '.join(names)}")
        if places[0] < last:
            return False
        last = places[-1]
    return True if patterns else None


def select(cases: Iterable[Model], pattern: str | None) -> list[Model]:
    """Return cases whose id, package or family match comma-separated patterns; all when None.

    Raises:
        ValueError: If no case matches.
    """
    if pattern is None:
        return list(cases)
    wanted = [p.strip() for p in pattern.split(",")]
    chosen = [
        case
        for case in cases
        if any(fnmatch.fnmatchcase(text, p) for p in wanted for text in (case.id, case.package, case.family))
    ]
    if not chosen:
        raise ValueError(f"cases must match at least one case, got {pattern!r}")
    return chosen
