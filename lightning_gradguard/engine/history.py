"""The newest steps in plain host numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradguard.results import Report

if TYPE_CHECKING:
    from lightning_gradguard.stats.layout import Layout

_SCALARS = ("loss", "total_norm", "clipped_norm", "threshold", "scale")


class History:
    """Ring buffer of the newest judged steps.

    It allocates once: 29 bytes a step, and 4 more for each tensor.

    Example:
        >>> history = History(["weight", "bias"], [4, 2], steps=2)
        >>> for step in range(3):
        ...     history.add(Report(step, 0.5, 1.0, 1.0, None, 1.0, skip=False, norms={"weight": 1.0}))
        >>> history.table()["step"].tolist(), history.table()["norms"].tolist()
        ([1, 2], [[1.0, nan], [1.0, nan]])

    Args:
        names: Names of the P tensors.
        numel: Number of elements of each.
        steps: Most steps to keep.

    Attributes:
        names: As given.
        numel: As given.
        steps: Most steps that are kept.

    Raises:
        ValueError: If ``numel`` and ``names`` differ in length, or ``steps`` is not a positive whole number.
    """

    def __init__(self, names: Sequence[str], numel: Sequence[int], steps: int = 128) -> None:
        if len(numel) != len(names):
            raise ValueError(f"numel must hold one number for each of {len(names)} names, got {len(numel)}")
        self.names, self.numel = tuple(names), tuple(int(n) for n in numel)
        self.steps, self._added = _check_steps(steps), 0
        self._ring = self._blank()

    def __len__(self) -> int:
        return min(self._added, self.steps)

    def add(self, report: Report, norms: NDArray[Any] | None = None) -> None:
        """Add a step; a full ring drops the oldest.

        A norm that is not finite is stored as inf, since NaN stands for a tensor without a gradient.

        Args:
            report: Report of the step.
            norms: Its norms as float32 [P], NaN where there is no gradient; taken from the report when None.
        """
        if norms is None:
            norms = self._norms_of(report)
        # None and missing values become NaN in both.
        self._ring[self._added % self.steps] = (
            report.step,
            report.loss,
            report.total_norm,
            report.clipped_norm,
            report.threshold,
            report.scale,
            report.skip,
            norms,
        )
        self._added += 1

    def table(self) -> dict[str, NDArray[Any]]:
        """Return copies of the n kept steps, oldest first.

        Returns:
            "step": int64 [n]. "loss", "total_norm", "clipped_norm", "threshold", "scale": float32 [n], NaN for None.
            "skip": bool [n]. "norms": float32 [n, P], L2 norms before clipping; NaN where the tensor has no gradient,
            inf where the norm is not finite.
        """
        oldest = self._added % self.steps if self._added > self.steps else 0
        rows = np.roll(self._ring[: len(self)], -oldest)
        return {name: rows[name].copy() for name in ("step", *_SCALARS, "skip", "norms")}

    def keeps(self, steps: int) -> bool:
        """Return True if that many steps are kept.

        Args:
            steps: Number of steps.
        """
        return self.steps == steps

    def resize(self, steps: int) -> None:
        """Change how many steps are kept.

        Args:
            steps: Most steps to keep.

        Raises:
            ValueError: If ``steps`` is not a positive whole number.
        """
        steps, kept = _check_steps(steps), self.table()
        self._added, self.steps = min(len(self), steps), steps
        self._ring = self._blank()
        for name, column in kept.items():
            self._ring[name][: self._added] = column[len(column) - self._added :]

    def _norms_of(self, report: Report) -> NDArray[Any]:
        norms = report.norms
        if not math.isfinite(report.total_norm):
            norms = {name: norm if math.isfinite(norm) else math.inf for name, norm in norms.items()}
        return np.fromiter(map(norms.get, self.names), np.float32, len(self.names))

    def _blank(self) -> NDArray[Any]:
        scalars = [(name, np.float32) for name in _SCALARS]
        fields = [("step", np.int64), *scalars, ("skip", np.bool_), ("norms", np.float32, (len(self.names),))]
        return np.zeros(self.steps, np.dtype(fields))


def history_of(layout: Layout, steps: int = 128) -> History:
    """Return an empty history of a layout's tensors."""
    return History(layout.names, [p.numel() for p in layout.parameters], steps)


def _check_steps(steps: int) -> int:
    try:
        whole = operator.index(steps)
    except TypeError:
        whole = 0
    if whole < 1:
        raise ValueError(f"steps must be a positive whole number, such as 128, got {steps!r}")
    return whole
