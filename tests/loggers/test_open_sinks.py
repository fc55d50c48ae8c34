import logging

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradguard.loggers import LoggerSink, open_sinks
from lightning_gradguard.loggers.base import PATIENCE, LogRecord
from lightning_gradguard.loggers.tensorboard import TensorBoardSink

RECORD = LogRecord(
    scalars={"gradguard/clip_scale": 0.5}, histograms={"gradguard_hist_log10/000_w": [1.0] * 30}
)


class Recording:
    """Logger with the least that is required."""

    experiment = object()

    def __init__(self, error=None):
        self.logged = []
        self.calls = 0
        self.error = error

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        if self.error is not None:
            raise self.error
        self.logged.append((metrics, step))


def write_fifty(sink):
    for step in range(50):
        sink.write(step, LogRecord(scalars={"a/b": 1.0}))


def test_each_logger_gets_the_sink_that_suits_it(tmp_path):
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path), Recording()]
    assert [type(s) for s in open_sinks(loggers)] == [TensorBoardSink, LoggerSink, LoggerSink]
    for logger in loggers[:2]:
        logger.finalize("success")


def test_no_logger_no_sink():
    assert open_sinks([]) == []


def test_dummies_get_no_sink(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert open_sinks([TensorBoardLogger(tmp_path), DummyLogger()]) == []
    assert not list(tmp_path.iterdir())


def test_tensorboard_logger_end_to_end(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    (sink,) = open_sinks([logger])
    sink.write(7, RECORD)
    sink.close()
    logger.finalize("success")
    seen = EventAccumulator(logger.log_dir).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("gradguard/clip_scale")] == [(7, 0.5)]
    assert len(seen.Tensors("gradguard_hist_log10/000_w")) == 1


def test_any_logger_gets_the_scalars():
    logger = Recording()
    sink = LoggerSink(logger)
    sink.write(7, RECORD)
    sink.write(8, LogRecord())
    sink.close()
    assert logger.logged == [({"gradguard/clip_scale": 0.5}, 7)]


def test_what_a_logger_cannot_show_is_logged_once(caplog):
    sink = LoggerSink(Recording())
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            sink.write(step, RECORD)
    assert [r.getMessage() for r in caplog.records if "TensorBoard" in r.getMessage()] == [
        "Recording shows gradguard's scalars. Its histograms and heat map need TensorBoard: "
        "Trainer(logger=[..., TensorBoardLogger(...)])."
    ]


def test_scalars_alone_need_no_message(caplog):
    LoggerSink(Recording()).write(0, LogRecord(scalars={"a/b": 1.0}))
    assert not caplog.records


# Lightning's TensorBoardLogger turns a full disk into a ValueError.
@pytest.mark.parametrize(
    "error", [OSError("disk full"), ValueError("you tried to log"), RuntimeError("offline")]
)
def test_a_failing_logger_warns_once_and_is_switched_off(error):
    logger = Recording(error)
    sink = LoggerSink(logger)
    with pytest.warns(UserWarning, match="Recording output failed") as caught:
        write_fifty(sink)
    assert len(caught) == 1
    assert logger.calls == PATIENCE


def test_a_logger_that_cannot_be_opened_is_left_out(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="TensorBoardLogger output failed"):
        sinks = open_sinks([TensorBoardLogger(tmp_path / "file"), Recording()])
    assert [type(sink) for sink in sinks] == [LoggerSink]
