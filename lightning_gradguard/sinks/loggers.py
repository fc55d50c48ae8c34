"""Finds out what Lightning's loggers, or anything like them, can show; knows them by what they offer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

from lightning_gradguard.sinks.panel import Fuse, Panel, Sink

_log = logging.getLogger(__name__)
#: Loggers of which it has been said what they cannot show; two callbacks may write to the same.
_TOLD: weakref.WeakSet[Any] = weakref.WeakSet()


def open_sinks(loggers: Iterable[Any]) -> list[Sink]:
    """A sink for each logger that can show something.

    Args:
        loggers: Objects with an ``experiment`` and ``log_metrics(metrics, step=...)``, such as
            ``trainer.loggers``. One whose experiment has a file writer is TensorBoard. The dummies that
            Lightning gives to ranks above 0 get no sink.
    """
    sinks = (_open(logger) for logger in loggers)
    return [sink for sink in sinks if sink is not None]


class LoggerSink:
    """Sends the scalars of a panel to any logger; says once what that logger cannot show.

    Args:
        logger: Has ``log_metrics(metrics, step=...)``.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._name = type(logger).__name__
        self._fuse = Fuse(f"{self._name} output")

    def write(self, step: int, panel: Panel) -> None:
        """Logs the scalars of a panel.

        Args:
            step: Position on the x axis.
            panel: What to show.
        """
        if panel.scalars:
            self._fuse.run(lambda: self._logger.log_metrics(dict(panel.scalars), step=step))
        if (panel.histograms or panel.images) and self._logger not in _TOLD:
            _TOLD.add(self._logger)
            _log.warning(
                "%s shows gradguard's scalars; its histograms and heat map need TensorBoard: "
                "Trainer(logger=[..., TensorBoardLogger(...)]).",
                self._name,
            )

    def close(self) -> None:
        """Nothing is pending."""


def _open(logger: Any) -> Sink | None:
    found: list[Sink] = []
    # Opening an experiment creates folders and files, which can fail.
    Fuse(f"{type(logger).__name__} output").run(lambda: found.extend(_probe(logger)))
    return found[0] if found else None


def _probe(logger: Any) -> list[Sink]:
    experiment = logger.experiment
    get_file_writer = getattr(experiment, "_get_file_writer", None)
    if get_file_writer is None:
        return [LoggerSink(logger)]
    # Not before it is needed: an installation without TensorBoard has no such logger.
    from lightning_gradguard.sinks.tensorboard import TensorBoardSink

    # A dummy experiment answers to every name, and with nothing.
    return [TensorBoardSink(experiment)] if hasattr(get_file_writer(), "add_summary") else []
