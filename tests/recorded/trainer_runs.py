"""Trainings in a real Trainer with `GradGuard` and `GradHistogram`, and what they write to TensorBoard."""

import contextlib
import io
import logging
import math
import os
import re
import warnings
from pathlib import Path

import lightning as L
import torch
from exact import Run, digest, plain, weights_of, without_folder
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from surface import call
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch import nn
from torch.utils.data import DataLoader
from zoo_runs import Listener

from benchmarks import zoo
from benchmarks.zoo.running import quiet
from lightning_gradguard import (
    AGC,
    GradGuard,
    GradHistogram,
    GradientHalt,
    GradientWarning,
    NormClip,
    Policy,
    Recorder,
    SpikeClip,
    replay,
)
from lightning_gradguard.testing import DeadRows, FaultInjector, NaN, Spike

BATCHES = 40


class Net(L.LightningModule):
    """Small net with batch normalisation and dropout; its batches depend on their number only."""

    def __init__(self, width=12, spoiled=(), optimizer="AdamW"):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(8, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Dropout(0.1),
        )
        self.head = nn.Linear(width, 2)

    def batch(self, number):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(16, 8, generator=generator)
        y = (x.sum(1) > 0).long()
        if number in self.hparams.spoiled:
            x[3, 2] = math.nan
        return x, y

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.body(x)), y)

    def training_step(self, batch, number):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, number):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        if self.hparams.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        fused = self.hparams.optimizer == "fused"
        return torch.optim.AdamW(self.parameters(), lr=3e-3, fused=fused)

    def train_dataloader(self):
        return DataLoader([self.batch(number) for number in range(BATCHES)], batch_size=None)

    def val_dataloader(self):
        return DataLoader([self.batch(1000)], batch_size=None)


class ByHand(Net):
    """Net with two optimizers in manual optimization; the second steps every other time."""

    def __init__(self, spoiled=()):
        super().__init__(spoiled=spoiled)
        self.automatic_optimization = False

    def training_step(self, batch, number):
        for index, optimizer in enumerate(self.optimizers()):
            if index and number % 2:
                continue
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.body.parameters(), lr=0.05), torch.optim.Adam(
            self.head.parameters(), lr=1e-3
        )


def _zoo(name):
    return lambda: zoo.case(name).make(0)


def _scaling():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


#: Name to module, options of the guard, of the histogram (None for none) and of the Trainer, and further callbacks.
RUNS = {
    "watch": (Net, {}, {"every_n_steps": 10}, {"max_steps": 80}, ()),
    "watch, spoiled": (
        lambda: Net(spoiled=(30, 31)),
        {"clipper": SpikeClip(), "per_layer": True, "monitor": "val_loss"},
        {"every_n_steps": 7, "axis": "value", "exponents": True, "max_samples": None},
        {"max_steps": 80},
        (lambda: FaultInjector(Spike(at=50, factor=1e4)),),
    ),
    "protect, vanishing": (
        _zoo("V02"),
        {"policy": Policy.protect(), "clipper": AGC()},
        {"every_n_steps": 25, "max_tensors": 6},
        {"max_steps": 90},
        (),
    ),
    "protect, halts": (
        _zoo("E02"),
        {"policy": Policy.protect()},
        {"every_n_steps": 20},
        {"max_steps": 90},
        (),
    ),
    "strict, trials": (
        _zoo("V01"),
        {"policy": Policy.strict(), "trials": True},
        {"every_n_steps": 20, "include": ["*.weight"]},
        {"max_steps": 100},
        (),
    ),
    "strict, trials in time": (
        _zoo("V08"),
        {"policy": Policy(respond={"vanishing_in_time": "halt"}, patience=10), "trials": True},
        None,
        {"max_steps": 60},
        (),
    ),
    "strict, dead": (
        Net,
        {"policy": Policy(respond={"dead": "halt"}, patience=10), "trials": True},
        None,
        {"max_steps": 70},
        (lambda: FaultInjector(DeadRows(at=range(70), parameters="body.0.*", share=1.0)),),
    ),
    "strict, NaN": (
        lambda: Net(spoiled=(25,)),
        {"policy": Policy.strict(), "recorder": Recorder(folder="flights")},
        {"every_n_steps": 10},
        {"max_steps": 60},
        (),
    ),
    "graceful": (
        lambda: Net(spoiled=(25,)),
        {"policy": Policy(respond={"nonfinite": "halt"}, stop="graceful"), "clipper": NormClip(0.5)},
        {"every_n_steps": 10},
        {"max_steps": 60},
        (),
    ),
    "skips": (lambda: Net(spoiled=range(20, 30)), {"clipper": SpikeClip()}, None, {"max_steps": 60}, ()),
    "rollback": (
        lambda: Net(spoiled=(30, 31, 32)),
        {
            "policy": Policy(
                respond={"nonfinite": "rollback", "exploding": "rollback"},
                max_consecutive_skips=1,
                snapshot_every=8,
                max_rollbacks=2,
            ),
            "clipper": SpikeClip(),
        },
        {"every_n_steps": 10},
        {"max_steps": 70},
        (),
    ),
    "rollbacks, then halts": (
        _zoo("N07"),
        {
            "policy": Policy(
                respond={"nonfinite": "rollback"}, snapshot_every=20, lr_factor=0.1, max_rollbacks=2
            )
        },
        None,
        {"max_steps": 130},
        (),
    ),
    "by hand": (
        ByHand,
        {"clipper": SpikeClip()},
        {"every_n_steps": 10},
        {"max_steps": 110},
        (lambda: FaultInjector(NaN(at=40, parameters="head.weight")),),
    ),
    "by hand, zoo": (_zoo("H70"), {"policy": Policy.strict()}, {"every_n_steps": 50}, {"max_steps": 120}, ()),
    "accumulated": (
        lambda: Net(spoiled=(13,)),
        {"clipper": AGC(0.05)},
        {"every_n_steps": 5},
        {"max_steps": 60, "accumulate_grad_batches": 3},
        (),
    ),
    "late": (
        lambda: Net(spoiled=(30,), optimizer="fused"),
        {"clipper": SpikeClip(), "lag": 1},
        {"every_n_steps": 10},
        {"max_steps": 70},
        (),
    ),
    "late, halts": (
        lambda: Net(spoiled=(30,), optimizer="fused"),
        {"policy": Policy.strict(), "lag": 1, "recorder": Recorder(folder="flights")},
        None,
        {"max_steps": 70},
        (),
    ),
    "scaled": (
        lambda: Net(spoiled=(30,), optimizer="SGD"),
        {"clipper": SpikeClip()},
        {"every_n_steps": 10},
        {"max_steps": 70, **_scaling()},
        (),
    ),
}


def names():
    """Return the names of all runs."""
    return [*RUNS, "resumed", "csv", "autoload", "report"]


def run(name, *, keep=False):
    """Run one of `names` in the current folder."""
    special = {"resumed": resumed, "csv": csv, "autoload": autoload, "report": report}
    return special[name](keep) if name in special else trained(name, keep)


def trained(name, keep=False):
    """Train, and record everything visible."""
    module, options, of_histogram, of_trainer, more = RUNS[name]
    net, guard = module(), GradGuard(**options)
    callbacks = [*(make() for make in more), guard, Listener(guard)]
    if of_histogram is not None:
        # Before the clipping in half of the runs, after it in the others.
        place = 0 if list(RUNS).index(name) % 2 else len(callbacks)
        callbacks.insert(place, GradHistogram(**of_histogram))
    logger = TensorBoardLogger("runs", name="", version="")
    result, halt = fit(net, callbacks, logger, **of_trainer)
    listener = next(callback for callback in callbacks if isinstance(callback, Listener))
    of_guard(result, guard, listener, halt, keep)
    result.facts["weights"] = weights_of(net)
    logged(result, Path("runs"))
    if guard.bundle is not None:
        # A separate module, since the recorded weights are loaded into it.
        replayed(result, guard.bundle, module())
    return result


def fit(net, callbacks, logger=False, *, resume=None, **options):
    """Train without output; return a `Run` with the messages, and the halt or None."""
    torch.manual_seed(1)
    halt, log = None, io.StringIO()
    with quiet(), listening(log), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        defaults = {"max_epochs": -1, "log_every_n_steps": 5, "enable_checkpointing": False}
        trainer = L.Trainer(
            accelerator="cpu", logger=logger, callbacks=callbacks, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, **{**defaults, **options},
        )  # fmt: skip
        try:
            trainer.fit(net, ckpt_path=resume)
        except GradientHalt as error:
            halt = error
    if logger:
        logger.finalize("success")
    result = Run()
    result.warned(
        [
            without_folder(str(w.message), Path.cwd())
            for w in caught
            if issubclass(w.category, GradientWarning)
        ]
    )
    result.text["summary"] = log.getvalue()
    return result, halt


@contextlib.contextmanager
def listening(log):
    """Capture the table at the end of a run, which Lightning shows only with its own output."""
    ours, lightnings = logging.getLogger("lightning_gradguard"), logging.getLogger("lightning.pytorch")
    handlers, lightnings.handlers, propagate = (
        lightnings.handlers,
        [logging.NullHandler()],
        lightnings.propagate,
    )
    handler = logging.StreamHandler(log)
    ours.addHandler(handler)
    lightnings.propagate = False
    lightnings.setLevel(logging.INFO)
    try:
        yield
    finally:
        lightnings.handlers, lightnings.propagate = handlers, propagate
        ours.removeHandler(handler)


def of_guard(result, guard, listener, halt, keep=False):
    """Record the public members of a callback."""
    result.reports(listener.reports, keep=keep)
    result.findings(guard.findings)
    result.halt(halt)
    result.diagnosis(guard.diagnosis)
    result.facts["stop reason"] = guard.stop_reason
    result.facts["summary"] = {name: guard.summary[name] for name in sorted(guard.summary)}
    result.facts["bundle"] = None if guard.bundle is None else guard.bundle.name
    result.facts["state key"] = guard.state_key
    result.state(guard.state_dict())


def logged(result, folder):
    """Record TensorBoard data: for each tag its kind and a digest of steps and values, without times."""
    facts, text = {}, {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if not value.tag.startswith("_hparams_"):  # Lightning's own, contains the time
                    _add(facts, text, event.step, value)
    for entry in facts.values():
        entry["values"] = [len(entry["values"]), digest(entry["values"])]
    result.facts["logged"], result.text["logged"] = dict(sorted(facts.items())), dict(sorted(text.items()))


def _add(facts, text, step, value):
    """Record one value; texts and the descriptions of tags count as wording."""
    entry = facts.setdefault(value.tag, {"plugin": value.metadata.plugin_data.plugin_name, "values": []})
    if value.metadata.summary_description:
        text[f"{value.tag}, note"] = value.metadata.summary_description
        value.metadata.summary_description = ""
    if entry["plugin"] == "text":
        entry["values"].append(step)
        text.setdefault(value.tag, []).extend(part.decode() for part in value.tensor.string_val)
    elif value.WhichOneof("value") == "simple_value":
        entry["values"].append([step, plain(value.simple_value)])
    else:
        entry["values"].append([step, value.SerializeToString(deterministic=True).hex()])


def replayed(result, bundle, module):
    """Replay a flight record, and record the result."""
    answer = replay(bundle, module)
    result.facts["replay"] = {
        name: plain(getattr(answer, name))
        for name in (
            "verdict", "fault", "step", "rank", "number", "rows", "together", "every", "other_random", "recorded_loss",
            "loss", "passes",
        )
    }  # fmt: skip
    result.facts["replay"]["has origin"] = answer.origin is not None
    result.text["replay"] = str(answer)
    record = torch.load(bundle, weights_only=True)
    result.facts["record"] = sorted(record)
    status, out, err = call(["replay", str(bundle)])
    result.facts["shown"], result.text["shown"] = status, out + err


class Keeper(L.Callback):
    """Callback that saves a checkpoint after a step."""

    def __init__(self, at, path):
        self.at, self.path = at, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


def resumed(keep=False):
    """Train, then resume from an intermediate checkpoint."""
    result = Run()
    for name, options in (
        ("spike", {"clipper": SpikeClip()}),
        ("late", {"clipper": AGC(), "lag": 1}),
    ):
        first = GradGuard(**options)
        fit(
            Net(spoiled=(28,), optimizer="fused"),
            [first, GradHistogram(), Keeper(33, f"{name}.ckpt")],
            max_steps=50,
        )
        then, net = GradGuard(**options), Net(spoiled=(28,), optimizer="fused")
        listener = Listener(then)
        logger = TensorBoardLogger("runs", name="", version=name)
        part, halt = fit(net, [then, GradHistogram(), listener], logger, resume=f"{name}.ckpt", max_steps=70)
        of_guard(part, then, listener, halt, keep)
        part.facts["weights"] = weights_of(net)
        logged(part, Path("runs", name))
        saved = torch.load(f"{name}.ckpt", weights_only=True)["callbacks"]
        part.facts["kept"] = [key for key in saved if key.startswith("Grad")]
        result.facts[name], result.text[name] = part.facts, part.text
    return result


def csv(keep=False):
    """Train with a logger that accepts only scalars."""
    guard = GradGuard(clipper=SpikeClip())
    listener = Listener(guard)
    logger = CSVLogger("runs", name="", version="")
    result, halt = fit(
        Net(spoiled=(20,)), [guard, GradHistogram(exponents=True), listener], logger, max_steps=60
    )
    of_guard(result, guard, listener, halt, keep)
    text = Path("runs", "metrics.csv").read_text()
    result.facts["columns"] = text.splitlines()[0].split(",")
    result.facts["csv"] = digest(text)
    return result


def autoload(keep=False):
    """Train with the environment variable that adds callbacks to every Trainer."""
    os.environ["GRADGUARD"] = "protect"
    try:
        with quiet():
            result, halt = fit(
                Net(spoiled=(20,)), [], TensorBoardLogger("runs", name="", version=""), max_steps=40
            )
    finally:
        del os.environ["GRADGUARD"]
    result.halt(halt)
    logged(result, Path("runs"))
    return result


def report(keep=False):
    """Write the report of two runs; it counts as text, since it is wording and pictures."""
    result = Run()
    for name in ("watch, spoiled", "strict, trials"):
        os.mkdir(name)
        os.chdir(name)
        trained(name)
        os.chdir("..")
    status, out, err = call(["report", "watch, spoiled/runs", "strict, trials/runs", "--out", "page.html"])
    result.facts["status"] = status
    result.text["said"] = re.sub(r"[\d,]+ kB", "N kB", out + err)
    page = Path("page.html").read_text(encoding="utf-8")
    result.text["page"] = digest(page)
    return result
