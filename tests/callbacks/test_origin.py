"""Sources of non-finite steps are traced.

This works with and without trials, and does not change the training.
"""

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_gradguard import GradGuard, GradientHalt, GradientWarning, Policy


class Model(L.LightningModule):
    """Net for 40 batches.

    Those in ``spoiled`` hold NaN.
    """

    def __init__(self, spoiled=(), root=False, by_hand=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 4)
        )
        self.spoiled, self.root, self.calls = spoiled, root, 0
        self.automatic_optimization = not by_hand

    def training_step(self, batch, batch_idx):
        self.calls += 1
        x, y = batch
        out = self.net(x)
        loss = F.cross_entropy(out, y)
        if self.root and batch_idx >= 5:
            loss = loss + (out * 0).sum(1).sqrt().mean()
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        batches = []
        for i in range(40):
            x = torch.randn(16, 8, generator=generator)
            if i in self.spoiled:
                x[[3, 7], 1] = torch.nan
            batches.append((x, torch.randint(4, (16,), generator=generator)))
        return torch.utils.data.DataLoader(batches, batch_size=None)


def fit(model, **options):
    trainer_options = options.pop("trainer", {})
    guard = GradGuard(**options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        enable_checkpointing=False,
        callbacks=[guard],
        **quiet,
        **trainer_options,
    )
    trainer.fit(model)
    return guard


@pytest.mark.parametrize("trials", [False, True])
def test_the_halt_names_the_batch_and_its_rows(trials):
    with pytest.raises(GradientHalt) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientWarning)
        fit(Model(spoiled=(7,)), policy=Policy.strict(), trials=trials)
    assert "Batch 7 contains bad data: `batch[0]` holds NaN in rows 3, 7." in caught.value.diagnosis.signs
    assert caught.value.diagnosis.causes[0].value == "bad_data"


def test_the_halt_names_the_operation_and_its_line():
    with pytest.raises(GradientHalt, match=r"`SqrtBackward0` in the training step at .*test_origin.py:\d+"):
        fit(Model(root=True), policy=Policy.strict())


def test_the_first_warning_names_it_and_only_the_first_replays():
    model = Model(spoiled=(7, 20))
    with pytest.warns(GradientWarning) as caught:
        guard = fit(model)
    said = [str(w.message) for w in caught if "nonfinite" in str(w.message)]
    assert "Batch 7 contains bad data: `batch[0]` holds NaN in rows 3, 7." in said[0]
    assert guard.summary["skipped"] == 2
    assert model.calls == 40  # a replay leaves no trace in the module


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
def test_the_training_is_bit_identical_with_and_without_a_replay(monkeypatch):
    results = []
    for silent in (True, False):
        model = Model(spoiled=(7, 8, 20))
        torch.manual_seed(1)
        fit(model, policy=Policy(respond={"nonfinite": "ignore" if silent else "warn"}))
        results.append(([t.clone() for t in model.state_dict().values()], torch.rand(3)))
    same = [torch.equal(a, b) or a.isnan().any() for a, b in zip(results[0][0], results[1][0], strict=True)]
    assert all(same)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("options", [{"lag": 1}, {"trainer": {"accumulate_grad_batches": 2}}])
def test_steps_that_cannot_be_replayed_are_not(options):
    with pytest.warns(GradientWarning) as caught:
        fit(Model(spoiled=(7,)), **options)
    said = next(str(w.message) for w in caught if "nonfinite since" in str(w.message))
    assert ("Batch 7" in said) == (options.get("lag") is None)


def test_with_manual_optimization_the_batch_is_searched():
    with pytest.raises(GradientHalt, match=r"The batch contains bad data: .* rows 3, 7"):
        fit(Model(spoiled=(7,), by_hand=True), policy=Policy.strict())
