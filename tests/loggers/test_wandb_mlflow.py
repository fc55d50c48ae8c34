"""Calls that the sinks make to W&B and MLflow, on stubs; tests/e2e/test_loggers.py uses the packages themselves."""

import sys
import types

import numpy as np
import pytest
from matplotlib.image import imsave

from lightning_gradguard.loggers import open_sinks
from lightning_gradguard.loggers.base import PATIENCE, LogRecord
from lightning_gradguard.loggers.wandb_mlflow import MlflowSink, WandbSink
from lightning_gradguard.stats.histogram import EDGES

COUNTS = [0.0] * 29 + [4.0]
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 4)).astype(np.uint8)


@pytest.fixture
def png(tmp_path):
    imsave(tmp_path / "a.png", PIXELS)
    return (tmp_path / "a.png").read_bytes()


class Experiment:
    """Client that records what it is asked to log."""

    def __init__(self):
        self.asked = []

    def log_text(self, *arguments):
        self.asked.append(arguments)

    def log_image(self, *arguments, **keywords):
        self.asked.append((*arguments, keywords))


class Recording:
    """Logger that records what it is asked to log."""

    run_id = "r"

    def __init__(self, package, error=None):
        self.experiment = type("Client", (Experiment,), {"__module__": f"{package}.client"})()
        self.logged, self.images, self.error = [], [], error

    def log_metrics(self, metrics, step=None):
        if self.error is not None and not all(isinstance(x, float) for x in metrics.values()):
            raise self.error
        self.logged.append((step, metrics))

    def log_image(self, key, images, step=None, caption=()):
        self.images.append((key, images, step, caption))


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.Histogram = lambda np_histogram: ("histogram", *np_histogram)
    module.Html = lambda text: ("html", text)
    monkeypatch.setitem(sys.modules, "wandb", module)


def record_of(png):
    return LogRecord(
        scalars={"g/s": 1.0},
        histograms={"g/h": COUNTS, "g/v": COUNTS},
        texts={"g/t": "a < b"},
        images={"g/i": lambda: png},
        notes={"g/i": "how to read it"},
        edges={"g/v": [float(k) for k in range(31)]},
    )


def test_each_package_has_its_sink():
    loggers = [Recording("wandb.sdk"), Recording("mlflow.tracking"), Recording("comet")]
    assert [type(sink).__name__ for sink in open_sinks(loggers)] == ["WandbSink", "MlflowSink", "LoggerSink"]


def test_wandb_gets_everything(wandb, png, caplog):
    logger = Recording("wandb")
    (sink,) = open_sinks([logger])
    sink.write(3, record_of(png))
    sink.close()
    assert logger.logged[0] == (3, {"g/s": 1.0})
    step, media = logger.logged[1]
    assert step == 3
    for tag, axis in (("g/h", EDGES), ("g/v", range(31))):
        kind, counts, bins = media[tag]
        assert (kind, counts.tolist(), bins.tolist()) == ("histogram", COUNTS, list(axis))
    assert "a &lt; b" in media["g/t"][1]
    ((key, (image,), step, caption),) = logger.images
    assert (key, step, caption) == ("g/i", 3, ["how to read it"])
    assert (image == PIXELS).all()
    assert not caplog.records


def test_mlflow_gets_all_but_histograms_and_a_notice_once(png, caplog):
    logger = Recording("mlflow")
    (sink,) = open_sinks([logger])
    for step in range(3):
        sink.write(step, record_of(png))
        sink.close()
    assert [step for step, _ in logger.logged] == [0, 1, 2]
    texts, images = logger.experiment.asked[::2], logger.experiment.asked[1::2]
    assert texts == [("r", "a < b", "g/t.md")] * 3
    assert [(run, options) for run, _, options in images] == [
        ("r", {"key": "g/i", "step": s}) for s in range(3)
    ]
    assert all((image == PIXELS).all() for _, image, _ in images)
    assert [r.getMessage() for r in caplog.records] == [
        "Recording shows gradguard's scalars, heat map and texts. Its histograms need TensorBoard: "
        "Trainer(logger=[..., TensorBoardLogger(...)])."
    ]


def test_media_that_fail_do_not_stop_the_scalars(wandb, png):
    logger = Recording("wandb", RuntimeError("offline"))
    sink = WandbSink(logger)
    with pytest.warns(UserWarning, match=r"Recording media failed: RuntimeError: offline") as caught:
        for step in range(20):
            sink.write(step, LogRecord(scalars={"g/s": 1.0}, histograms={"g/h": COUNTS}))
    sink.close()
    assert len(caught) == 1
    assert [step for step, _ in logger.logged] == list(range(20))


def test_pictures_are_not_drawn_for_an_output_that_is_off(png):
    logger, drawn = Recording("mlflow"), []
    logger.experiment.log_text = None
    sink = MlflowSink(logger)
    with pytest.warns(UserWarning, match="media failed"):
        for step in range(20):
            sink.write(step, LogRecord(texts={"g/t": "a"}, images={"g/i": lambda: drawn.append(1) or png}))
    sink.close()
    assert len(drawn) < 2 * PATIENCE
