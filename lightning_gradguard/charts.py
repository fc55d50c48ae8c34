"""Heat maps of layers by steps, and labels.

Only this module imports matplotlib. A cell is the log10 of a layer's gradient RMS (root mean square) at a step. NaN
stands for a gradient that is NaN or Inf, `BLANK` for no gradient. Every picture of the package uses these colours on
this scale, so pictures compare.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

#: Ends of the colour scale, log10; the same for all runs.
SCALE = (-10.0, 2.0)
#: A cell without a gradient.
BLANK = -math.inf
#: Colours of cells that are no number, and of marks above the picture.
NONFINITE_COLOUR, BLANK_COLOUR, CLIPPED_COLOUR = "magenta", "lightgrey", "darkorange"
#: Rows that can be told apart in the picture for TensorBoard; more are binned.
ROWS = 64

# What is legible on a TensorBoard card.
_SIZE, _DPI, _FONT, _STROKE = (4.8, 3.2), 150, 8, 0.4
_LABELS, _LABEL_ROOM = 16, 18
# Position of the cells in the figure, and of the marks above them.
_LEFT, _WIDTH, _BOTTOM, _HEIGHT = 0.25, 0.625, 0.135, 0.605
_TOP = _BOTTOM + _HEIGHT + 0.09


class Marks(NamedTuple):
    """Marks above the picture.

    Attributes:
        clipped: One byte for each column, 1 if a step was clipped.
        skipped: One byte for each column, 1 if a step was skipped.
        faults: Name of a fault to the step at which it was first found.
    """

    clipped: bytes
    skipped: bytes
    faults: Mapping[str, int]


def paint(cells: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return one pixel for each cell.

    Args:
        cells: [rows, columns]. Values beyond `SCALE` get the colour of its end.

    Returns:
        uint8 [rows, columns, 4]: red, green, blue, and full opacity.
    """
    from matplotlib.colors import to_rgba

    pixels: NDArray[np.uint8] = np.array(_colour_scale().to_rgba(np.nan_to_num(cells), bytes=True))
    for where, colour in ((np.isnan(cells), NONFINITE_COLOUR), (np.isneginf(cells), BLANK_COLOUR)):
        pixels[where] = np.round(255 * np.array(to_rgba(colour)))
    return pixels


def cells_uri(cells: NDArray[np.floating]) -> str:
    """Return a PNG of the cells as data URI.

    Args:
        cells: [rows, columns], one pixel each.
    """
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, paint(cells), format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def scale_uri() -> str:
    """Return the colour scale as data URI."""
    return cells_uri(np.linspace(*SCALE, 97).reshape(1, -1))


def decode_png(png: bytes) -> NDArray[np.uint8]:
    """Return the pixels of a PNG.

    Args:
        png: The file, with an opacity channel.

    Returns:
        uint8 [height, width, 4].
    """
    from matplotlib.image import imread

    pixels: NDArray[np.uint8] = np.round(imread(io.BytesIO(png)) * 255).astype(np.uint8)
    return pixels


def bin_rows(
    names: Sequence[str], cells: NDArray[np.floating], most: int
) -> tuple[list[str], NDArray[np.floating]]:
    """Join neighbouring rows to at most ``most`` bins.

    Each bin shows its worst cell of a column: one that is not finite, else the one farthest from the column's median.

    Args:
        names: One for each row.
        cells: [rows, columns].
        most: Largest number of rows.

    Returns:
        The name of each bin's first row, and the cells [bins, columns].
    """
    size = math.ceil(len(names) / most)
    if size == 1:
        return list(names), cells
    known = np.where(np.isfinite(cells), cells, np.nan)
    known[:, np.isnan(known).all(axis=0)] = 0  # a column without a finite cell has no median
    median = np.nanmedian(known, axis=0)
    distance = np.nan_to_num(np.abs(cells - median), nan=np.inf, posinf=-1)
    starts = range(0, len(names), size)
    worst = np.stack([i + distance[i : i + size].argmax(axis=0) for i in starts])
    return [names[i] for i in starts], np.take_along_axis(cells, worst, axis=0)


def draw(names: Sequence[str], cells: NDArray[np.float32], first: int, stride: int, marks: Marks) -> bytes:
    """Draw the heat map for TensorBoard.

    No global state of pyplot is used, so any thread may draw.

    Args:
        names: Layers from input (top) to output (bottom).
        cells: float32 [layers, columns].
        first: Step at which the first column begins.
        stride: Steps that a column stands for.
        marks: What happened in each column.

    Returns:
        A PNG of 720 x 480 pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    labels, rows = bin_rows(without_prefix(names), cells, ROWS)
    span = (first, first + max(1, rows.shape[1]) * stride)
    figure = Figure(figsize=_SIZE, dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    title = "log10 of gradient RMS by layer      magenta: NaN or Inf      grey: no gradient"
    figure.text(0.5, 0.99, title, fontsize=_FONT, ha="center", va="top")
    _draw_cells(figure, labels, rows, span)
    _draw_events(figure, span, marks)
    _draw_faults(figure, span, marks.faults)
    for text in figure.findobj(Text):
        # TensorBoard shrinks pictures by dropping pixels, and thin strokes would disappear.
        text.set_path_effects([withStroke(linewidth=_STROKE, foreground="black")])
    file = io.BytesIO()
    canvas.print_png(file)  # type: ignore[no-untyped-call]
    return file.getvalue()


def without_prefix(names: Sequence[str]) -> list[str]:
    """Remove leading modules that all names share.

    Args:
        names: Dotted names.

    Returns:
        The names, each with at least its last part.

    >>> without_prefix(["net.model.0.weight", "net.model.0.bias"])
    ['weight', 'bias']
    """
    parts = [n.split(".") for n in names]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def shorten(name: str, room: int) -> str:
    """Shorten a dotted name and keep its end.

    Leading modules shrink to their first letter (numbers stay), then they are removed.

    Args:
        name: Dotted name.
        room: Largest length, characters.

    Returns:
        At most ``room`` characters.

    >>> shorten("encoder.layers.11.self_attn.out_proj.weight", 24)
    'e.l.11.s.out_proj.weight'
    """
    parts = name.split(".")
    for i in range(len(parts) - 1):
        if len(".".join(parts)) <= room:
            break
        parts[i] = parts[i] if parts[i].isdigit() else parts[i][:1]
    while len(parts) > 1 and len(".".join(parts)) > room:
        del parts[0]
    return ".".join(parts)[-room:]


def _colour_scale() -> ScalarMappable:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(*SCALE, clip=True), colormaps["RdYlBu_r"])


def _draw_cells(
    figure: Figure, labels: Sequence[str], rows: NDArray[np.floating[Any]], span: tuple[int, int]
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_axes((_LEFT, _BOTTOM, _WIDTH, _HEIGHT))
    axes.imshow(paint(rows), aspect="auto", interpolation="nearest", extent=(*span, len(labels), 0))
    shown = range(0, len(labels), math.ceil(len(labels) / _LABELS))
    # ASCII, since the font lacks many other characters; no math, since a dollar sign begins no formula here.
    short = [shorten(labels[i], _LABEL_ROOM).encode("ascii", "replace").decode() for i in shown]
    _label(axes.yaxis, [i + 0.5 for i in shown], short)
    steps = [x for x in MaxNLocator(5, integer=True).tick_values(*span) if span[0] <= x <= span[1]]
    _label(axes.xaxis, steps, [f"{x:,.0f}" for x in steps])
    axes.tick_params(labelsize=_FONT, length=2)
    axes.set_xlabel("step", fontsize=_FONT, labelpad=2)
    place = (_LEFT + _WIDTH + 0.02, _BOTTOM, 0.025, _HEIGHT)
    scale = figure.colorbar(_colour_scale(), cax=figure.add_axes(place))
    scale.set_ticks(range(int(SCALE[0]), int(SCALE[1]) + 1, 2))
    scale.ax.tick_params(labelsize=_FONT, length=2)


def _label(axis: Axis, places: Sequence[float], labels: Sequence[str]) -> None:
    """Label an axis.

    `set_ticklabels` enters `warnings.catch_warnings`, after which Python shows warnings of the training again that it
    has shown already.
    """
    from matplotlib.ticker import FixedFormatter, FixedLocator

    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_major_formatter(FixedFormatter(list(labels)))
    for text in axis.get_majorticklabels():
        text.set_parse_math(False)


def _draw_events(figure: Figure, span: tuple[int, int], marks: Marks) -> None:
    from matplotlib.colors import to_rgba

    rows = {"skipped": (marks.skipped, NONFINITE_COLOUR), "clipped": (marks.clipped, CLIPPED_COLOUR)}
    pixels = np.full((len(rows), max(1, len(marks.clipped)), 4), to_rgba("whitesmoke"))
    for row, (flags, colour) in zip(pixels, rows.values(), strict=True):
        row[np.frombuffer(flags, dtype=bool).nonzero()] = to_rgba(colour)
    axes = figure.add_axes((_LEFT, _BOTTOM + _HEIGHT + 0.015, _WIDTH, 0.075))
    axes.imshow(pixels, aspect="auto", interpolation="nearest", extent=(*span, len(rows), 0))
    axes.set_xticks([])
    _label(axes.yaxis, [0.5, 1.5], list(rows))
    axes.tick_params(labelsize=_FONT, length=0)
    axes.spines[:].set_visible(False)


def _draw_faults(figure: Figure, span: tuple[int, int], faults: Mapping[str, int]) -> None:
    """Draw where each fault began, and its name."""
    taken = [0.0, 0.0]
    for fault, step in sorted(faults.items(), key=lambda item: item[1]):
        x = _LEFT + _WIDTH * min(max((step - span[0]) / (span[1] - span[0]), 0.0), 1.0)
        figure.text(x, _TOP, "\u25bc", fontsize=_FONT - 2, ha="center", va="bottom")
        half = 0.006 * len(fault)  # of the figure's width
        middle = min(max(x, half), 1 - half)
        for line, end in enumerate(taken):
            if middle - half > end:
                y = _TOP + 0.03 + 0.04 * line
                figure.text(middle, y, fault, fontsize=_FONT, ha="center", va="bottom")
                taken[line] = middle + half
                break
