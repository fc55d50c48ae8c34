"""`GradGuard(trials=True)` checks the model on the first batch, and warns once of problems."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard import GradGuard, GradientWarning, checkup


class Model(L.LightningModule):
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


def fit(model, epochs=1, **options):
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
    model = Model(nn.Sigmoid, 12)
    guard, said = fit(model, epochs=2, trials=True)
    assert len(said) == 1
    assert "gradients over depth" in said[0]
    assert not guard.checkup.ok
    assert model.calls == 12


def test_no_warning_without_a_problem_or_without_trials():
    guard, said = fit(Model(), trials=True)
    assert guard.checkup.ok
    assert said == []
    guard, said = fit(Model(nn.Sigmoid, 12))
    assert guard.checkup is None
    assert said == []


def test_no_checkup_if_the_training_step_cannot_be_run_alone():
    guard, said = fit(Model(by_hand=True), trials=True)
    assert guard.checkup is None
    assert said == []


def test_the_training_is_bit_identical_with_and_without():
    results = []
    for trials in (False, True):
        model = Model(depth=2)
        torch.manual_seed(1)
        fit(model, trials=trials)
        results.append(([t.clone() for t in model.state_dict().values()], torch.rand(3)))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(("activation", "depth", "ok"), [(nn.ReLU, 4, True), (nn.Sigmoid, 12, False)])
def test_a_lightning_module_needs_no_trainer(activation, depth, ok):
    model = Model(activation, depth)
    assert checkup(model, next(iter(model.train_dataloader()))).ok == ok
    assert model.calls == 0
