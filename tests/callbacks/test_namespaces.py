"""Callbacks under both names of Lightning.

They work with `lightning.pytorch` alone, with `pytorch_lightning` alone, and with both.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")

#: Beginning of all scripts. A hidden package cannot be imported, as if it were not installed.
BEGINNING = """
import importlib, os, sys, warnings
from importlib.machinery import PathFinder
import torch
warnings.simplefilter("ignore")
find = PathFinder.find_spec
hidden = set(sys.argv[1].split(","))
PathFinder.find_spec = lambda name, *more: None if name.partition(".")[0] in hidden else find(name, *more)
CALM = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}

def model(pl):
    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, 1)
        def training_step(self, batch, number):
            return self.net(batch[0]).square().mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)
    return Net()

def data():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(12, 4)), batch_size=4)

def fit(pl, *callbacks, **options):
    options = {**CALM, "max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    trainer = pl.Trainer(callbacks=list(callbacks), **options)
    trainer.fit(model(pl), data())
    return trainer
"""

ALONE = """
from pathlib import Path
pl = importlib.import_module(sys.argv[2])
from lightning_gradguard import *
from lightning_gradguard import testing
loggers = importlib.import_module(f"{sys.argv[2]}.loggers")
guard = GradGuard(clipper=SpikeClip(), policy=Policy.strict(), recorder=Recorder(), trials=True)
try:
    fit(pl, GradHistogram(every_n_steps=1), guard, testing.FaultInjector(testing.NaN(at=2)),
        logger=loggers.TensorBoardLogger("logs"), log_every_n_steps=1)
except GradientHalt as halt:
    assert halt.step == 2
assert guard.stop_reason == "nonfinite", guard.summary
assert list(Path("logs").rglob("events*")) and replay(guard.bundle, model(pl))
trainer = fit(pl, GradGuard(), enable_checkpointing=True, default_root_dir="saved")
trainer.save_checkpoint("saved/state.ckpt")
again = GradGuard()
fit(pl, again, max_epochs=2).fit(model(pl), data(), ckpt_path="saved/state.ckpt")
assert again.summary["judged"] > 3
try:
    fit(pl, GradGuard(clipper=NormClip(1.0)), gradient_clip_val=1.0)
    raise SystemExit("both clip")
except importlib.import_module(f"{sys.argv[2]}.utilities.exceptions").MisconfigurationException:
    pass
os.environ["GRADGUARD"] = "protect"
(own,) = (c for c in fit(pl).callbacks if isinstance(c, GradGuard))
assert own.summary["judged"] == 3
assert not hidden & set(sys.modules)
"""

TOGETHER = """
first, second = (importlib.import_module(name) for name in sys.argv[2:])
from lightning_gradguard import GradGuard, GradHistogram
for pl in (first, second):
    guard = GradGuard()
    fit(pl, guard, GradHistogram())
    assert isinstance(guard, first.Callback) and isinstance(guard, second.Callback)
    assert guard.summary["judged"] == 3
"""

LATER = """
first = importlib.import_module(sys.argv[2])
from lightning_gradguard import GradGuard
for name in sys.argv[2:]:
    guard = GradGuard()
    fit(importlib.import_module(name), guard)
    assert isinstance(guard, first.Callback)
    assert guard.summary["judged"] == 3
"""

NEITHER = """
import lightning_gradguard
try:
    lightning_gradguard.GradGuard
    raise SystemExit("there is a Lightning")
except ImportError as error:
    assert 'pip install "lightning-gradguard[lightning]", or "lightning-gradguard[pytorch-lightning]"' in str(error)
net = torch.nn.Linear(2, 1)
guard = lightning_gradguard.Guard(net.named_parameters())
loss = net(torch.ones(2)).sum()
loss.backward()
assert guard.step(loss=loss).total_norm > 0
"""

needs_both = pytest.mark.skipif(
    any(find_spec(name.partition(".")[0]) is None for name in NAMESPACES), reason="needs both packages"
)


def run(folder, script, hidden, *names):
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING + script, ",".join(hidden), *names],
        cwd=folder, capture_output=True, text=True, timeout=150, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@needs_both
@pytest.mark.parametrize("name", [pytest.param(NAMESPACES[0], marks=pytest.mark.slow), NAMESPACES[1]])
def test_one_alone(name, tmp_path):
    (other,) = set(NAMESPACES) - {name}
    run(tmp_path, ALONE, [other.partition(".")[0]], name)


@pytest.mark.slow
@needs_both
@pytest.mark.parametrize("names", [NAMESPACES, NAMESPACES[::-1]])
def test_one_guard_for_trainers_of_both(names, tmp_path):
    run(tmp_path, TOGETHER, [], *names)


@needs_both
@pytest.mark.parametrize("names", [pytest.param(NAMESPACES, marks=pytest.mark.slow), NAMESPACES[::-1]])
def test_a_trainer_of_the_package_that_is_imported_later(names, tmp_path):
    run(tmp_path, LATER, [], *names)


def test_without_lightning_the_guard_works_alone(tmp_path):
    run(tmp_path, NEITHER, ["lightning", "pytorch_lightning"])
