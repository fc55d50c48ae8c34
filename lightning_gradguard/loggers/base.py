"""Log records, and the parts that all sinks share."""

from __future__ import annotations

import logging
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from lightning_gradguard.extras import MissingPackage, needed_by
from lightning_gradguard.results import GradientWarning

T = TypeVar("T")

#: Failures in a row after which an output is switched off.
PATIENCE = 5

#: Seconds from the first record to the first picture, and to an urgent one; number of urgent pictures; and by how much
#: longer than a drawing the rest is that follows it.
FIRST, SOON, URGENT, REST = 10.0, 2.0, 3, 100

_log = logging.getLogger(__name__)
# Loggers for which no notice is due any more; two callbacks may write to the same logger.
_INFORMED: weakref.WeakSet[Any] = weakref.WeakSet()
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class LogRecord:
    """Everything that is logged of one step.

    All keys are tags, ``group/name``.

    Attributes:
        scalars: Numbers. NaN is shown as a gap with a mark, infinity as NaN.
        histograms: 30 counts each, on the axis `lightning_gradguard.stats.histogram.EDGES` or that in ``edges``.
        texts: Markdown, each about the whole run so far.
        images: Functions that draw a PNG. They are called later and on another thread, so they own their data. One may
            never be called, if a newer one of the same tag replaces it.
        notes: How to read a tag, in Markdown; shown beside it.
        rows: Vectors, each with a step of its own, for `gradguard report`. No dashboard shows them.
        columns: For each tag of ``rows``, the names of the entries of its vectors.
        edges: For a tag of ``histograms``, its 31 bin edges.
        data: JSON for `gradguard report`. No dashboard shows it.
        is_urgent: True if the images show something that somebody should see soon.
    """

    scalars: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Sequence[tuple[int, Sequence[float]]]] = field(default_factory=dict)
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    is_urgent: bool = False


def merge_records(records: Iterable[LogRecord]) -> LogRecord:
    """Return one record with all that records of a step hold, since each that is written costs."""
    parts: dict[str, dict[str, Any]] = {}
    is_urgent = False
    for record in records:
        is_urgent |= record.is_urgent
        for name, content in vars(record).items():
            if name != "is_urgent":
                parts.setdefault(name, {}).update(content)
    return LogRecord(**parts, is_urgent=is_urgent)


class LogSink(Protocol):
    """A place that shows log records.

    It never raises. It warns once about what fails, and training continues.
    """

    def write(self, step: int, record: LogRecord) -> None:
        """Show a record at this step."""

    def close(self) -> None:
        """Finish what is pending; writing may go on."""


class FailSafe:
    """Guard of training against errors of an output.

    The first error is warned of, later ones are silent. After `PATIENCE` errors in a row the output is switched off.

    Args:
        name: The output, for the warning.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0
        self._warned = False

    @property
    def is_off(self) -> bool:
        """True once the output has been switched off."""
        return self._failures >= PATIENCE

    def run(self, action: Callable[..., T], *arguments: Any) -> T | None:
        """Call ``action`` and catch its errors.

        Args:
            action: Writes to the output. It is not called once the output is off.
            *arguments: What it is called with.

        Returns:
            What ``action`` returns; None if it raised or was not called.
        """
        if self.is_off:
            return None
        try:
            result = action(*arguments)
        except Exception as error:
            self._failures += 1
            if not self._warned:
                self._warned = True
                # What is missing is said with the command that installs it, which is all there is to know.
                what = f"{error}" if isinstance(error, MissingPackage) else f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"{self._name} failed: {what}. Training continues. Later errors of this "
                    f"output are not shown; after {PATIENCE} in a row it is switched off.",
                    GradientWarning,
                    stacklevel=3,
                )
            return None
        self._failures = 0
        return result


class Picture(NamedTuple):
    """A picture that has been drawn.

    Attributes:
        step: The step that it shows.
        tag: Its tag.
        note: How to read it.
        png: The file.
    """

    step: int
    tag: str
    note: str
    png: bytes


class _Drawing(NamedTuple):
    """A picture that waits to be drawn, or is being drawn."""

    step: int
    tag: str
    note: str
    draw: Callable[[], bytes]
    is_urgent: bool


class PictureQueue:
    """Thread that draws the pictures of one output, rarely.

    Training does not wait for the thread. But drawing holds Python's lock, and nearly stops a training of short steps
    for as long as it takes. So the first picture is drawn `FIRST` seconds after the first record, and after each the
    thread rests for `REST` times as long as it drew, which is 1 % of the time. An urgent picture is drawn `SOON`
    seconds after the drawing before it, `URGENT` times. A picture that waits is replaced by a newer one of its tag.

    The clock decides only when a picture is drawn, never what it shows.

    The first drawing that fails is warned of, and the others continue.

    Args:
        output: The output that the pictures are for, for the warning.
        clock: Returns seconds, from any start.
    """

    def __init__(self, output: str, clock: Callable[[], float] = time.monotonic) -> None:
        # Two, since a drawing that was started without an error may still fail, again and again.
        self._drawing, self._starting = FailSafe(f"Drawing for {output}"), FailSafe(f"Drawing for {output}")
        self._clock = clock
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: dict[str, _Drawing] = {}  # by tag, the one that has waited longest first
        self._current: tuple[_Drawing, Future[bytes]] | None = None
        # When any picture may be drawn, and when an urgent one; infinite before the first record.
        self._due = self._due_soon = math.inf
        self._urgent_left = URGENT

    def start(self, step: int, record: LogRecord) -> None:
        """Add the pictures of a record; start to draw one if it is time."""
        if self._due == math.inf:
            now = self._clock()
            self._due, self._due_soon = now + FIRST, now + SOON
        for tag, draw in record.images.items():
            older = self._waiting.get(tag)
            is_urgent = record.is_urgent or (older is not None and older.is_urgent)
            self._waiting[tag] = _Drawing(step, tag, record.notes.get(tag, ""), draw, is_urgent)
        if self._waiting and self._current is None:
            self._start_next(wait=False)

    def take(self, *, wait: bool = False) -> Iterator[Picture]:
        """Yield and remove the finished pictures, in the order in which they were drawn.

        Args:
            wait: Draw all that wait, whatever the time, and wait for them.
        """
        while self._current is not None or (wait and self._waiting):
            if self._current is None:
                self._start_next(wait=True)
                continue
            (step, tag, note, *_), drawing = self._current
            if not wait and not drawing.done():
                return
            self._current = None
            png = self._drawing.run(drawing.result)
            if png is not None:
                yield Picture(step, tag, note, png)

    def close(self) -> None:
        """End the thread; the next picture starts another."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _start_next(self, wait: bool) -> None:
        """Start to draw one of the waiting pictures, if it is time or the caller waits for all."""
        if self._drawing.is_off or self._starting.is_off:
            self._waiting.clear()
            return
        now = self._clock()
        urgent = [tag for tag, picture in self._waiting.items() if picture.is_urgent]
        if wait or now >= self._due:
            tag = next(iter(self._waiting))
        elif urgent and self._urgent_left and now >= self._due_soon:
            tag, self._urgent_left = urgent[0], self._urgent_left - 1
        else:
            return
        self._starting.run(self._submit, self._waiting.pop(tag))

    def _submit(self, picture: _Drawing) -> None:
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="gradguard-draw")
        self._current = picture, self._pool.submit(self._draw, picture.draw)

    def _draw(self, draw: Callable[[], bytes]) -> bytes:
        begun = self._clock()
        try:
            with needed_by("The heat map"):
                png = draw()
        finally:
            ended = self._clock()
            self._due, self._due_soon = ended + REST * (ended - begun), ended + SOON
        if not png.startswith(_PNG_SIGNATURE):
            raise ValueError("the drawing is not a PNG")
        return png


class LoggerSink:
    """Sink that sends scalars to any logger.

    One notice lists what the logger cannot show.

    Args:
        logger: Has ``log_metrics(metrics, step=...)``.
    """

    #: What this sink shows of a record, and what it cannot show, for the notice.
    shows: ClassVar[str] = "scalars"
    lacks: ClassVar[str] = "histograms and heat map"

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.name = type(logger).__name__
        self._scalars = FailSafe(f"{self.name} output")

    def write(self, step: int, record: LogRecord) -> None:
        """Log the scalars of a record."""
        if record.scalars:
            self._scalars.run(lambda: self.logger.log_metrics(dict(record.scalars), step=step))
        if self.lacks_some_of(record) and self.logger not in _INFORMED:
            self.mute_notice()
            _log.warning(
                "%s shows gradguard's %s. Its %s need TensorBoard: "
                "Trainer(logger=[..., TensorBoardLogger(...)]).",
                self.name,
                self.shows,
                self.lacks,
            )

    def lacks_some_of(self, record: LogRecord) -> bool:
        """Return True if this logger cannot show everything."""
        return bool(record.histograms or record.images)

    def mute_notice(self) -> None:
        """Leave out the notice."""
        _INFORMED.add(self.logger)

    def close(self) -> None:
        """Do nothing: nothing is pending."""
