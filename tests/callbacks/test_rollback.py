"""Rollbacks, graceful ends and failures.

The policy decides which of them a training gets that would be ruined.
"""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard, GradientHalt, GradientWarning, Policy, SpikeClip
from lightning_gradguard.testing import FaultInjector, NaN

BATCHES = 160
TRUTH = torch.linspace(-1, 1, 6)


class Regression(pl.LightningModule):
    """Linear regression on batches with faults.

    Batches in ``bad`` are NaN, and those in ``wild`` a thousand times too large.
    """

    def __init__(self, rate=0.05, bad=(), wild=(), optimizer=torch.optim.SGD, schedule=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        self.rate, self.bad, self.wild, self.kind, self.schedule = rate, bad, wild, optimizer, schedule
        self.losses, self.seen = [], []

    def training_step(self, batch, number):
        self.seen.append(number)
        x = batch * (math.nan if number in self.bad else 1.0)
        y = (batch @ TRUTH)[:, None] * (1e3 if number in self.wild else 1.0)
        loss = (self.net(x) - y).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = self.kind(self.parameters(), lr=self.rate)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def data(batches=BATCHES):
    x = torch.randn(batches * 16, 6, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(x, batch_size=16)


def fit(module, guard, tmp_path, *, epochs=1, loader=None, ckpt=None, **more):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[guard, *more.pop("callbacks", ())],
        **{"enable_checkpointing": False, **more},
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader or data(), ckpt_path=ckpt)
    said = [str(w.message) for w in caught if issubclass(w.category, GradientWarning)]
    return trainer, said


def back(fault="nonfinite", **more):
    known = {"snapshot_every": 20, "max_consecutive_skips": 2, "patience": 5, **more}
    return GradGuard(policy=Policy(respond={fault: "rollback"}, **known))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_it_restores_the_newest_state_that_proved_healthy(tmp_path, optimizer):
    module, guard = Regression(bad=range(110, 114), optimizer=optimizer), back()
    reference, kept = Regression(optimizer=optimizer), {}

    class Keeper(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, number):
            kept[number] = [t.clone() for t in pl_module.state_dict().values()]

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, number):
            if number == 112:
                self.after = [t.clone() for t in pl_module.state_dict().values()]
                self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    fit(reference, Keeper(), tmp_path)
    look = Look()
    trainer, said = fit(module, guard, tmp_path, callbacks=[look])
    # Kept at 0, 20, ..., 100; that of 100 had no twenty healthy steps after it, so that of 80 it is.
    assert all(torch.equal(a, b) for a, b in zip(look.after, kept[80], strict=True))
    assert look.rate == 0.025
    assert guard.summary["rollbacks"] == 1
    assert guard.stop_reason is None
    (message,) = [text for text in said if "rollback 1 of 3" in text]
    assert "those of step 80" in message
    assert "0.025 instead of 0.05" in message
    assert trainer.global_step == BATCHES
    assert module.seen == list(range(BATCHES))  # the loop goes on, and the window is left out
    assert all(p.isfinite().all() for p in module.parameters())
    assert module.losses[-1] < 0.25 * module.losses[0]


def fused(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, fused=True)


def test_a_rollback_with_lag_comes_one_step_late_and_undoes_that_step_too(tmp_path):
    guard = GradGuard(policy=back().policy, lag=1)
    module = Regression(bad=range(110, 114), optimizer=fused)
    reference, kept = Regression(optimizer=fused), {}

    class Keeper(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, number):
            kept.setdefault(id(pl_module), {})[number] = [t.clone() for t in pl_module.state_dict().values()]

    fit(reference, Keeper(), tmp_path)
    _, said = fit(module, guard, tmp_path, callbacks=[Keeper()])
    # The third bad step is 112. It is known at batch 113, whose step is not taken; the run goes on with batch 114.
    after, healthy = kept[id(module)][114], kept[id(reference)][80]
    assert all(torch.equal(a, b) for a, b in zip(after, healthy, strict=True))
    assert guard.summary["rollbacks"] == 1
    assert guard.summary["nonfinite"] == 3
    assert any("those of step 80" in text for text in said)
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_rate_that_is_too_high_from_the_start_is_lowered_until_it_holds(tmp_path):
    class Line(Regression):
        def __init__(self):
            super().__init__(rate=4.0)
            self.net = nn.Linear(6, 1)

    module, guard = Line(), back("exploding", lr_factor=0.25)
    trainer, _ = fit(module, guard, tmp_path)
    assert 1 <= guard.summary["rollbacks"] <= 3
    assert trainer.optimizers[0].param_groups[0]["lr"] == 4.0 * 0.25 ** guard.summary["rollbacks"]
    assert module.losses[-1] < 1e-3


def test_after_the_last_rollback_it_halts(tmp_path):
    module, guard = Regression(bad=range(50, BATCHES)), back(max_rollbacks=2)
    with pytest.raises(GradientHalt) as caught:
        fit(module, guard, tmp_path)
    # Two skips and a third that goes back, twice; the next third halts.
    assert caught.value.step == 58
    assert guard.summary["rollbacks"] == 2
    assert guard.stop_reason == "nonfinite"
    assert all(p.isfinite().all() for p in module.parameters())


def test_other_faults_do_not_roll_back(tmp_path):
    policy = Policy(respond={"exploding": "rollback", "nonfinite": "halt"}, snapshot_every=20)
    with pytest.raises(GradientHalt):
        fit(Regression(bad=(60,)), GradGuard(policy=policy), tmp_path)


def test_a_state_followed_by_a_warning_is_not_restored(tmp_path):
    """Skip the state of step 80.

    The warning of step 90 follows it within 20 steps, so it did not prove healthy, although 20 steps have passed when
    the run goes back. That of step 60 is restored.
    """
    guard = back()
    module = Regression(bad=range(105, 109), wild=(90,))
    _, said = fit(module, guard, tmp_path)
    assert any("spike" in text for text in said)
    assert any("those of step 60" in text for text in said)


@pytest.mark.parametrize("kind", ["LambdaLR", "CosineAnnealingLR"])
def test_a_schedule_continues_with_the_lowered_rate(tmp_path, kind):
    def schedule(optimizer):
        if kind == "LambdaLR":
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)

    plain, _ = fit(Regression(schedule=schedule), GradGuard(), tmp_path)
    guard = back()
    lowered, _ = fit(Regression(schedule=schedule, bad=range(110, 114)), guard, tmp_path)
    assert guard.summary["rollbacks"] == 1
    rates = [t.optimizers[0].param_groups[0]["lr"] for t in (plain, lowered)]
    assert rates[1] == pytest.approx(0.5 * rates[0])


def test_a_policy_without_rollback_keeps_nothing_and_trains_the_same(tmp_path):
    plain, watched = Regression(), Regression()
    fit(plain, pl.Callback(), tmp_path)
    guard = back()
    fit(watched, guard, tmp_path)
    for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert "rollbacks" not in GradGuard().summary


def test_rollbacks_are_counted_on_after_a_resume(tmp_path):
    first = back(max_rollbacks=1)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(Regression(bad=range(60, 64)), first, tmp_path, callbacks=[saver], enable_checkpointing=True)
    again = back(max_rollbacks=1)
    with pytest.raises(GradientHalt):
        fit(Regression(bad=range(60, 64)), again, tmp_path, epochs=2, ckpt=tmp_path / "last.ckpt")
    assert again.summary["rollbacks"] == 1


@pytest.mark.parametrize("more", [{}, {"min_epochs": 3}, {"min_steps": 500}, {"accumulate_grad_batches": 2}])
def test_a_graceful_halt_ends_fit_without_the_bad_step(tmp_path, more):
    policy = Policy(respond={"nonfinite": "halt"}, stop="graceful")
    module, guard = Regression(bad=range(60, BATCHES)), GradGuard(policy=policy)
    before = {}

    class Keeper(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, number):
            if number == 60:
                before.update({n: p.clone() for n, p in pl_module.named_parameters()})

    trainer, said = fit(module, guard, tmp_path, epochs=4, callbacks=[Keeper()], **more)
    assert guard.stop_reason == "nonfinite"
    assert trainer.state.finished
    assert module.seen[-1] == (60 if "accumulate_grad_batches" not in more else 61)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])
    assert any("ends the training before step" in text for text in said)
    assert guard.diagnosis is not None


def test_a_graceful_halt_leaves_a_checkpoint_of_good_weights(tmp_path):
    policy = Policy(respond={"nonfinite": "halt"}, stop="graceful")
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    guard = GradGuard(policy=policy)
    fit(Regression(bad=(60,)), guard, tmp_path, callbacks=[saver], enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(t.isfinite().all() for t in saved["state_dict"].values())


def test_manual_optimization_rolls_back_both_optimizers(tmp_path):
    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 1)
            self.kept = {}

        def training_step(self, batch, number):
            self.kept[number] = [p.clone() for p in self.parameters()]
            for index, optimizer in enumerate(self.optimizers()):
                scale = math.nan if index and 70 <= number < 74 else 1.0
                loss = (self.b(self.a(batch)) * scale - (batch @ TRUTH)[:, None]).square().mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.a.parameters(), lr=0.01), torch.optim.Adam(
                self.b.parameters(), lr=0.01
            )

    module, guard = Two(), back(snapshot_every=40)  # steps of both are counted: twenty batches
    trainer, _ = fit(module, guard, tmp_path)
    assert guard.summary["rollbacks"] == 1
    # The third bad batch is 72; its step is the one that goes back, and the next batch begins there.
    assert all(torch.equal(a, b) for a, b in zip(module.kept[73], module.kept[40], strict=True))
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [0.005, 0.005]


@pytest.mark.parametrize(
    "wrong",
    [
        {"stop": "quietly"},
        {"snapshot_every": 0},
        {"lr_factor": 0.0},
        {"lr_factor": 1.5},
        {"max_rollbacks": -1},
    ],
)
def test_wrong_values_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Policy(**wrong)


def test_in_a_loop_of_your_own_a_rollback_is_a_halt():
    from lightning_gradguard import Guard

    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    policy = Policy(respond={"nonfinite": "rollback"}, max_consecutive_skips=0)
    guard = Guard(net.named_parameters(), optimizer=optimizer, policy=policy)
    with pytest.raises(GradientHalt), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = net(torch.full((4, 2), math.nan)).mean()
        loss.backward()
        guard.step(loss=loss)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_nonfinite_batch_does_not_stay_in_running_statistics(tmp_path, lag):
    """Validate as if the batch had not been there."""
    kept = {}

    class Keeper(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, number):
            if number == 60:
                kept.update({n: b.clone() for n, b in pl_module.named_buffers()})

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, number):
            if number == 60 and lag == 0:
                for name, buffer in pl_module.named_buffers():
                    assert torch.equal(buffer, kept[name]) or "batches" in name

    module = Regression(bad=(60,))
    fit(module, GradGuard(lag=lag), tmp_path, callbacks=[Keeper()])
    assert all(t.isfinite().all() for t in module.state_dict().values())
    module.eval()
    assert module.net(torch.randn(4, 6)).isfinite().all()


def test_running_statistics_do_not_change_without_a_skip(tmp_path):
    plain, watched = Regression(wild=(50,)), Regression(wild=(50,))
    fit(plain, pl.Callback(), tmp_path)
    fit(watched, GradGuard(), tmp_path)
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


SHORT = 60


class BufferedNet(pl.LightningModule):
    def __init__(self, expanded):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        if expanded:  # no checkpoint can be loaded into it
            self.register_buffer("expanded", torch.zeros(1).expand(8))
        self.register_buffer("replaced", torch.zeros(8))

    def training_step(self, batch, number):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number))
        self.replaced = 0.9 * self.replaced + 0.1 * x.mean(0)
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch, number):
        self.replaced = self.replaced * 1.0  # which is an inference tensor from now on

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Recorder(pl.Callback):
    def __init__(self, guard, path=None, at=None):
        self.guard, self.path, self.at, self.thresholds, self.replaced = guard, path, at, {}, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        self.thresholds[number], self.replaced[number] = self.guard.report.threshold, module.replaced.clone()
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


def fit_with_nan(folder, *bad, saved=None, ckpt_path=None, expanded=False, **options):
    policy = Policy(respond={"nonfinite": "rollback"}, max_consecutive_skips=0, snapshot_every=10)
    guard = GradGuard(clipper=SpikeClip(), policy=policy)
    follow, module = Recorder(guard, folder / "half.ckpt", saved), BufferedNet(expanded)
    faults = [FaultInjector(NaN(at=bad))] if bad else []
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[*faults, guard, follow], default_root_dir=folder, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = DataLoader(range(SHORT), batch_size=None)
        trainer.fit(
            module, data, DataLoader(range(2), batch_size=None) if options else None, ckpt_path=ckpt_path
        )
    return guard, follow, module


def test_right_after_a_resume_the_guard_returns_to_the_restored_state(tmp_path):
    """Restore the guard, whose clipper needs no new warm-up."""
    fit_with_nan(tmp_path, saved=40)
    guard, follow, module = fit_with_nan(tmp_path, 41, ckpt_path=tmp_path / "half.ckpt")
    assert guard.summary["rollbacks"] == 1
    # Lightning 2.4 takes the batch twice at whose end it was saved.
    assert guard.summary["judged"] == module.trainer.global_step >= SHORT
    assert all(math.isfinite(follow.thresholds[number]) for number in range(42, SHORT))


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 7}])
def test_buffers_that_are_expanded_or_replaced(tmp_path, options):
    guard, follow, module = fit_with_nan(tmp_path, 35, expanded=True, **options)
    assert guard.summary["rollbacks"] == 1
    assert module.expanded.stride() == (0,)
    # Restored to its value before batch 20, and updated with batch 36.
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(36))
    torch.testing.assert_close(follow.replaced[36], 0.9 * follow.replaced[19] + 0.1 * x.mean(0))


class Finetuned(pl.LightningModule):
    """Body and head; the batches ``bad`` of epoch 1 give NaN."""

    def __init__(self, bad):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.bad = nn.Linear(6, 8), nn.Linear(8, 1), bad

    def training_step(self, batch, number):
        loss = (self.head(self.body(batch).relu()) - (batch @ TRUTH)[:, None]).square().mean()
        return loss * math.nan if self.current_epoch == 1 and number in self.bad else loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Unfreeze(BaseFinetuning):
    """Adds the body to the optimizer at the beginning of epoch 1, or within it."""

    def __init__(self, at=None):
        super().__init__()
        self.at = at

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1 and self.at is None:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.01)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == self.at:
            self.unfreeze_and_add_param_group(pl_module.body, trainer.optimizers[0], lr=0.01)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("first", [True, False], ids=["unfreezing first", "guard first"])
@pytest.mark.parametrize(("at", "bad"), [(None, range(2, 9)), (3, range(9, 16)), (6, range(6, 13))])
def test_a_rollback_goes_to_a_state_with_the_parameters_that_the_optimizer_has_now(tmp_path, at, bad, first):
    guard = GradGuard(policy=Policy(respond={"nonfinite": "rollback"}, snapshot_every=5))
    module, unfreeze = Finetuned(bad), Unfreeze(at)
    callbacks = [unfreeze, guard] if first else [guard, unfreeze]
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=callbacks, enable_checkpointing=False,
    )  # fmt: skip
    try:
        trainer.fit(module, data(20))
    except (
        GradientHalt
    ):  # the parameters came with the first bad batch, so no state with them is known to be good
        assert at == 6
    else:
        assert guard.summary["rollbacks"] == 1
    assert all(p.isfinite().all() for p in module.parameters())
