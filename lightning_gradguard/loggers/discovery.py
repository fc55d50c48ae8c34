"""Finds out what Lightning's loggers, or anything like them, can show; knows them by what they offer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_gradguard.loggers.base import TOLD, FailSafe, LoggerSink, LogSink
from lightning_gradguard.loggers.wandb_mlflow import MlflowSink, WandbSink

#: By the package that an experiment's class is from.
_SINKS = {"wandb": WandbSink, "mlflow": MlflowSink}


def open_sinks(loggers: Iterable[Any]) -> list[LogSink]:
    """A sink for each logger that can show something.

    Args:
        loggers: Objects with an ``experiment`` and ``log_metrics(metrics, step=...)``, such as
            ``trainer.loggers``. One whose experiment has a file writer is TensorBoard, or tensorboardX; those of
            W&B and MLflow are known by their package. The dummies that Lightning gives to ranks above 0 get no sink.
    """
    sinks = [sink for sink in map(_open, loggers) if sink is not None]
    if not all(isinstance(sink, LoggerSink) for sink in sinks):
        # What one of them lacks, TensorBoard shows beside it.
        TOLD.update(sink.logger for sink in sinks if isinstance(sink, LoggerSink))
    return sinks


def _open(logger: Any) -> LogSink | None:
    found: list[LogSink] = []
    # Opening an experiment creates folders and files, which can fail.
    FailSafe(f"{type(logger).__name__} output").run(lambda: found.extend(_probe(logger)))
    return found[0] if found else None


def _probe(logger: Any) -> list[LogSink]:
    # A logger of one's own need not have one.
    experiment = getattr(logger, "experiment", None)
    get_file_writer = getattr(experiment, "_get_file_writer", None)
    if get_file_writer is not None:
        # Not before it is needed: an installation without TensorBoard has no such logger.
        from lightning_gradguard.loggers.tensorboard import TensorBoardSink

        # A dummy experiment answers to every name, and with nothing.
        return [TensorBoardSink(experiment)] if hasattr(get_file_writer(), "add_summary") else []
    package = type(experiment).__module__.partition(".")[0]
    return [_SINKS.get(package, LoggerSink)(logger)]
