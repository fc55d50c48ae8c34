"""Data of the page's figures, of bounded size."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradguard.charts import BLANK, cells_uri
from lightning_gradguard.html_report.event_reader import Curve, Track
from lightning_gradguard.loggers.heatmap import Heatmap
from lightning_gradguard.loggers.overview import CLIPPED, SKIPPED
from lightning_gradguard.stats.histogram import EDGES

#: Cells of a heat map, and columns of it.
CELLS, COLUMNS = 131_072, 128
#: Numbers in all histograms of a run, steps of one, and tensors that have some.
COUNTS, STEPS, TENSORS = 400_000, 64, 400
#: Points of a curve, and steps at which a finding is marked.
POINTS, MARKS = 400, 200

#: Heat map cells without a gradient and with one that is not finite; other cells are 16-bit hundredths of a decade.
BLANK_CELL, NONFINITE_CELL = -32_768, 32_767


def heat_map(track: Track) -> dict[str, Any] | None:
    """Return the heat map, or None if it is empty.

    Its columns merge as those of `lightning_gradguard.loggers.heatmap.Heatmap` do. Without a `GradGuard` it is built
    from histograms, if there are any.
    """
    names, rows = (track.layers, track.rows) if track.rows else _rows_of_histograms(track)
    if not rows:
        return None
    # No more columns than rows: a step that was not recorded must not look like one without a gradient.
    columns = max(2, min(COLUMNS, max(16, CELLS // len(names)), len(rows)) // 2 * 2)
    picture = Heatmap(names, columns)
    for step, row in rows.items():
        mark, decades = int(row[0]), row[1:].astype(np.float64)
        picture.record(step, [None if x == BLANK else 10.0**x for x in decades.tolist()])
        if mark:
            picture.mark(step, clipped=mark == CLIPPED, skipped=mark == SKIPPED)
    cells = picture.cells.T
    hundredths = np.round(np.where(np.isfinite(cells), cells, 0) * 100)
    hundredths = np.where(np.isnan(cells), NONFINITE_CELL, np.where(cells == BLANK, BLANK_CELL, hundredths))
    clipped, skipped, _ = picture.marks
    return {
        "names": list(names),
        "first": picture.first,
        "stride": picture.stride,
        "columns": cells.shape[1],
        "image": cells_uri(cells),
        "cells": _base64(hundredths.astype("<i2")),
        "clipped": [i for i, flag in enumerate(clipped) if flag],
        "skipped": [i for i, flag in enumerate(skipped) if flag],
    }


def curve(points: Curve[float]) -> dict[str, Any]:
    """Return at most `POINTS` points, with extremes and gaps."""
    steps, values = list(points), np.array(list(points.values()), dtype=np.float64)
    chosen: set[int] = set(range(len(steps)))
    if len(steps) > POINTS:
        chosen = {0, len(steps) - 1}
        for stretch in np.array_split(np.arange(len(steps)), (POINTS - 2) // 3):
            known = stretch[np.isfinite(values[stretch])]
            if len(known):
                chosen |= {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
            if len(known) < len(stretch):
                chosen.add(int(stretch[~np.isfinite(values[stretch])][0]))
    kept = sorted(chosen)
    return {"steps": [steps[i] for i in kept], "values": [_rounded(values[i]) for i in kept]}


def histograms(track: Track) -> tuple[dict[str, dict[str, Any]], int]:
    """Return histograms over time, and how many are left out.

    There is one for each tensor. A column is the square root of the shares of all elements, in 255ths. Neighbouring
    steps are added up if there are too many.
    """
    longest = sorted(track.histograms, key=lambda title: -len(track.histograms[title]))[:TENSORS]
    limit = max(8, min(STEPS, COUNTS // (len(EDGES) - 1) // max(1, len(longest))))
    shown = {title: _columns(track.histograms[title], limit) for title in sorted(longest)}
    return shown, len(track.histograms) - len(shown)


def _columns(records: Curve[NDArray[np.float32]], limit: int) -> dict[str, Any]:
    steps, counts = list(records), np.stack(list(records.values())).astype(np.float64)
    begins = np.unique(np.linspace(0, len(steps), min(limit, len(steps)), endpoint=False).astype(int))
    summed = np.add.reduceat(counts, begins)
    shares = summed / np.maximum(summed.sum(axis=1, keepdims=True), 1e-12)
    # Rounded up, so that a single element is still visible.
    return {
        "steps": [steps[i] for i in begins],
        "last": steps[-1],
        "shares": _base64(np.ceil(255 * np.sqrt(shares)).astype(np.uint8)),
    }


def thin(items: Sequence[int], most: int) -> list[int]:
    """Return at most ``most`` items, evenly chosen."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _rows_of_histograms(track: Track) -> tuple[tuple[str, ...], Curve[NDArray[np.float16]]]:
    """Return layers and rows as `Track` has them."""
    titles = sorted(track.histograms)
    # Middles of the bins; the first bin counts as zero.
    squares = 100.0 ** (np.array(EDGES[:-1]) + 0.25)
    squares[0] = 0
    rows: Curve[NDArray[np.float16]] = {}
    for place, title in enumerate(titles):
        for step, counts in track.histograms[title].items():
            row = rows.setdefault(step, np.array([0] + [-math.inf] * len(titles), dtype=np.float16))
            row[place + 1] = _decades(counts, squares)
    return tuple(title.partition("_")[2] for title in titles), dict(sorted(rows.items()))


def _decades(counts: NDArray[np.float32], squares: NDArray[np.float64]) -> float:
    """Return log10 RMS of counted elements."""
    if not counts.any():
        return math.nan  # only finite elements are counted, and there are none
    mean = float(counts @ squares) / float(counts.sum())
    return max(0.5 * math.log10(mean), EDGES[0]) if mean > 0 else EDGES[0]


def _rounded(x: float) -> float | None:
    return float(f"{x:.4g}") if math.isfinite(x) else None


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
