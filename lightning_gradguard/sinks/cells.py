"""The cells of a picture of layers by steps: their colours, the same in every picture, and how many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable

#: Colour axis in decades, the same for all runs, so that pictures compare.
SCALE = (-10.0, 2.0)
#: Colours of what is not on it.
NOT_FINITE, NO_GRADIENT = "magenta", "lightgrey"


def colours() -> ScalarMappable:
    """Decades to colours; beyond `SCALE` it is its end."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(*SCALE, clip=True), colormaps["RdYlBu_r"])


def paint(cells: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Pixels of cells, one for each.

    Args:
        cells: [rows, columns], log10 gradient RMS; NaN is not finite, -inf no gradient.

    Returns:
        uint8 [rows, columns, 4]: red, green, blue, and full opacity.
    """
    from matplotlib.colors import to_rgba

    pixels: NDArray[np.uint8] = np.array(colours().to_rgba(np.nan_to_num(cells), bytes=True))
    for where, colour in ((np.isnan(cells), NOT_FINITE), (np.isneginf(cells), NO_GRADIENT)):
        pixels[where] = np.round(255 * np.array(to_rgba(colour)))
    return pixels


def binned(
    names: Sequence[str], cells: NDArray[np.floating], most: int
) -> tuple[list[str], NDArray[np.floating]]:
    """At most so many rows: of each bin the worst cell, not finite, or farthest from the column's median.

    Args:
        names: One for each row.
        cells: [rows, columns], as `paint` takes them.
        most: Rows that can still be told apart.

    Returns:
        The name of each bin's first row, and the cells [bins, columns].
    """
    size = math.ceil(len(names) / most)
    if size == 1:
        return list(names), cells
    known = np.where(np.isfinite(cells), cells, np.nan)
    known[:, np.isnan(known).all(axis=0)] = 0  # of nothing there is no median
    median = np.nanmedian(known, axis=0)
    distance = np.nan_to_num(np.abs(cells - median), nan=np.inf, posinf=-1)
    starts = range(0, len(names), size)
    worst = np.stack([i + distance[i : i + size].argmax(axis=0) for i in starts])
    return [names[i] for i in starts], np.take_along_axis(cells, worst, axis=0)
