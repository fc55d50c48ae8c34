"""Whole training with everything on.

The files that it leaves are checked too.
"""

import io
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, GradientHalt, Policy, SpikeClip

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
SCALARS = {
    "clip_scale", "depth_tilt_decades", "nonfinite_total", "total_norm_log10", "update_ratio_log10",
    "worst_layer_rms_log10", "clip_rate", "grad_norm", "grad_norm_clipped", "threshold_log10",
    "clipped_total", "skipped_total",
}  # fmt: skip


class Classifier(pl.LightningModule):
    def __init__(self, activation=nn.ReLU, depth=5):
        super().__init__()
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), activation())]
        self.net = nn.Sequential(*layers, nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(corrupt=False, batches=100):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * 16, 16, generator=generator)
    y = (x.sum(1) > 0).long()
    if corrupt:
        x[16 * 60 + 3] = math.nan
        x[16 * 80 + 3] *= 1e4
        y[16 * 80 + 3] = 1 - y[16 * 80 + 3]
    return DataLoader(TensorDataset(x, y), batch_size=16)


def trainer(logger, *callbacks):
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=5,
    )  # fmt: skip


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def protected(tmp_path_factory):
    """Return a run with two faults.

    NaN at step 60, and a corrupt batch at step 80.
    """
    logger = TensorBoardLogger(tmp_path_factory.mktemp("runs"), name="", version="")
    guard = GradGuard(clipper=SpikeClip(), per_layer=True)
    module = Classifier()
    trainer(logger, GradHistogram(every_n_steps=20), guard).fit(module, data(corrupt=True))
    return module, guard, events(logger.log_dir)


def test_the_run_survives(protected):
    module, guard, _ = protected
    assert all(p.isfinite().all() for p in module.parameters())
    assert guard.summary == {"judged": 100, "clipped": guard.summary["clipped"], "skipped": 1, "nonfinite": 1}
    assert [(f.fault.value, f.step) for f in guard.findings] == [("nonfinite", 60), ("spike", 80)]


def test_the_overview_has_few_cards(protected):
    written = protected[2]
    tags = [t for t in written.Tags()["scalars"] if t.startswith("gradguard/")]
    assert {t.removeprefix("gradguard/") for t in tags} == SCALARS
    assert written.Tags()["images"] == ["0_gradguard/heatmap"]


def test_scalars_stand_where_lightnings_own_do(protected):
    written = protected[2]
    own = [e.step for e in written.Scalars("loss")]
    ours = [e.step for e in written.Scalars("gradguard/total_norm_log10")]
    assert ours == sorted({*own, 0, 1, 2, 5, 10, 20, 50})


def test_what_is_logged_is_what_was_done(protected):
    written = protected[2]
    last = written.Scalars("gradguard/nonfinite_total")[-1]
    assert last.value == 1
    assert all(0 <= e.value <= 1 for e in written.Scalars("gradguard/clip_scale"))
    assert all(-4 < e.value < 2 for e in written.Scalars("gradguard/total_norm_log10"))
    series = {t: {e.step: e.value for e in written.Scalars(f"gradguard/{t}")} for t in sorted(SCALARS)}
    for step, norm in series["grad_norm_clipped"].items():
        # Step 0 has no threshold: there is no past to compare it with.
        assert math.log10(norm) <= series["threshold_log10"].get(step, math.inf) + 1e-5
        assert step in series["threshold_log10"] or step == 0
        assert math.log10(series["grad_norm"][step]) == pytest.approx(
            series["total_norm_log10"][step], abs=1e-5
        )
        ratio = norm / series["grad_norm"][step]
        assert ratio == pytest.approx(series["clip_scale"][step], rel=1e-3)
    taken = protected[1].summary
    assert written.Scalars("gradguard/clip_rate")[-1].value == pytest.approx(
        taken["clipped"] / (taken["judged"] - taken["skipped"])
    )
    assert all(-5 < e.value < 0 for e in written.Scalars("gradguard/update_ratio_log10"))


def test_the_picture_is_a_picture(protected):
    written = protected[2]
    image = Image.open(io.BytesIO(written.Images("0_gradguard/heatmap")[-1].encoded_image_string))
    assert image.size == (730, 430)
    assert len(image.convert("RGB").getcolors(10**6)) > 100


def test_findings_and_layers_are_there(protected):
    written = protected[2]
    text = tensor_util.make_ndarray(written.Tensors("gradguard/diagnosis")[-1].tensor_proto)[()].decode()
    assert "nonfinite" in text
    assert "spike" in text
    layers = [t for t in written.Tags()["scalars"] if t.startswith("gradguard_rms_log10/")]
    assert len(layers) == 12


def test_a_halted_run_has_its_diagnosis_and_picture_on_disk(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    guard = GradGuard(policy=Policy.strict())
    with pytest.raises(GradientHalt):
        trainer(logger, guard).fit(Classifier(nn.Sigmoid, 12), data())
    written = events(logger.log_dir)
    assert "0_gradguard/heatmap" in written.Tags()["images"]
    text = tensor_util.make_ndarray(written.Tensors("gradguard/diagnosis")[-1].tensor_proto)[()].decode()
    assert guard.diagnosis.remedies[0].name in text


def test_another_logger_gets_the_scalars(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(logger, GradGuard(clipper=SpikeClip())).fit(Classifier(), data(batches=20))
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"gradguard/{name}" for name in SCALARS} <= set(header)


class Broken:
    """File writer whose disk is full."""

    def add_summary(self, *_):
        raise OSError(28, "No space left on device")

    def flush(self):
        pass


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    logger.experiment._get_file_writer = Broken
    logger.log_metrics = lambda *_, **__: None
    guard = GradGuard()
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        trainer(logger, guard).fit(Classifier(), data())
    assert len([w for w in caught if "No space left" in str(w.message)]) == 1
    assert guard.summary["judged"] == 100
