"""The page of a real diagnosis, opened from disk in a browser."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradientHalt, Policy

WIDTH = 16


class Deep(pl.LightningModule):
    def __init__(self, layers, activation):
        super().__init__()
        blocks = [part for _ in range(layers - 1) for part in (nn.Linear(WIDTH, WIDTH), activation())]
        self.net = nn.Sequential(*blocks, nn.Linear(WIDTH, 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def diagnosed(layers, activation=nn.Sigmoid, with_nan=False):
    """Return the diagnosis that ends this training."""
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH)
    x[40:] = torch.nan if with_nan else x[40:]
    trainer = pl.Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=False,
        callbacks=[GradGuard(policy=Policy.strict(), trials=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data = DataLoader(TensorDataset(x, x[:, :1] - x[:, 1:2]), 8)
    with warnings.catch_warnings(), pytest.raises(GradientHalt) as halt:
        warnings.simplefilter("ignore")
        trainer.fit(Deep(layers, activation), data)
    return halt.value.diagnosis


def written(diagnosis):
    path = Path("diagnosis.html")
    path.write_text(diagnosis.to_html(), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_training_that_vanishes(opened, scheme):
    diagnosis = diagnosed(8)
    page = opened(written(diagnosis), scheme=scheme)
    assert "Gradients vanish" in page.locator("h1").inner_text()
    heat = page.locator("svg.heat")
    assert heat.locator("image").evaluate("image => image.getBBox().width") > 500
    worst = heat.locator("text.worst").all_text_contents()
    assert diagnosis.parameters[0] in worst
    assert f"▾ since step {diagnosis.step}" in worst
    tried = [remedy for remedy in diagnosis.remedies if remedy.tried]
    assert page.locator(".panels figure").count() == len(tried)
    assert tried[0].name in page.locator(".panels figcaption").first.inner_text()
    assert page.locator(".panels polyline.good").count() >= 1
    # At the input, the profile before lies below the profile with a fix.
    first = page.locator(".panels svg").first
    heights = [
        first.locator(f"polyline.{kind}").evaluate("line => line.points[0].y") for kind in ("before", "good")
    ]
    assert heights[0] > heights[1] + 20
    colours = (
        "getComputedStyle(document.querySelector('svg text')).fill",
        "getComputedStyle(document.documentElement).backgroundColor",
    )
    ink, paper = (sum(map(int, page.evaluate(colour)[4:-1].split(","))) for colour in colours)
    assert (ink < paper - 300) if scheme == "light" else (ink > paper + 300)


def test_the_page_of_a_training_with_nan(opened):
    page = opened(written(diagnosed(3, nn.ReLU, with_nan=True)))
    assert "NaN" in page.locator("h1").inner_text()
    assert page.locator(".legend").first.inner_text().count("NaN or Inf") == 1
    assert page.locator(".panels").count() == 0
    assert page.locator("svg.heat rect.skipped").count() >= 1


@pytest.mark.parametrize("width", [375, 768, 1600])
def test_nothing_overflows_sideways(opened, width):
    page = opened(written(diagnosed(12)), width=width)
    sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    assert len(set(page.evaluate(sizes))) == 1
