"""Mistakes that the graph of a loss shows: said once in a training, and blamed for what follows at any optimizer."""

import logging
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn import functional as F

from lightning_gradguard import Cause, GradGuard, GradientWarning, Policy
from lightning_gradguard.html_report.render import write_report

X = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))


class Net(L.LightningModule):
    """Regression by one net, or by a body and a head with an optimizer each."""

    def __init__(self, loss, parts=1, scale=1.0):
        super().__init__()
        self.automatic_optimization = parts == 1
        torch.manual_seed(0)
        self.body, self.head, self.loss = nn.Linear(8, 16), nn.Linear(16, 4), loss
        with torch.no_grad():
            self.head.weight.mul_(scale)

    def loss_of(self, batch):
        return self.loss(self.head(self.body(batch[0]).relu()), batch[0])

    def training_step(self, batch, _):
        if self.automatic_optimization:
            return self.loss_of(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss_of(batch))
            optimizer.step()
        return None

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.Adam(self.parameters(), 1e-3)
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.body, self.head)]


def out_of_range(output, x):
    return F.mse_loss(output.tanh(), 9 + x[:, :4])


def labels(output, x):
    return F.cross_entropy(output, x[:, :4].argmax(1))


def said_of(module, guard, x=X, steps=3):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=32)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        L.Trainer(
            max_steps=steps,
            logger=False,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[guard],
        ).fit(module, loader)
    return [str(w.message) for w in seen if issubclass(w.category, GradientWarning)]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("loss", "scale", "words"),
    [(out_of_range, 1.0, "cannot reach them"), (labels, 300.0, "times that of equal odds for 4 classes")],
)
def test_a_mistake_in_the_first_loss_is_said_once(loss, scale, words, parts):
    said = said_of(Net(loss, parts, scale), GradGuard())
    assert sum(words in text for text in said) == 1
    assert all("Fix to try first: " in text for text in said if words in text)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_first_loss_without_a_mistake_is_quiet(parts):
    assert not said_of(Net(labels, parts), GradGuard())


def test_large_inputs_are_blamed_for_large_outputs():
    (text,) = (t for t in said_of(Net(labels), GradGuard(), 300 * X) if "equal odds" in t)
    assert "cause: unnormalized_input" in text


def test_the_check_up_and_the_first_loss_do_not_say_it_twice():
    said = said_of(Net(out_of_range), GradGuard(policy=Policy.strict(), trials=True))
    assert sum("cannot reach them" in text for text in said) == 1


class Rivals(L.LightningModule):
    """Two nets against each other; the gradients of the first are never zeroed."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.first, self.second = (
            nn.Linear(8, 1),
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)),
        )
        self.steps = 0

    def training_step(self, batch, _):
        first, second = self.optimizers()
        self.steps += 1
        self.manual_backward(self.first(batch[0]).square().mean())
        first.step()
        second.zero_grad()
        if self.steps == 40:  # its units die, as those of a generator that has lost do
            self.second[0].bias.data.fill_(-100.0)
        self.manual_backward((self.second(batch[0]) - 1).square().mean() + 1.0)
        second.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 1e-3) for part in (self.first, self.second)]


def test_gradients_that_one_optimizer_never_zeroes_explain_what_befalls_another():
    guard = GradGuard()
    said = said_of(Rivals(), guard, X.repeat(8, 1), steps=240)
    assert sum("never zeroed" in text for text in said) == 1
    of_second = [f for f in guard.findings if any(n.startswith("second") for n in f.parameters)]
    assert of_second
    assert guard.diagnosis.causes[0] == Cause.STALE_GRADIENTS
    assert "Zero the gradients" in guard.diagnosis.remedies[0].name


class Halves(L.LightningModule):
    """Backbone under ``no_grad``, by mistake, and a head; both in one optimizer, or in one each."""

    def __init__(self, parts):
        super().__init__()
        self.automatic_optimization, self.parts = parts == 1, parts
        torch.manual_seed(0)
        self.backbone, self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 4)

    def loss_of(self, batch):
        with torch.no_grad():
            h = self.backbone(batch[0])
        return labels(self.head(h), batch[0])

    def training_step(self, batch, _):
        if self.automatic_optimization:
            return self.loss_of(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss_of(batch))
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.Adam(self.parameters(), 1e-3)
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.backbone, self.head)]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_backbone_without_gradients_is_no_teacher(parts):
    guard = GradGuard()
    said = said_of(Halves(parts), guard, X.repeat(8, 1), steps=60 * parts)
    assert any("disconnected" in text and "backbone" in text for text in said)


def test_a_mistake_is_in_the_table_at_the_end_and_in_tensorboard(tmp_path, caplog):
    guard, logger = GradGuard(), TensorBoardLogger(tmp_path)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=32)
    with caplog.at_level(logging.INFO, "lightning_gradguard"), pytest.warns(GradientWarning):
        L.Trainer(
            max_steps=8,
            logger=logger,
            log_every_n_steps=1,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[guard],
        ).fit(Net(out_of_range), loader)
    table = " ".join(caplog.text.split())
    assert "mistake The outputs come from a tanh" in table
    (sheet,) = write_report([Path(logger.log_dir)], tmp_path / "report.html")
    assert sheet.verdict.title == "Finished: a mistake in the code"
    page = (tmp_path / "report.html").read_text()
    assert "cannot reach them" in page
    assert "Healthy" not in page
