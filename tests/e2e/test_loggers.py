"""Usual loggers, as real packages, offline.

Their output is read back with their own tools.
"""

import csv
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, GradientWarning
from lightning_gradguard.stats.histogram import EDGES

SCALARS = {
    "grad_norm", "total_norm_log10", "worst_layer_rms_log10", "update_ratio_log10", "clip_scale", "nonfinite_total",
    "clipped_total", "skipped_total",
}  # fmt: skip
HISTOGRAM = "gradguard_hist_log10/net.0.weight"
ELEMENTS = 64  # of that weight
BAD = 12


class Net(pl.LightningModule):
    """Net of two layers.

    The batch of step 12 is NaN, so there is a finding.
    """

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x = batch[0] * (float("nan") if batch_idx == BAD else 1)
        return self.net(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(logger):
    """Train for thirty steps; return the guard.

    Every tenth step is logged.
    """
    guard = GradGuard()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[GradHistogram(every_n_steps=10, exponents=True), guard],
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with pytest.warns(GradientWarning, match="nonfinite since step 12"):
        trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(240, 8)), 8))
    return guard


def notices(caplog):
    return [r.getMessage() for r in caplog.records if "need TensorBoard" in r.getMessage()]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Keep files here and use no network."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow 3 wants to be asked for the plain folder, its one store without a database.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path


def test_csv_has_the_scalars_and_logs_once_what_it_lacks(home, caplog):
    logger = CSVLogger(home)
    guard = train(logger)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    columns = {name.removeprefix("gradguard/") for name in rows[0] if name.startswith("gradguard/")}
    assert columns == SCALARS
    last = [row for row in rows if row["gradguard/skipped_total"]][-1]
    assert float(last["gradguard/skipped_total"]) == guard.summary["skipped"] == 1
    assert "gradguard_exponents/fp16_subnormal" in rows[0]
    assert notices(caplog) == [
        "CSVLogger shows gradguard's scalars. Its histograms and heat map need TensorBoard: "
        "Trainer(logger=[..., TensorBoardLogger(...)])."
    ]


def test_beside_tensorboard_no_notice_is_logged(home, caplog):
    board = TensorBoardLogger(home)
    train([CSVLogger(home), board])
    assert notices(caplog) == []
    seen = EventAccumulator(board.log_dir).Reload().Tags()
    assert HISTOGRAM in seen["tensors"]
    assert "0_gradguard/heatmap" in seen["images"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline_has_scalars_histograms_pictures_and_texts(home, caplog):
    wandb = pytest.importorskip("wandb", reason="needs W&B: pip install wandb")
    logger = WandbLogger(project="p", save_dir=home, offline=True)
    guard = train(logger)
    summary, files = logger.experiment.summary, Path(logger.experiment.dir)
    try:
        assert {f"gradguard/{name}" for name in SCALARS} <= set(summary.keys())
        assert summary["gradguard/skipped_total"] == guard.summary["skipped"] == 1
        histogram = dict(summary[HISTOGRAM])
        assert histogram["_type"] == "histogram"
        assert sum(histogram["values"]) == ELEMENTS
        assert tuple(histogram["bins"]) == EDGES
    finally:
        wandb.finish()
    pictures = list(files.glob("media/images/0_gradguard/heatmap*.png"))
    assert pictures
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    texts = [p.read_text() for p in files.glob("media/html/gradguard/diagnosis*.html")]
    assert any("nonfinite" in text for text in texts)
    assert notices(caplog) == []


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::PendingDeprecationWarning"
)
def test_mlflow_in_a_folder_has_scalars_pictures_and_texts(home, caplog):
    pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow-skinny")
    logger = MLFlowLogger("e", tracking_uri=(home / "mlruns").as_uri())
    guard = train(logger)
    client, run = logger.experiment, logger.run_id
    assert {f"gradguard/{name}" for name in SCALARS} <= client.get_run(run).data.metrics.keys()
    skipped = client.get_metric_history(run, "gradguard/skipped_total")
    assert skipped[-1].value == guard.summary["skipped"] == 1
    images = [entry.path for entry in client.list_artifacts(run, "images")]
    assert any("heatmap" in path and path.endswith(".png") for path in images)
    text = Path(client.download_artifacts(run, "gradguard/diagnosis.md", str(home)))
    assert "**nonfinite**" in text.read_text()
    assert notices(caplog) == [
        "MLFlowLogger shows gradguard's scalars, heat map and texts. Its histograms need TensorBoard: "
        "Trainer(logger=[..., TensorBoardLogger(...)])."
    ]


class TensorboardXLogger(Logger):
    """Logger for tensorboardX, as users write it.

    Lightning uses tensorboardX only without TensorBoard.
    """

    name, version = "x", ""

    def __init__(self, writer):
        self.experiment = writer

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.experiment.add_scalar(name, value, step)

    def log_hyperparams(self, *arguments, **keywords):
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboardx_writes_the_files_that_tensorboard_reads(home, caplog):
    x = pytest.importorskip("tensorboardX", reason="needs tensorboardX: pip install tensorboardX")
    with x.SummaryWriter(str(home / "x")) as writer:
        train(TensorboardXLogger(writer))
    seen = EventAccumulator(str(home / "x"), size_guidance={"tensors": 0}).Reload()
    assert {f"gradguard/{name}" for name in SCALARS} <= set(seen.Tags()["scalars"])
    assert "0_gradguard/heatmap" in seen.Tags()["images"]
    tables = [make_ndarray(event.tensor_proto) for event in seen.Tensors(HISTOGRAM)]
    assert [table[:, 2].sum() for table in tables] == [ELEMENTS] * len({0, 1, 2, 5, 10, 20})
    assert all((table[0, 0], table[-1, 1]) == (EDGES[0], EDGES[-1]) for table in tables)
    text = make_ndarray(seen.Tensors("gradguard/diagnosis")[-1].tensor_proto).item().decode()
    assert "nonfinite" in text
    assert notices(caplog) == []
    assert np.isfinite(seen.Scalars("gradguard/total_norm_log10")[0].value)
