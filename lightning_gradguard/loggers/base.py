"""What is shown of one step, a `LogRecord`: numbers, histograms, texts, pictures. Who shows it: a `LogSink`."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from lightning_gradguard.results import GradientWarning

_log = logging.getLogger(__name__)
#: Loggers of which nothing is to be said any more; two callbacks may write to the same.
TOLD: weakref.WeakSet[Any] = weakref.WeakSet()


T = TypeVar("T")

#: Errors in a row after which an output is given up.
PATIENCE = 5


@dataclass(frozen=True)
class LogRecord:
    """What is shown of one step. All keys are tags, ``group/name``.

    Attributes:
        scalars: Numbers; NaN is shown as a gap with a mark, infinity as NaN.
        histograms: 30 counts each, on the axis `lightning_gradguard.stats.histogram.EDGES`, or that in ``edges``.
        texts: Markdown, each standing for the whole run so far.
        images: Functions that draw a PNG; called later and on another thread, so they own their data.
        notes: How to read a tag, in Markdown; shown beside it.
        rows: Vectors, each with a step of its own: kept in the file for `lightning_gradguard.report`, in a form
            that no dashboard shows.
        columns: For each tag of ``rows``, what the entries of its vectors are.
        edges: For a tag of ``histograms``, its 31 bin edges.
    """

    scalars: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Sequence[tuple[int, Sequence[float]]]] = field(default_factory=dict)
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)


class LogSink(Protocol):
    """Shows panels. It never raises: what cannot be shown is said once, and training goes on."""

    def write(self, step: int, panel: LogRecord) -> None:
        """Shows a panel, at this step on the x axis."""

    def close(self) -> None:
        """Finishes what is pending; the sink may be written to again."""


class FailSafe:
    """Keeps errors of an output away from the training.

    The first is warned of, the later ones are silent; after `PATIENCE` in a row nothing more is tried.

    Args:
        name: The output, for the warning.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0
        self._warned = False

    @property
    def blown(self) -> bool:
        """Whether the output has been given up."""
        return self._failures >= PATIENCE

    def run(self, action: Callable[[], T]) -> T | None:
        """What ``action`` returns; None if it raises, which goes no further, or if all is given up."""
        if self.blown:
            return None
        try:
            result = action()
        except Exception as error:
            self._failures += 1
            self._warn(error)
            return None
        self._failures = 0
        return result

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._name} failed ({type(error).__name__}: {error}). Training goes on. Later errors "
                f"are not reported; after {PATIENCE} in a row nothing more is tried.",
                GradientWarning,
                stacklevel=4,
            )


class LoggerSink:
    """Sends the scalars of a panel to any logger; says once what that logger cannot show.

    Args:
        logger: Has ``log_metrics(metrics, step=...)``.
    """

    #: What of a panel is shown, and what is not, in words.
    shows: ClassVar[str] = "scalars"
    lacks: ClassVar[str] = "histograms and heat map"

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self._name = type(logger).__name__
        self._fuse = FailSafe(f"{self._name} output")

    def write(self, step: int, panel: LogRecord) -> None:
        """Logs what the logger can show of a panel.

        Args:
            step: Position on the x axis.
            panel: What to show.
        """
        if panel.scalars:
            self._fuse.run(lambda: self.logger.log_metrics(dict(panel.scalars), step=step))
        if self.lacks_some_of(panel) and self.logger not in TOLD:
            TOLD.add(self.logger)
            _log.warning(
                "%s shows gradguard's %s; its %s need TensorBoard: Trainer(logger=[..., TensorBoardLogger(...)]).",
                self._name,
                self.shows,
                self.lacks,
            )

    def lacks_some_of(self, panel: LogRecord) -> bool:
        """Whether a panel holds something that this logger cannot show."""
        return bool(panel.histograms or panel.images)

    def close(self) -> None:
        """Nothing is pending."""
