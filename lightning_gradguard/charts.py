"""Heat maps of layers by steps, and labels.

Only this module imports matplotlib. A cell is the log10 of a layer's gradient RMS (root mean square) at a step. NaN
stands for a gradient that is NaN or Inf, `BLANK` for no gradient. Every picture of the package uses these colours on
this scale, so pictures compare. The colours go from blue (small) over a calm green to red (large); the green is the
lightest, so that the two sides differ from it, and by hue from each other, for every kind of colour vision.
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
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

#: Ends of the colour scale, log10; the same for all runs.
SCALE = (-10.0, 2.0)
#: A cell without a gradient.
BLANK = -math.inf
#: Colours of cells that are no number, and of marks above the picture.
NONFINITE_COLOUR, BLANK_COLOUR, CLIPPED_COLOUR = "#ff00ff", "#6b6b6b", "#ff9f1c"
#: Rows that can be told apart in the picture for TensorBoard; more are binned.
ROWS = 64

# A TensorBoard card is 215 pixels high inside and at least 365 wide. It shrinks a picture by dropping pixels, so this
# one has twice that size: every second pixel is dropped, and strokes are two pixels wide.
_WIDTH, _HEIGHT, _DPI, _STROKE = 730, 430, 150, 0.35
# Sizes of the title, of its second part, of labels, and of the caption, points; 1 point is about 2 pixels.
_TITLE, _DETAIL, _FONT, _CAPTION = 11, 9.5, 9, 8.5
# Characters of a row's label and of a word of the title, and lines of the title and its second part together.
_LABEL_ROOM, _WORD, _LINES = 24, 36, 3
# Heights in pixels: a line of text, a strip, the row of faults, and everything below the cells.
_LINE, _STRIP, _FAULTS, _BELOW = 25, 20, 24, 60
# Length of a tick.
_TICK = 6
# Distance of the cells from the right edge, where the colour scale is.
_RIGHT = 82
# Readable in a dark and in a light page.
_PAPER, _INK, _QUIET, _LANE = "#262a30", "#f1f3f5", "#b9c0c8", "#3a4048"
_LEVELS = {"critical": "#ff7b72", "warning": "#ffb74a", "protected": "#7cc7ff", "healthy": "#6fdc8c"}

# Widths of texts that were measured, which is a fifth of a drawing; the names of layers stay.
_WIDTHS: dict[tuple[str, float, str], float] = {}
_MOST_WIDTHS = 4096

# Decades of the scale to colours.
_COLOURS = (
    (-10.0, "#251a6b"),
    (-8.0, "#27418f"),
    (-6.5, "#2f78a8"),
    (-5.2, "#3fa6ae"),
    (-3.8, "#5fc9ac"),
    (-2.4, "#a3dba0"),
    (-1.2, "#efd26a"),
    (-0.2, "#f0953c"),
    (0.8, "#d43d22"),
    (2.0, "#7a0716"),
)


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


class Title(NamedTuple):
    """Title of the picture.

    Attributes:
        level: Level of a verdict, which decides the colour.
        main: The verdict.
        detail: Since when, where, and what else.
        where: Name of the worst tensor, whose row is marked.
    """

    level: str
    main: str
    detail: str = ""
    where: str = ""


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


def draw(
    names: Sequence[str],
    cells: NDArray[np.float32],
    first: int,
    stride: int,
    marks: Marks,
    title: Title | None = None,
    left_out: int = 0,
) -> bytes:
    """Draw the heat map for TensorBoard.

    No global state of pyplot is used, so any thread may draw.

    Args:
        names: Layers from input (top) to output (bottom).
        cells: float32 [layers, columns].
        first: Step at which the first column begins.
        stride: Steps that a column stands for.
        marks: What happened in each column.
        title: The title.
        left_out: Layers that have no row.

    Returns:
        A PNG of 730 x 430 pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    owners, rows = bin_rows(names, cells, ROWS)
    worst = _owner_of(title, names)
    if worst is not None:
        worst_row = worst // math.ceil(len(names) / len(owners))
        owners[worst_row] = names[worst]
    labels = [_ascii(elide(owner, _LABEL_ROOM)) for owner in owners]
    span = (first, first + max(1, rows.shape[1]) * stride)
    figure = Figure(figsize=(_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI, facecolor=_PAPER)
    canvas = FigureCanvasAgg(figure)
    strips = [name for name, flags in (("skipped", marks.skipped), ("clipped", marks.clipped)) if any(flags)]
    left = 18 + max(_width(figure, label, _FONT) for label in [*labels, *strips, "step"])
    top = 12 + _FAULTS + _LINE * (0 if title is None else _draw_title(figure, title))
    box = _Box(left, top + _STRIP * len(strips), _WIDTH - left - _RIGHT, _HEIGHT - _BELOW)
    _draw_cells(figure, labels, rows, span, box)
    _label_rows(figure, labels, None if worst is None else worst_row, box)
    _draw_strips(figure, strips, marks, box)
    _draw_faults(figure, span, marks.faults, box, top)
    _draw_caption(figure, left_out, box)
    file = io.BytesIO()
    canvas.print_png(file)  # type: ignore[no-untyped-call]
    return file.getvalue()


def elide(name: str, room: int) -> str:
    """Shorten a dotted name in the middle, so that start and end can be recognized.

    Inner words go first, then inner numbers, then characters. Three dots stand for what is left out.

    Args:
        name: Dotted name.
        room: Largest length, characters, at least 5.

    Returns:
        At most ``room`` characters.

    >>> elide("encoder.layers.11.self_attn.out_proj", 24)
    'encoder...11...out_proj'
    >>> elide("decoder.final_classification_head", 24)
    'decoder...ification_head'
    """
    parts = name.split(".")
    inner = range(1, len(parts) - 1)
    kept = [True] * len(parts)
    for i in sorted(inner, key=lambda i: parts[i].isdigit()):
        if len(_joined(parts, kept)) <= room:
            break
        kept[i] = False
    short = _joined(parts, kept)
    # Much shorter than needed: what went was one long word.
    if len(short) <= room and (short == name or len(short) > 0.6 * room):
        return short
    if len(parts) > 1 and len(parts[0]) <= room // 2 - 2:
        return parts[0] + "..." + name[len(parts[0]) + 3 - room :]
    end = (room - 3 + 1) // 2
    return name[: room - 3 - end] + "..." + name[len(name) - end :]


def _joined(parts: Sequence[str], kept: Sequence[bool]) -> str:
    text = parts[0]
    for i in range(1, len(parts)):
        if kept[i]:
            text += ("." if kept[i - 1] else "...") + parts[i]
    return text


class _Box(NamedTuple):
    """Place of the cells, pixels from the left and from the top."""

    left: float
    top: float
    width: float
    bottom: float


def _colour_scale() -> ScalarMappable:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    low, high = SCALE
    colours = [((decades - low) / (high - low), colour) for decades, colour in _COLOURS]
    return ScalarMappable(
        Normalize(*SCALE, clip=True), LinearSegmentedColormap.from_list("gradients", colours, N=1024)
    )


def _ascii(text: str) -> str:
    # The font lacks many other characters.
    return text.encode("ascii", "replace").decode()


def _write(figure: Figure, x: float, y: float, text: str, size: float, **options: Any) -> None:
    """Write text at pixels from the left and from the top."""
    from matplotlib.patheffects import withStroke

    style = {"color": _INK, "va": "top"} | options
    # No math, since a dollar sign begins no formula here.
    written = figure.text(x / _WIDTH, 1 - y / _HEIGHT, text, fontsize=size, parse_math=False, **style)
    # Wider strokes, which would disappear with every second pixel.
    written.set_path_effects([withStroke(linewidth=_STROKE, foreground=written.get_color())])


def _width(figure: Figure, text: str, size: float, weight: str = "normal") -> float:
    """Return the width of a text, pixels."""
    key = text, size, weight
    if key not in _WIDTHS:
        from matplotlib.font_manager import FontProperties

        if len(_WIDTHS) >= _MOST_WIDTHS:
            _WIDTHS.clear()
        canvas: Any = figure.canvas
        font = FontProperties(size=size, weight=weight)
        _WIDTHS[key] = float(canvas.get_renderer().get_text_width_height_descent(text, font, False)[0])
    return _WIDTHS[key]


def _wrapped(figure: Figure, text: str, lines: int, size: float, weight: str = "normal") -> list[str]:
    """Break a text into lines as wide as the picture, and cut it off behind the last one."""
    wrapped = [""]
    for word in text.split(" "):
        longer = f"{wrapped[-1]} {elide(word, _WORD)}".lstrip()
        more = " ..." if len(wrapped) == lines else ""
        if not wrapped[-1] or _width(figure, longer + more, size, weight) <= _WIDTH - 20:
            wrapped[-1] = longer
        elif more:
            wrapped[-1] += more
            break
        else:
            wrapped.append(elide(word, _WORD))
    return wrapped


def _owner_of(title: Title | None, names: Sequence[str]) -> int | None:
    """Return the index of the layer that the worst tensor belongs to, or None."""
    tensor = "" if title is None else title.where
    owners = (i for i, name in enumerate(names) if name in (tensor, tensor.rpartition(".")[0]))
    return next(owners, None) if tensor else None


def _draw_title(figure: Figure, title: Title) -> int:
    """Draw the title; return its number of lines."""
    main = title.main[:2] + _ascii(title.main[2:])
    lines = _wrapped(figure, main, 2, _TITLE, "bold")
    colour = _LEVELS.get(title.level, _INK)
    for i, line in enumerate(lines):
        _write(figure, 10, 7 + i * (_LINE + 1), line, _TITLE, weight="bold", color=colour)
    detail = _wrapped(figure, _ascii(title.detail), _LINES - len(lines), _DETAIL)
    for i, line in enumerate(detail, len(lines)):
        _write(figure, 10, 10 + i * _LINE, line, _DETAIL)
    return len(lines) + len(detail)


def _draw_cells(
    figure: Figure,
    labels: Sequence[str],
    rows: NDArray[np.floating[Any]],
    span: tuple[int, int],
    box: _Box,
) -> None:
    from matplotlib.ticker import MaxNLocator

    height = box.bottom - box.top
    _paste(figure, paint(rows), box.left, box.top, box.width, height)
    for step in MaxNLocator(4, integer=True).tick_values(*span):
        if span[0] <= step <= span[1]:
            x = box.left + box.width * (step - span[0]) / (span[1] - span[0])
            _draw_tick(figure, x, box.bottom, x, box.bottom + _TICK)
            _write(figure, x, box.bottom + 2 * _TICK + 1, f"{step:,.0f}", _FONT, ha="center")
    _write(figure, box.left - 8, box.bottom + 8, "step", _FONT, ha="right", color=_QUIET)
    left = box.left + box.width + 14
    _paste(figure, paint(np.linspace(*SCALE[::-1], 256)[:, None]), left, box.top, 16, height)
    for decade in range(int(SCALE[0]), int(SCALE[1]) + 1, 4):
        y = box.bottom - height * (decade - SCALE[0]) / (SCALE[1] - SCALE[0])
        _draw_tick(figure, left + 16, y, left + 16 + _TICK, y)
        _write(figure, left + 17 + 2 * _TICK, y, str(decade), _FONT, va="center_baseline")


def _paste(
    figure: Figure, pixels: NDArray[np.uint8], left: float, top: float, width: float, height: float
) -> None:
    """Enlarge pixels to a place of the picture. Axes would take a third of the time of a drawing."""
    begin, end = (round(left), round(top)), (round(left + width), round(top + height))
    across, down = (
        np.arange(b - a) * n // (b - a) for a, b, n in zip(begin, end, pixels.shape[1::-1], strict=True)
    )
    figure.figimage(pixels[down][:, across], begin[0], _HEIGHT - end[1], origin="upper")


def _draw_tick(figure: Figure, left: float, top: float, right: float, bottom: float) -> None:
    from matplotlib.lines import Line2D

    x, y = [left / _WIDTH, right / _WIDTH], [1 - top / _HEIGHT, 1 - bottom / _HEIGHT]
    figure.add_artist(Line2D(x, y, color=_QUIET, linewidth=0.8))


def _label_rows(figure: Figure, labels: Sequence[str], worst: int | None, box: _Box) -> None:
    """Name the rows that have room for it, the worst one before all others."""
    row = (box.bottom - box.top) / len(labels)
    every = math.ceil((2 * _FONT + 0.5) / row)
    # Not every second one: where two kinds of layer alternate, only one kind would have names.
    every += every > 1 and every % 2 == 0
    for i in range(len(labels)):
        is_free = worst is None or abs(i - worst) >= every or i == worst
        if i == worst or (i % every == 0 and is_free):
            colour = _LEVELS["critical"] if i == worst else _INK
            y = box.top + row * (i + 0.5)
            options = {"ha": "right", "va": "center_baseline", "color": colour}
            _write(figure, box.left - 8, y, labels[i], _FONT, **options)
            if i == worst:
                _write(figure, box.left + 3, y, "\u25b6", _FONT - 2, va="center", color=colour)


def _draw_strips(figure: Figure, strips: Sequence[str], marks: Marks, box: _Box) -> None:
    from matplotlib.colors import to_rgba

    colours = {"skipped": NONFINITE_COLOUR, "clipped": CLIPPED_COLOUR}
    for i, name in enumerate(strips):
        flags = np.frombuffer(getattr(marks, name), dtype=bool)
        pixels = np.full((1, len(flags), 4), to_rgba(_LANE))
        pixels[0, flags] = to_rgba(colours[name])
        top = box.top - _STRIP * (len(strips) - i)
        _paste(figure, np.round(255 * pixels).astype(np.uint8), box.left, top, box.width, _STRIP - 4)
        _write(figure, box.left - 8, top - 3, name, _FONT, ha="right", color=_QUIET)


def _draw_faults(
    figure: Figure, span: tuple[int, int], faults: Mapping[str, int], box: _Box, bottom: float
) -> None:
    """Draw where each fault began, and its name where there is room."""
    found = sorted(faults.items(), key=lambda item: item[1])
    places = [
        box.left + box.width * min(max((step - span[0]) / (span[1] - span[0]), 0.0), 1.0) for _, step in found
    ]
    taken = [(x - 9, x + 9) for x in places]
    for (fault, _), x in zip(found, places, strict=True):
        _write(figure, x, bottom - 3, "\u25bc", _FONT - 1, ha="center", va="bottom")
        width = _width(figure, fault, _FONT)
        for left in (x + 11, x - 11 - width):
            is_free = all(left + width < begin or left > end for begin, end in taken)
            if is_free and 0 < left < _WIDTH - width:
                _write(figure, left, bottom - 3, fault, _FONT, va="bottom")
                taken.append((left, left + width))
                break


def _draw_caption(figure: Figure, left_out: int, box: _Box) -> None:
    words = [
        ("log10 RMS", _QUIET),
        ("blue: vanishing", "#7fb0f0"),
        ("red: exploding", "#ff8a70"),
        ("magenta: NaN", "#ff7bff"),
        ("grey: none", "#b0b0b0"),
    ]
    if left_out:
        words = [(f"log10 gradient RMS; {left_out:,} norms and embeddings have no row", _QUIET)]
    x = 10.0
    for text, colour in words:
        _write(figure, x, box.bottom + 33, text, _CAPTION, color=colour)
        x += _width(figure, text, _CAPTION) + 18
