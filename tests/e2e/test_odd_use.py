"""Guards in unusual trainings.

Several guards, closures, other stages, tuners.
"""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradientHalt, NormClip, Policy, SpikeClip

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning"),
    pytest.mark.filterwarnings("ignore:.*training_step.*returned.*None.*"),
    pytest.mark.filterwarnings("ignore:.*checkpoint.*:UserWarning"),
]


class Net(pl.LightningModule):
    """Small classifier.

    Batches in ``bad`` are NaN, and those in ``absent`` have no loss.
    """

    def __init__(self, optimizer=torch.optim.Adam, bad=(), absent=()):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        self.optimizer, self.bad, self.absent, self.lr, self.batch_size = optimizer, bad, absent, 1e-2, 8

    def training_step(self, batch, number):
        return None if number in self.absent else self.loss(batch, number)

    def loss(self, batch, number):
        x = batch[0] * (math.nan if number in self.bad else 1.0)
        return nn.functional.cross_entropy(self.net(x), batch[1])

    def validation_step(self, batch, number):
        self.log("val_loss", self.loss(batch, -1))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return data(size=self.batch_size)

    val_dataloader = train_dataloader


class ByHand(Net):
    """The same with manual optimization and a closure."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.automatic_optimization = False

    def training_step(self, batch, number):
        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch, number)
            self.manual_backward(loss)
            return loss

        optimizer = self.optimizers()
        optimizer.step(closure=closure)


class Shared(Net):
    """Net with a layer that two optimizers train.

    NaN in batch 7 for the second, in batch 8 for the first.
    """

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.other = False, nn.Linear(8, 2)

    def training_step(self, batch, number):
        for index, optimizer in enumerate(self.optimizers()):
            head = (self.net[2], self.other)[index]
            spoilt = math.nan if (number, index) in ((7, 1), (8, 0)) else 1.0
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(head(self.net[:2](batch[0])), batch[1])
            self.manual_backward(loss * spoilt)
            optimizer.step()

    def configure_optimizers(self):
        own = [*self.net[:2].parameters(), *self.other.parameters()]
        return torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.Adam(own, lr=0.01)


def fused(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def scaled():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))


def data(batches=20, size=8):
    x = torch.randn(8 * batches, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=size)


def trainer(folder, *callbacks, **options):
    defaults = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": folder,
        "log_every_n_steps": 5, "num_sanity_val_steps": 0, "limit_val_batches": 2,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def is_sound(module):
    return all(p.isfinite().all() for p in module.parameters())


def test_two_equal_guards_are_refused_by_lightning(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"more than one stateful callback of type `GradGuard`.*must be unique"
    ):
        trainer(tmp_path, GradGuard(), GradGuard()).fit(Net())


@pytest.mark.parametrize("plugins", [None, scaled])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, fused])
def test_two_different_guards_judge_and_resume_both(tmp_path, optimizer, plugins):
    def guards():
        return GradGuard(clipper=NormClip(0.1)), GradGuard(detectors=[])

    plugins = {"plugins": plugins()} if plugins else {}
    (first, second), module = guards(), Net(optimizer, bad=(7,))
    begun = trainer(tmp_path, first, second, **plugins)
    begun.fit(module)
    assert is_sound(module)
    assert first.summary == {"judged": 20, "clipped": 19, "skipped": 1, "nonfinite": 1}
    assert second.summary == {**first.summary, "clipped": 0}
    begun.save_checkpoint(tmp_path / "two.ckpt")
    first, second = guards()
    trainer(tmp_path, first, second, max_epochs=2, **plugins).fit(
        Net(optimizer), ckpt_path=tmp_path / "two.ckpt"
    )
    assert first.summary == {"judged": 40, "clipped": 39, "skipped": 1, "nonfinite": 1}
    assert second.summary["judged"] == 40


def test_parameters_may_belong_to_two_optimizers(tmp_path):
    guard, module = GradGuard(clipper=SpikeClip()), Shared()
    trainer(tmp_path, guard).fit(module)
    assert [(f.step, f.optimizer) for f in guard.findings] == [(15, 1), (16, 0)]
    assert (guard.summary["judged"], guard.summary["skipped"]) == (40, 2)
    assert is_sound(module)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_batches_may_have_no_step(tmp_path, accumulate):
    guard, module = GradGuard(), Net(absent=[n for n in range(20) if n % 3], bad=(9,))
    trainer(tmp_path, guard, accumulate_grad_batches=accumulate).fit(module)
    assert guard.summary["skipped"] == 1
    assert is_sound(module)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.LBFGS, fused])
@pytest.mark.parametrize("kind", [Net, ByHand])
def test_closures_are_judged(tmp_path, kind, optimizer):
    guard, module = GradGuard(), kind(optimizer, bad=(7,))
    trainer(tmp_path, guard).fit(module)
    assert [f.fault for f in guard.findings].count("nonfinite") == guard.summary["skipped"] == 1
    assert guard.summary["judged"] >= 20
    assert is_sound(module)


@pytest.mark.parametrize("kind", [Net, ByHand])
def test_a_halt_in_a_closure_of_lbfgs(tmp_path, kind):
    guard, module = (
        GradGuard(policy=Policy(max_consecutive_skips=2)),
        kind(torch.optim.LBFGS, bad=range(7, 20)),
    )
    with pytest.raises(GradientHalt) as caught:
        trainer(tmp_path, guard).fit(module)
    # A step that is kept from moving is evaluated once.
    assert caught.value.step == 9
    assert is_sound(module)


def test_a_second_fit_starts_anew(tmp_path):
    guard, seen = GradGuard(clipper=SpikeClip()), []
    for _ in range(2):
        trainer(tmp_path, guard).fit(Net(bad=(7,)))
        seen.append((guard.summary, repr(guard.findings), repr(guard.report)))
    assert seen[0] == seen[1]
    assert seen[0][0]["skipped"] == 1


def test_stages_of_one_trainer(tmp_path):
    guard, module = GradGuard(), Net()
    several = trainer(tmp_path, guard)
    several.validate(module, verbose=False)
    several.fit(module)
    assert (guard.summary["judged"], guard.report.step) == (20, 19)
    several.validate(module, verbose=False)
    several.fit_loop.max_epochs = 2
    several.fit(module)
    assert (guard.summary["judged"], guard.report.step) == (20, 39)
    several.save_checkpoint(tmp_path / "later.ckpt")
    # What a checkpoint brought to be validated is none of the next training's.
    guard, module = GradGuard(), Net()
    other = trainer(tmp_path, guard)
    other.validate(module, ckpt_path=tmp_path / "later.ckpt", verbose=False)
    other.fit(module)
    assert (guard.summary["judged"], guard.report.step) == (20, 19)


def test_the_checkpoint_of_a_finished_run(tmp_path):
    whole = trainer(tmp_path, GradGuard(), logger=TensorBoardLogger(tmp_path))
    whole.fit(Net(bad=(7,)))
    whole.save_checkpoint(tmp_path / "done.ckpt")
    guard = GradGuard()
    again = trainer(tmp_path, guard, logger=TensorBoardLogger(tmp_path))
    again.fit(Net(), ckpt_path=tmp_path / "done.ckpt")
    assert (guard.report, guard.findings) == (None, ())
    # It is handed on as it was.
    again.save_checkpoint(tmp_path / "again.ckpt")
    guard = GradGuard()
    trainer(tmp_path, guard, max_epochs=2).fit(Net(), ckpt_path=tmp_path / "again.ckpt")
    assert guard.summary == {"judged": 40, "clipped": 0, "skipped": 1, "nonfinite": 1}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_search_for_learning_rate_or_batch_size_is_not_judged(tmp_path):
    """Leave tuners alone, which raise rates until failure."""
    guard, module = GradGuard(policy=Policy.strict()), Net()
    searching = trainer(tmp_path, guard, enable_checkpointing=True)
    tuner = Tuner(searching)
    assert tuner.lr_find(module, num_training=30, max_lr=1e6).suggestion() is not None
    assert tuner.scale_batch_size(module, max_trials=2) in (4, 8)  # before Lightning 2.5 one trial more
    assert (guard.summary["judged"], guard.findings) == (0, ())
    module.lr, module.batch_size = 1e-2, 8
    searching.fit(module)
    assert guard.summary["judged"] == 20
