"""`GradGuard(trials=True)` checks the model and tries fixes.

Neither changes the training.
"""

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard import GradGuard, GradientHalt, GradientWarning, Policy, checkup


class Model(L.LightningModule):
    """Chain of sigmoids that logs and counts."""

    def __init__(self, activation=torch.sigmoid, form="batch_idx", by_hand=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(12))
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.activation, self.form = activation, form
        self.automatic_optimization = not by_hand
        self.steps, self.seen, self.logged = 0, [], []
        if form == "batch":
            self.training_step = lambda batch: self.compute(batch)

    def compute(self, batch):
        x, y = batch
        self.steps += 1
        self.seen.append(float(x.sum()))
        x = F.dropout(self.norm(x), 0.1)
        for layer in self.layers:
            x = self.activation(layer(x))
        loss = F.cross_entropy(self.head(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"other": loss})
        self.logger.experiment.log_metrics({"direct": float(loss.detach())}, step=self.steps)
        return {"loss": loss, "more": 1} if self.form == "dict" else loss

    def training_step(self, batch, batch_idx):
        assert isinstance(batch_idx, int)
        loss = self.compute(batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3, eps=1e-4)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(64, 16, generator=generator), torch.randint(4, (64,), generator=generator)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)


def fit(tmp_path, model, steps=120, **options):
    torch.manual_seed(1)
    guard = GradGuard(**options)
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name="", version="")
    arguments = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    arguments |= {"max_steps": steps, "max_epochs": -1, "accelerator": "cpu"}
    trainer = L.Trainer(logger=logger, callbacks=[guard], **arguments)
    halt = None
    try:
        trainer.fit(model)
    except GradientHalt as error:
        halt = error
    return halt, guard, trainer


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning", "ignore:.*bottleneck.*")
@pytest.mark.parametrize("form", ["batch_idx", "batch", "dict"])
def test_the_halt_shows_the_table_of_fixes(tmp_path, form):
    halt, guard, _ = fit(tmp_path, Model(form=form), policy=Policy.strict(), trials=True)
    assert halt is not None
    first = halt.diagnosis.remedies[0]
    assert first.tried
    assert first.before > 3 > first.after
    assert "Tried: tilt" in str(halt)
    assert "passes" in str(halt)
    assert guard._batch == (None, 0)


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning", "ignore:.*bottleneck.*")
def test_the_training_is_bit_identical_with_and_without(tmp_path):
    results = []
    for trials in (False, True):
        model = Model()
        _, guard, trainer = fit(tmp_path / str(trials), model, policy=Policy.watch(), trials=trials)
        assert guard.diagnosis is not None
        assert bool(guard.diagnosis.trials) == trials
        state = [*model.state_dict().values()]
        state += [v for s in trainer.optimizers[0].state.values() for v in s.values()]
        plain = model.steps, model.seen, {k: float(v) for k, v in trainer.callback_metrics.items()}
        results.append(
            (state, plain, (tmp_path / str(trials) / "metrics.csv").read_text(), torch.rand(3).tolist())
        )
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert results[0][1:] == results[1][1:]


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning", "ignore:.*bottleneck.*")
def test_with_manual_optimization_the_halt_says_why_nothing_was_tried(tmp_path):
    halt, _, _ = fit(tmp_path, Model(by_hand=True), policy=Policy.strict(), trials=True)
    assert "optimizes by hand" in str(halt)
    assert not any(remedy.tried for remedy in halt.diagnosis.remedies)


def test_trials_must_be_true_or_false():
    with pytest.raises(ValueError, match="trials must be True or False, got 3"):
        GradGuard(trials=3)


class CheckedModel(L.LightningModule):
    def __init__(self, activation=nn.ReLU, depth=4, by_hand=False):
        super().__init__()
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), activation())]
        self.net, self.calls = nn.Sequential(*layers, nn.Linear(8, 4)), 0
        self.automatic_optimization = not by_hand

    def training_step(self, batch, batch_idx):
        self.calls += 1
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        batch = torch.randn(32, 8, generator=generator), torch.randint(4, (32,), generator=generator)
        return torch.utils.data.DataLoader([batch] * 6, batch_size=None)


def fit_checked(model, epochs=1, **options):
    guard = GradGuard(**options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, callbacks=[guard], **quiet
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model)
    said = [str(w.message) for w in caught if issubclass(w.category, GradientWarning)]
    return guard, [message for message in said if "check-up" in message]


def test_a_problem_is_warned_of_once_before_training():
    model = CheckedModel(nn.Sigmoid, 12)
    guard, said = fit_checked(model, epochs=2, trials=True)
    assert len(said) == 1
    assert "gradients over depth" in said[0]
    assert not guard.checkup.ok
    assert model.calls == 12


def test_no_warning_without_a_problem_or_without_trials():
    guard, said = fit_checked(CheckedModel(), trials=True)
    assert guard.checkup.ok
    assert said == []
    guard, said = fit_checked(CheckedModel(nn.Sigmoid, 12))
    assert guard.checkup is None
    assert said == []


def test_no_checkup_if_the_training_step_cannot_be_run_alone():
    guard, said = fit_checked(CheckedModel(by_hand=True), trials=True)
    assert guard.checkup is None
    assert said == []


def test_the_checkup_changes_no_bit_of_the_training():
    results = []
    for trials in (False, True):
        model = CheckedModel(depth=2)
        torch.manual_seed(1)
        fit_checked(model, trials=trials)
        results.append(([t.clone() for t in model.state_dict().values()], torch.rand(3)))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(("activation", "depth", "ok"), [(nn.ReLU, 4, True), (nn.Sigmoid, 12, False)])
def test_a_lightning_module_needs_no_trainer(activation, depth, ok):
    model = CheckedModel(activation, depth)
    assert checkup(model, next(iter(model.train_dataloader()))).ok == ok
    assert model.calls == 0
