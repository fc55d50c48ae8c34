"""Fit the same training without and with a guard, and compare everything that it leaves."""

import contextlib
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import warnings

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import WarningCache
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, GradientWarning, Policy, Recorder

#: What a training may be watched with. Nothing here clips, so nothing may change.
GUARDS = {
    "default": lambda: [GradGuard()],
    "strict": lambda: [GradGuard(policy=Policy.strict())],
    "everything": lambda: [
        GradHistogram(every_n_steps=3, exponents=True),
        GradGuard(
            policy=Policy(respond={"exploding": "rollback"}, snapshot_every=4), trials=True, recorder=Recorder(),
            per_layer=True,
        ),
    ],
}  # fmt: skip

#: Keys of a checkpoint or of a profile that hold a time or a version of ours.
TIMES = ("time_elapsed", "samples_per_sec", "batches_per_sec", "device/flops", "time", "mfu")


class Net(pl.LightningModule):
    """Small classifier with batch norm and dropout, which logs in all of its steps."""

    batch_size, lr = 8, 1e-2

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.backbone(x))

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self(x.to(self.head.weight.dtype)), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(samples(), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(samples(16), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


def samples(count=64):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x.sum(1) > 0).long())


class Rows(Logger):
    """A logger that keeps the rows that it is given, in order."""

    name, version = "rows", 0

    def __init__(self):
        super().__init__()
        self.rows, self.ended = [], []

    def log_metrics(self, metrics, step=None):
        # A row of the guard's own is one more, and so is none of the training's.
        own = {key: value for key, value in metrics.items() if not key.startswith("gradguard")}
        if own:
            self.rows.append((step, own))

    def log_hyperparams(self, params, *_, **__):
        self.rows.append(("hyperparameters", dict(params)))

    def finalize(self, status):
        self.ended.append(status)


def trainer_of(folder, callbacks=(), **options):
    """Return a Trainer that writes into a folder; ``options`` are those under test."""
    defaults = {
        "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": Rows(), "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "log_every_n_steps": 3,
        "default_root_dir": folder,
    }  # fmt: skip
    if any(isinstance(callback, Checkpoint) for callback in callbacks):
        del defaults["enable_checkpointing"]
    for name in options.pop("without", ()):
        del defaults[name]
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(trainer, module):
    trainer.fit(module)


def assert_same(
    folder,
    *,
    options=dict,
    callbacks=tuple,
    module=Net,
    run=fit,
    guards=("default", "strict"),
    judged=True,
    also=None,
    fails=None,
):
    """Run a training bare, then with each kind of guard, and compare all that the runs leave.

    Args:
        folder: An empty folder.
        options: Returns the Trainer's options, made anew for each run.
        callbacks: Returns the callbacks of the training, made anew for each run.
        module: Returns the module.
        run: What is done with a trainer and the module.
        guards: Names in `GUARDS`.
        judged: Least number of steps that a guard has to see; True for at least one, False where there is none.
        also: Takes trainer and module, and returns more to compare.
        fails: Type of the error that ends the bare run; None if it has to end well.

    Returns:
        What the bare run left, for what a test knows of it.
    """
    bare = outcome(folder, [], options, callbacks, module, run, also)
    ended = bare["error"] and bare["error"][0]
    assert ended is fails, f"bare: {bare['error']}"
    for name in guards:
        own = GUARDS[name]()
        watched = outcome(folder, own, options, callbacks, module, run, also)
        found = difference(watched, bare)
        assert found is None, f"{name}: {found[:1000]}"
        guard = own[-1]
        assert guard.findings == (), f"{name}: the training is to be healthy"
        assert guard.summary["skipped"] == 0
        count = guard.summary["judged"]
        assert count >= judged if judged else count == 0, f"{name}: {count} steps were judged"
    return bare


def outcome(folder, guards, options, callbacks, module, run, also=None):
    """Run one training; return what it leaves, by name."""
    shutil.rmtree(folder / "run", ignore_errors=True)  # the same for both, since checkpoints hold paths
    (folder / "run").mkdir()
    error, threads = None, set(threading.enumerate())
    with settings_restored(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell has what runs in its background ignore it
        forget_warnings()
        seed()
        model, own = module(), list(callbacks())
        trainer = trainer_of(folder / "run", [*guards[:1], *own, *guards[1:]], **options())
        try:
            run(trainer, model)
        except BaseException as raised:  # KeyboardInterrupt ends as SystemExit
            error = raised
        seen = {
            "error": error and (type(error), str(error), type(error.__cause__), type(error.__context__)),
            "random": randomness(),
            "settings": settings(),
            "threads": threads_left(threads),
        }
        seen |= left_by(trainer, model, guards)
        seen["extra"] = also(trainer, model) if also else None
        seen["checkpoint"] = checkpoint(trainer, folder / "run" / "end of the run.ckpt", guards)
        seen["files"] = files(folder / "run", guards)
    seen["warnings"] = [
        (w.category.__name__, re.sub(" at 0x[0-9a-f]+", "", str(w.message)))
        for w in said
        if not issubclass(w.category, GradientWarning)
    ]
    return seen


def forget_warnings():
    """Let Lightning give those warnings again that it gives once in a process."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("lightning.", "pytorch_lightning.")):
            for held in list(vars(module).values()):
                for own in (
                    (held, getattr(held, "warning_cache", None)) if isinstance(held, type) else (held,)
                ):
                    if isinstance(own, WarningCache):
                        own.clear()


def seed():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


def left_by(trainer, module, guards):
    """Return what module, optimizers and trainer are after a training."""
    ours = {type(guard).__name__ for guard in guards}
    return {
        "weights": dict(module.state_dict()),
        "gradients": {name: p.grad for name, p in module.named_parameters()},
        "trainable": [name for name, p in module.named_parameters() if p.requires_grad],
        "modes": [part.training for part in module.modules()],
        "attributes": sorted(vars(module)),
        "hooks": hooks(module, trainer.optimizers),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "steps": (trainer.global_step, trainer.current_epoch, trainer.should_stop, trainer.interrupted),
        "state": (trainer.state.status, trainer.state.fn, trainer.state.stage),
        "progress": trainer.fit_loop.state_dict(),
        "batches": (trainer.num_training_batches, trainer.num_val_batches, trainer.accumulate_grad_batches),
        "metrics": (
            # A guard's own numbers are there besides.
            {name: x for name, x in trainer.callback_metrics.items() if not name.startswith("gradguard")},
            trainer.logged_metrics,
            trainer.progress_bar_metrics,
        ),
        "logged": [(logger.rows, logger.ended) for logger in trainer.loggers if isinstance(logger, Rows)],
        "callbacks": [type(c).__name__ for c in trainer.callbacks if type(c).__name__ not in ours],
        "precision": trainer.precision_plugin.state_dict(),
    }


def hooks(module, optimizers):
    """Count the hooks on a module and on its optimizers, and what was put in place of a method."""
    on_modules = [_lengths(vars(part), "hook") for part in module.modules()]
    on_tensors = [len(p._backward_hooks or ()) for p in module.parameters()]
    on_optimizers = [_lengths(vars(optimizer), "hook") for optimizer in optimizers]
    replaced = [sorted(name for name, held in vars(o).items() if callable(held)) for o in optimizers]
    everywhere = _lengths(vars(nn.modules.module), "_global_")
    return on_modules, on_tensors, on_optimizers, replaced, everywhere


def _lengths(attributes, part):
    return {name: len(held) for name, held in attributes.items() if part in name and isinstance(held, dict)}


def threads_left(before):
    """Return the names of threads that a run leaves running, without numbers.

    A worker's queue takes a moment to close: a thread that ends by itself within ten seconds isn't left.
    """
    new = [
        thread
        for thread in threading.enumerate()
        if thread not in before and thread.name != "tqdm_monitor"  # the first bar of a process starts it
    ]
    for thread in new:
        thread.join(timeout=10)
    return sorted(re.sub(r"\d+", "", thread.name) for thread in new if thread.is_alive())


def checkpoint(trainer, path, guards):
    """Save a checkpoint, and return it without what is the guards' own."""
    with contextlib.suppress(AttributeError, TypeError):  # of a trainer whose module is gone after an error
        trainer.save_checkpoint(path)
        trainer.strategy.checkpoint_io.teardown()  # wait for one that a thread writes
    return loaded(path, guards) if path.exists() else None


def files(folder, guards):
    """Return the files of a run by name, with what is in checkpoints and, but for our own tags, in TensorBoard's."""
    found = {}
    for path in sorted(set(folder.rglob("*")) - set((folder / "gradguard").rglob("*"))):
        name = re.sub(r"(tfevents)\..*", r"\1", str(path.relative_to(folder)))
        if path.suffix == ".ckpt":
            found[name] = loaded(path, guards)
        elif path.is_file():
            found.setdefault(name, []).extend(scalars(path) if "tfevents" in name else [])
    return found


def scalars(path):
    """Return the scalars of an event file but for our own: step, tag and value."""
    events = [event_pb2.Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]
    return [
        (event.step, value.tag, value.simple_value or list(value.tensor.float_val))
        for event in events
        for value in event.summary.value
        if not value.tag.startswith(("gradguard", "0_gradguard"))
    ]


def loaded(path, guards):
    held = torch.load(path, weights_only=False)
    for guard in guards:
        held.get("callbacks", {}).pop(guard.state_key, None)
    if not held.get("callbacks"):  # without any stateful callback there may be no such key
        held.pop("callbacks", None)
    return held


def randomness():
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def settings():
    """Return what a process has only once, and a training might change."""
    return {
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads of torch": torch.get_num_threads(),
        "signals": [type(signal.getsignal(one)) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "excepthook": sys.excepthook,
        "environment": dict(os.environ),
        "printing": np.get_printoptions(),
    }


@contextlib.contextmanager
def settings_restored():
    """Undo what a Trainer's options leave behind in this process."""
    dtype, environment = torch.get_default_dtype(), dict(os.environ)
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)
        torch.set_anomaly_enabled(False)
        torch.backends.cudnn.benchmark = benchmark
        os.environ.clear()
        os.environ.update(environment)
        for one, handler in handlers.items():
            signal.signal(one, handler)


def difference(own, other, path=""):
    """Return where two values first differ, or None.

    Tensors and arrays are compared bit for bit but for NaN, which equals NaN; times are not compared.
    """
    if type(own) is not type(other):
        return f"{path}: {type(own).__name__} {own!r} and {type(other).__name__} {other!r}"
    if isinstance(own, (torch.Tensor, np.ndarray)):
        own, other = torch.as_tensor(own), torch.as_tensor(other)
        same = own.dtype == other.dtype and own.shape == other.shape
        same = same and torch.equal(own.isnan(), other.isnan())
        same = same and torch.equal(own.nan_to_num(), other.nan_to_num())
        return None if same else f"{path}: {own} and {other}"
    if isinstance(own, dict):
        if list(own) != list(other):
            return f"{path}: keys {sorted(map(str, set(own) ^ set(other))) or 'in another order'}"
        pairs = [(f"{path}[{key!r}]", own[key], other[key]) for key in own if not is_time(key)]
    elif isinstance(own, (list, tuple)):
        if len(own) != len(other):
            odd = [one for one in [*own, *other] if _count(one, own) != _count(one, other)]
            return f"{path}: {len(own)} and {len(other)} entries, such as {odd[:2]}"
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(own, other, strict=True))]
    elif isinstance(own, float) and math.isnan(own) and math.isnan(other):
        return None
    else:
        return None if own == other else f"{path}: {own!r} and {other!r}"
    return next((found for found in (difference(a, b, where) for where, a, b in pairs) if found), None)


def is_time(key):
    return isinstance(key, str) and key.endswith(TIMES)


def _count(one, many):
    return sum(difference(one, other) is None for other in many)
