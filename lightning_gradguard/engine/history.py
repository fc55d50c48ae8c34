"""The newest steps in plain host numbers."""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.extras import load
from lightning_gradguard.results import Report

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_gradguard.stats.layout import Layout

_SCALARS = ("loss", "total_norm", "clipped_norm", "threshold", "scale")
#: Column to the type of its numbers, in Python's arrays and in torch.
_TYPES = {
    "step": ("q", torch.int64),
    **dict.fromkeys(_SCALARS, ("f", torch.float32)),
    "skip": ("b", torch.bool),
    "norms": ("f", torch.float32),
}


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

    def add(self, report: Report, norms: array[float] | None = None) -> None:
        """Add a step; a full ring drops the oldest.

        A norm that is not finite is stored as inf, since NaN stands for a tensor without a gradient.

        Args:
            report: Report of the step.
            norms: Its norms as float32 [P], NaN where there is no gradient; taken from the report when None.
        """
        row, width = self._added % self.steps, len(self.names)
        self._ring["step"][row], self._ring["skip"][row] = report.step, report.skip
        for name in _SCALARS:
            number = getattr(report, name)
            self._ring[name][row] = math.nan if number is None else number
        self._ring["norms"][row * width : (row + 1) * width] = (
            self._norms_of(report) if norms is None else norms
        )
        self._added += 1

    def table(self) -> dict[str, NDArray[Any]]:
        """Return copies of the n kept steps as NumPy arrays, oldest first.

        Returns:
            "step": int64 [n]. "loss", "total_norm", "clipped_norm", "threshold", "scale": float32 [n], NaN for None.
            "skip": bool [n]. "norms": float32 [n, P], L2 norms before clipping; NaN where the tensor has no gradient,
            inf where the norm is not finite.

        Raises:
            ModuleNotFoundError: If NumPy is not installed. `tensors` returns the same without it.
        """
        load("numpy", "Guard.history.table()")
        return {name: column.numpy() for name, column in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the same as `table`, as tensors on the CPU."""
        oldest = self._added % self.steps if self._added > self.steps else 0
        columns = {}
        for name, (_, dtype) in _TYPES.items():
            ring = self._ring[name]
            column = (
                torch.frombuffer(ring, dtype=dtype) if ring else torch.empty(0, dtype=dtype, device="cpu")
            )
            rows = column.reshape(self.steps, -1)[: len(self)] if ring else column.reshape(len(self), 0)
            rows = torch.cat([rows[oldest:], rows[:oldest]])  # always a copy
            columns[name] = rows if name == "norms" else rows.flatten()
        return columns

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
        steps, kept, before = _check_steps(steps), self.tensors(), len(self)
        self._added, self.steps = min(before, steps), steps
        self._ring = self._blank()
        for name, column in kept.items():
            numbers = array(_TYPES[name][0], column[before - self._added :].flatten().tolist())
            self._ring[name][: len(numbers)] = numbers

    def _norms_of(self, report: Report) -> array[float]:
        norms = report.norms
        if not math.isfinite(report.total_norm):
            norms = {name: norm if math.isfinite(norm) else math.inf for name, norm in norms.items()}
        return array("f", map(norms.get, self.names, repeat(math.nan)))

    def _blank(self) -> dict[str, array[Any]]:
        widths = {"norms": len(self.names)}
        return {
            name: array(kind, [0]) * (self.steps * widths.get(name, 1)) for name, (kind, _) in _TYPES.items()
        }


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
