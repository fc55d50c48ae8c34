"""Sends scalars to any logger."""

from __future__ import annotations

import logging
import weakref
from typing import Any, ClassVar

from lightning_gradguard.sinks.panel import Fuse, Panel

_log = logging.getLogger(__name__)
#: Loggers of which nothing is to be said any more; two callbacks may write to the same.
TOLD: weakref.WeakSet[Any] = weakref.WeakSet()


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
        self._fuse = Fuse(f"{self._name} output")

    def write(self, step: int, panel: Panel) -> None:
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

    def lacks_some_of(self, panel: Panel) -> bool:
        """Whether a panel holds something that this logger cannot show."""
        return bool(panel.histograms or panel.images)

    def close(self) -> None:
        """Nothing is pending."""
