"""The layer-by-step picture of a whole run, in memory that does not grow with the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradguard.charts.heatmap import Marks, draw
from lightning_gradguard.stats.histogram import EDGES

#: In a cell: no gradient was seen. NaN: it was not finite.
BLANK = -math.inf


class Heatmap:
    """Cumulative matrix of log10 gradient RMS, one row for each layer and at most ``columns`` columns.

    A column stands for ``stride`` steps, of which the first is recorded, and any other whose gradients were
    not finite. When the columns are full, pairs of them are merged and the stride doubles. A cell that was
    ever not finite stays so through every merging; otherwise a merged cell is the mean.

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
    def stride(self) -> int:
        """Steps that one column stands for."""
        return self._stride

    @property
    def cells(self) -> NDArray[np.float32]:
        """float32 [columns in use, layers], log10 RMS; NaN: was not finite, `BLANK`: none was seen."""
        cells: NDArray[np.float32] = self._cells[: self._used].copy()
        return cells

    def wants(self, step: int) -> bool:
        """Whether this step begins a new column, so that it should be recorded."""
        return step >= self._next or step < self._first

    def record(self, step: int, rms: Sequence[float | None]) -> bool:
        """Adds the gradient RMS of one step.

        Args:
            step: A step before the first one starts the picture anew.
            rms: For each layer, in the order of ``names``; None where there is no gradient.

        Returns:
            Whether a cell turned not finite by it.
        """
        column = self._column(step)
        values = np.array([math.nan if x is None else x for x in rms], dtype=np.float64)
        with np.errstate(all="ignore"):
            # Bounded, so that one exact zero cannot drag the mean of merged cells off the scale.
            decades = np.log10(values).clip(EDGES[0], EDGES[-1])
        decades[~np.isfinite(values)] = np.nan
        decades[[x is None for x in rms]] = BLANK
        known_bad = np.isnan(self._cells[column])
        self._cells[column] = _merge(self._cells[column], decades.astype(np.float32))
        self._next = self._first + (column + 1) * self._stride
        return bool((np.isnan(decades) & ~known_bad).any())

    def mark(self, step: int, *, clipped: bool = False, skipped: bool = False) -> bool:
        """Marks a step on the strip above the picture; returns whether its column was not marked so yet."""
        column = self._column(step)
        is_news = clipped > self._clipped[column] or skipped > self._skipped[column]
        self._clipped[column] |= clipped
        self._skipped[column] |= skipped
        return is_news

    def name(self, step: int, fault: str) -> None:
        """Names a fault above the strip, where it was first found."""
        self._faults.setdefault(fault, step)

    def draw(self) -> bytes:
        """A PNG of the picture so far. About a third of a second."""
        used = self._used
        marks = Marks(bytes(self._clipped[:used]), bytes(self._skipped[:used]), dict(self._faults))
        return draw(self._names, self.cells.T, self._first, self._stride, marks)

    def snapshot(self) -> Heatmap:
        """A copy, which can be drawn on another thread while this one goes on."""
        return copy.deepcopy(self)

    def state_dict(self) -> dict[str, Any]:
        """Plain types, which load under ``weights_only=True``."""
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
        """Continues the picture of `state_dict`; that of other layers or of more columns is left out."""
        used = len(state["cells"])
        if tuple(state["names"]) != self._names or used > self._columns:
            return
        self._clear(state["first"])
        self._next, self._stride, self._used = state["next"], state["stride"], used
        self._cells[:used] = np.array(state["cells"], dtype=np.float32).reshape(used, len(self._names))
        self._clipped[:used], self._skipped[:used] = bytes(state["clipped"]), bytes(state["skipped"])
        self._faults = dict(state["faults"])

    def _column(self, step: int) -> int:
        """Index of the column of a step, after as much merging as it takes to have one."""
        if step < self._first or not self._used:
            self._clear(step)
        while (step - self._first) // self._stride >= self._columns:
            self._halve()
        column = (step - self._first) // self._stride
        self._used = max(self._used, column + 1)
        return column

    def _halve(self) -> None:
        half = self._columns // 2
        merged = _merge(self._cells[0::2], self._cells[1::2])
        self._cells = np.concatenate([merged, np.full_like(merged, BLANK)])
        for marks in (self._clipped, self._skipped):
            marks[:] = bytes(a | b for a, b in zip(marks[0::2], marks[1::2], strict=True)) + bytes(half)
        self._stride *= 2
        self._used = (self._used + 1) // 2


def _merge(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of two cells, of which a blank one does not count; NaN outlives it."""
    with np.errstate(invalid="ignore"):
        return np.where(a == BLANK, b, np.where(b == BLANK, a, (a + b) / 2))
