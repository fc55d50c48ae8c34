"""`GRADGUARD=protect` in the environment guards every Trainer."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import lightning.pytorch as pl
import pytest
import torch

from lightning_gradguard import GradGuard, GradientHalt, Policy, SpikeClip, autoload

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

SCRIPT = """
import warnings
warnings.simplefilter("ignore")
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel
class Broken(BoringModel):
    def training_step(self, batch, batch_idx):
        return self.layer(batch * float("nan")).sum()
options = dict(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
pl.Trainer(**options, enable_progress_bar=False, enable_model_summary=False).fit(Broken())
"""


def guards_of(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, GradGuard)]


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_script_needs_no_change_to_be_guarded(python):
    done = python.run(SCRIPT, kind="code", env={"GRADGUARD": "strict"})
    assert done.returncode == 1
    assert "GradientHalt: " in done.stderr
    assert "callbacks from entry point 'gradguard'" in done.stderr


def test_without_the_variable_nothing_is_imported():
    code = (
        "import sys; from lightning_gradguard import autoload; assert autoload.callbacks() == []; "
        "assert not {'torch', 'lightning', 'lightning_gradguard.callbacks'} & set(sys.modules)"
    )
    assert run(code, GRADGUARD="").returncode == 0
    assert run(code, GRADGUARD="off").returncode == 0


@pytest.mark.parametrize("name", ["watch", "protect", "strict", "Strict "])
def test_the_variable_chooses_the_policy(fit, classifier, monkeypatch, name):
    monkeypatch.setenv("GRADGUARD", name)
    (guard,) = guards_of(fit(classifier(), batches=3))
    assert guard.policy == getattr(Policy, name.strip().lower())()
    assert guard.summary["judged"] == 3
    assert guard.clipper is None


def test_without_the_variable_there_is_no_guard(fit, classifier, monkeypatch):
    monkeypatch.delenv("GRADGUARD", raising=False)
    assert guards_of(fit(classifier(), batches=2)) == []


@pytest.mark.parametrize("own", [lambda: GradGuard(), lambda: GradGuard(clipper=SpikeClip())])
def test_a_trainer_with_a_guard_gets_no_other(fit, classifier, monkeypatch, own):
    monkeypatch.setenv("GRADGUARD", "watch")
    guard = own()
    trainer = fit(classifier(), guard, batches=3)
    assert guards_of(trainer) == [guard]
    assert guard.summary["judged"] == 3


def test_a_module_with_a_guard_gets_no_other(fit, classifier, monkeypatch):
    monkeypatch.setenv("GRADGUARD", "watch")
    module, guard = classifier(), GradGuard(clipper=SpikeClip())
    module.configure_callbacks = lambda: [guard]
    assert guards_of(fit(module, batches=3)) == [guard]


def test_one_guard_for_each_fit_and_each_trainer(fit, classifier, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADGUARD", "watch")
    shared = []
    for _ in range(2):
        # Lightning adds to the list that it is given.
        trainer = pl.Trainer(
            callbacks=shared, max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        data = torch.utils.data.DataLoader(torch.randn(16, 8), 4)
        module = classifier()
        module.training_step = lambda batch, batch_idx, net=module.net: net(batch).square().mean()
        trainer.fit(module, data)
        trainer.fit_loop.epoch_loop.max_steps = 4
        trainer.fit(module, data)
        (guard,) = guards_of(trainer)
        assert guard.summary["judged"] == 2


@pytest.mark.parametrize("own", [False, True])
def test_the_list_of_callbacks_stays_as_it_was(classifier, monkeypatch, tmp_path, own):
    monkeypatch.setenv("GRADGUARD", "watch")
    trainer = pl.Trainer(
        callbacks=[GradGuard()] if own else [], max_steps=2, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    before, held = trainer.callbacks, list(trainer.callbacks)
    module = classifier()
    module.training_step = lambda batch, batch_idx, net=module.net: net(batch).square().mean()
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(16, 8), 4))
    assert trainer.callbacks is before
    assert [id(callback) for callback in before] == [id(callback) for callback in held]
    assert len(guards_of(trainer)) == 1


def test_its_state_is_saved_and_restored(fit, classifier, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADGUARD", "watch")
    trainer = fit(classifier(), batches=20)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    (resumed,) = guards_of(fit(classifier(), batches=20, ckpt_path=tmp_path / "half.ckpt", max_epochs=2))
    assert resumed.summary["judged"] == 40


def test_it_halts(fit, classifier, monkeypatch):
    monkeypatch.setenv("GRADGUARD", "strict")
    with pytest.raises(GradientHalt) as halt:
        fit(classifier(bad={4}), batches=8)
    assert halt.value.step == 4


def test_a_wrong_value_names_the_choices(monkeypatch):
    monkeypatch.setenv("GRADGUARD", "protct")
    with pytest.raises(
        ValueError, match=r"'watch', 'protect', 'strict', 'off', got 'protct'; did you mean 'protect'"
    ):
        autoload.callbacks()
    with pytest.raises(ValueError, match="GRADGUARD must be one of"):
        pl.Trainer(logger=False, accelerator="cpu")


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_both_packages_load_it(package):
    (entry,) = (e for e in entry_points(group=f"{package}.callbacks_factory") if e.name == "gradguard")
    assert entry.load() is autoload.callbacks
