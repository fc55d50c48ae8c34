"""Log sinks for TensorBoard, W&B, MLflow and others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

from lightning_gradguard.extras import MissingPackage, load
from lightning_gradguard.loggers.base import FailSafe, LoggerSink, LogSink
from lightning_gradguard.loggers.wandb_mlflow import MlflowSink, WandbSink
from lightning_gradguard.results import GradientWarning

#: Package of an experiment's class to the sink for it. A new logger needs one line here.
_SINKS: dict[str, type[LoggerSink]] = {"wandb": WandbSink, "mlflow": MlflowSink}


def open_sinks(loggers: Iterable[Any]) -> list[LogSink]:
    """Open a sink for each logger.

    A logger whose experiment has a TensorBoard file writer gets a `TensorBoardSink`, also with tensorboardX. W&B and
    MLflow are recognized by the package of their experiment. Any other logger gets the scalars. The dummy loggers that
    Lightning gives to ranks above 0 get no sink.

    Args:
        loggers: Objects with ``log_metrics(metrics, step=...)`` and mostly an ``experiment``, such as
            ``trainer.loggers``.

    Returns:
        The sinks, in the order of the loggers. A logger that cannot be opened is left out with a warning.
    """
    sinks: list[LogSink] = []
    for logger in loggers:
        # Opening an experiment creates folders and files, which can fail.
        sink = FailSafe(f"{type(logger).__name__} output").run(partial(_open, logger))
        if sink is not None:
            sinks.append(sink)
    plain = [sink for sink in sinks if isinstance(sink, LoggerSink)]
    if len(plain) < len(sinks):
        # TensorBoard shows what the others cannot.
        for sink in plain:
            sink.mute_notice()
    return sinks


def _open(logger: Any) -> LogSink | None:
    # A logger of one's own need not have an experiment.
    experiment = getattr(logger, "experiment", None)
    get_file_writer = getattr(experiment, "_get_file_writer", None)
    if get_file_writer is None:
        package = type(experiment).__module__.partition(".")[0]
        return _SINKS.get(package, LoggerSink)(logger)
    if not hasattr(get_file_writer(), "add_summary"):
        return None  # a dummy experiment has every attribute, and each call returns nothing
    try:
        # tensorboardX writes without it.
        module = load("lightning_gradguard.loggers.tensorboard", "Everything else")
    except MissingPackage as error:
        warnings.warn(f"{type(logger).__name__} gets scalars only. {error}", GradientWarning, stacklevel=3)
        plain = LoggerSink(logger)
        plain.mute_notice()
        return plain
    sink: LogSink = module.TensorBoardSink(experiment)
    return sink
