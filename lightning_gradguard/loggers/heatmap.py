"""Layers by steps of a whole run, in constant memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradguard.charts import BLANK, Marks, Title, draw
from lightning_gradguard.forms import Each
from lightning_gradguard.loggers.verdict import MARKS, Verdict
from lightning_gradguard.stats.histogram import EDGES

#: Characters of a name in the picture's title.
NAME = 34
#: Form of the saved state.
HEATMAP_FORM = {
    "names": [str],
    "first": int,
    "next": int,
    "stride": int,
    "cells": [[float]],
    "clipped": [int],
    "skipped": [int],
    "faults": Each(int),
}


class Heatmap:
    """Log10 gradient RMS of layers by steps.

    There is one row for each layer, and at most ``columns`` columns. A column stands for ``stride`` steps. The first of
    them is recorded, and any other whose gradients are not finite. When the columns are full, pairs of them are merged
    and the stride doubles. A merged cell is the mean, but a cell that was once not finite stays so.

    Args:
        names: Layers from input to output, at least one.
        columns: Largest number of columns, even, at least 2.

    Raises:
        ValueError: If there are no names, or ``columns`` is odd or below 2.
    """

    def __init__(self, names: Sequence[str], columns: int = 128) -> None:
        if not names:
            raise ValueError("names must hold at least one layer, got none")
        if columns < 2 or columns % 2:
            raise ValueError(f"columns must be even and at least 2, got {columns}")
        self._names = tuple(names)
        self._columns = columns
        self._clear(0)

    def _clear(self, first: int) -> None:
        self._first, self._next, self._stride, self._used = first, first, 1, 0
        self._cells = np.full((self._columns, len(self._names)), BLANK, dtype=np.float32)
        self._clipped, self._skipped = bytearray(self._columns), bytearray(self._columns)
        self._faults: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, from input to output."""
        return self._names

    @property
    def first(self) -> int:
        """Step at which the first column begins."""
        return self._first

    @property
    def stride(self) -> int:
        """Steps that one column stands for."""
        return self._stride

    @property
    def cells(self) -> NDArray[np.float32]:
        """Log10 RMS, float32 [columns in use, layers].

        NaN is a gradient that is not finite, `BLANK` no gradient.
        """
        cells: NDArray[np.float32] = self._cells[: self._used].copy()
        return cells

    @property
    def marks(self) -> Marks:
        """Marks above the columns in use."""
        used = self._used
        return Marks(bytes(self._clipped[:used]), bytes(self._skipped[:used]), dict(self._faults))

    def starts_column(self, step: int) -> bool:
        """Return True if this step begins a new column."""
        return step >= self._next or step < self._first

    def record(self, step: int, rms: Iterable[float | None]) -> bool:
        """Add the gradient RMS of one step.

        Args:
            step: Its number. A step before the first one starts the picture again.
            rms: For each layer, in the order of ``names``; None or `BLANK` where there is no gradient.

        Returns:
            True if a cell turned not finite.
        """
        column = self._column(step)
        values = np.array([BLANK if x is None else x for x in rms], dtype=np.float64)
        with np.errstate(all="ignore"):
            # Bounded, so that one exact zero cannot pull the mean of merged cells off the scale.
            decades = np.log10(values).clip(EDGES[0], EDGES[-1])
        decades[~np.isfinite(values)] = np.nan
        decades[values == BLANK] = BLANK
        known_bad = np.isnan(self._cells[column])
        self._cells[column] = _merge(self._cells[column], decades.astype(np.float32))
        self._next = self._first + (column + 1) * self._stride
        return bool((np.isnan(decades) & ~known_bad).any())

    def mark(self, step: int, *, clipped: bool = False, skipped: bool = False) -> bool:
        """Mark a step as clipped or skipped.

        Args:
            step: Its number.
            clipped: Its gradients were clipped.
            skipped: It was not taken.

        Returns:
            True if its column was not marked so before.
        """
        column = self._column(step)
        is_new = clipped > self._clipped[column] or skipped > self._skipped[column]
        self._clipped[column] |= clipped
        self._skipped[column] |= skipped
        return is_new

    def mark_fault(self, step: int, fault: str) -> None:
        """Mark the first step of a fault."""
        self._faults.setdefault(fault, step)

    def draw(self, verdict: Verdict | None = None, left_out: int = 0) -> bytes:
        """Return a PNG, drawn in about 0.3 s.

        Args:
            verdict: Verdict on the run, for the title.
            left_out: Layers that have no row, for the caption.
        """
        title = None
        if verdict is not None:
            title = Title(
                verdict.level,
                f"{MARKS[verdict.level]} {verdict.title}",
                verdict.detail(NAME),
                *verdict.where[:1],
            )
        return draw(self._names, self.cells.T, self._first, self._stride, self.marks, title, left_out)

    def snapshot(self) -> Heatmap:
        """Return a copy that another thread can draw."""
        return copy.deepcopy(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types."""
        return {
            "names": list(self._names),
            "first": self._first,
            "next": self._next,
            "stride": self._stride,
            "cells": self._cells[: self._used].tolist(),
            "clipped": list(self._clipped[: self._used]),
            "skipped": list(self._skipped[: self._used]),
            "faults": dict(self._faults),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the picture of `state_dict` if it fits.

        Raises:
            ValueError: If the state is damaged.
        """
        used = len(state["cells"])
        if tuple(state["names"]) != self._names or used > self._columns:
            return
        cells = np.array(state["cells"], dtype=np.float64).reshape(used, len(self._names))
        clipped, skipped = bytes(state["clipped"]), bytes(state["skipped"])
        beyond = (cells != BLANK) & ((cells < EDGES[0]) | (cells > EDGES[-1]))
        if beyond.any() or {len(clipped), len(skipped)} != {used} or state["stride"] < 1:
            raise ValueError("the heat map's columns are damaged")
        self._clear(state["first"])
        self._next, self._stride, self._used = state["next"], state["stride"], used
        self._cells[:used] = cells
        self._clipped[:used], self._skipped[:used] = clipped, skipped
        self._faults = dict(state["faults"])

    def _column(self, step: int) -> int:
        """Return the column of a step; merge columns if needed."""
        if step < self._first or not self._used:
            self._clear(step)
        while (step - self._first) // self._stride >= self._columns:
            merged = _merge(self._cells[0::2], self._cells[1::2])
            self._cells = np.concatenate([merged, np.full_like(merged, BLANK)])
            for flags in (self._clipped, self._skipped):
                pairs = zip(flags[0::2], flags[1::2], strict=True)
                flags[:] = bytes(a | b for a, b in pairs) + bytes(self._columns // 2)
            self._stride *= 2
            self._used = (self._used + 1) // 2
        column = (step - self._first) // self._stride
        self._used = max(self._used, column + 1)
        return column


def _merge(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean of cells; NaN stays, blank is ignored."""
    with np.errstate(invalid="ignore"):
        return np.where(a == BLANK, b, np.where(b == BLANK, a, (a + b) / 2))
