"""Log records, and the parts that all sinks share."""

from __future__ import annotations

import logging
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
        images: Functions that draw a PNG. They are called later and on another thread, so they own their data.
        notes: How to read a tag, in Markdown; shown beside it.
        rows: Vectors, each with a step of its own, for `gradguard report`. No dashboard shows them.
        columns: For each tag of ``rows``, the names of the entries of its vectors.
        edges: For a tag of ``histograms``, its 31 bin edges.
        data: JSON for `gradguard report`. No dashboard shows it.
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


def merge_records(records: Iterable[LogRecord]) -> LogRecord:
    """Return one record with all that records of a step hold, since each that is written costs."""
    parts: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, content in vars(record).items():
            parts.setdefault(name, {}).update(content)
    return LogRecord(**parts)


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


class PictureQueue:
    """Thread that draws the pictures of one output.

    Training does not wait for it. The first drawing that fails is warned of, and the others continue.

    Args:
        output: The output that the pictures are for, for the warning.
    """

    def __init__(self, output: str) -> None:
        # Two, since a drawing that was started without an error may still fail, again and again.
        self._drawing, self._starting = FailSafe(f"Drawing for {output}"), FailSafe(f"Drawing for {output}")
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[tuple[int, str, str, Future[bytes]]] = []

    def start(self, step: int, record: LogRecord) -> None:
        """Start to draw the pictures of a record."""
        if record.images and not self._drawing.is_off:
            self._starting.run(lambda: self._submit(step, record))

    def take(self, *, wait: bool = False) -> Iterator[Picture]:
        """Yield and remove the finished pictures, in order.

        Args:
            wait: Also wait for those that are still being drawn.
        """
        # One thread draws, so they finish in order.
        while self._pending and (wait or self._pending[0][-1].done()):
            step, tag, note, drawing = self._pending.pop(0)
            png = self._drawing.run(drawing.result)
            if png is not None:
                yield Picture(step, tag, note, png)

    def close(self) -> None:
        """End the thread; the next picture starts another."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _submit(self, step: int, record: LogRecord) -> None:
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="gradguard-draw")
        for tag, draw in record.images.items():
            self._pending.append((step, tag, record.notes.get(tag, ""), self._pool.submit(_draw, draw)))


def _draw(draw: Callable[[], bytes]) -> bytes:
    with needed_by("The heat map"):
        png = draw()
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
