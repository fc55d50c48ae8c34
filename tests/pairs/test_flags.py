"""Each option of a Trainer, in a pair of trainings without and with a guard."""

import inspect
from datetime import timedelta

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.pairs.pair import Net, assert_same, fit


def scaled(scale):
    return lambda: {
        "plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale, growth_interval=4))
    }


#: Option of the Trainer to values of it, by a name; a value is a dictionary of options, or makes one.
FLAGS = {
    "accelerator": {"auto": {"accelerator": "auto"}},
    "strategy": {
        "auto": {"strategy": "auto"},
        "an object": lambda: {"strategy": SingleDeviceStrategy("cpu")},
    },
    "devices": {"auto": {"devices": "auto"}, "one": {"devices": 1, "num_nodes": 1}},
    "precision": {
        "64": {"precision": "64-true"},
        "bf16": {"precision": "bf16-true"},
        "bf16-mixed": {"precision": "bf16-mixed"},
        "16-mixed": {"precision": "16-mixed"},
        "32": {"precision": "32-true"},
    },
    "plugins": {
        "fp16 with a scaler": scaled(2.0**10),
        "environment": lambda: {"plugins": LightningEnvironment()},
        "checkpoints": lambda: {"plugins": TorchCheckpointIO(), "enable_checkpointing": True},
        "checkpoints by a thread": lambda: {"plugins": AsyncCheckpointIO(), "enable_checkpointing": True},
    },
    "logger": {
        "none": {"logger": False},
        "the default": {"logger": True},
        "a table": lambda: {"logger": CSVLogger("table")},
    },
    "fast_dev_run": {"on": {"fast_dev_run": True}, "five": {"fast_dev_run": 5}},
    "max_epochs": {"three": {"max_epochs": 3}, "none": {"max_epochs": 0}, "open": {"max_epochs": -1, "max_steps": 15}},
    "min_epochs": {"two": {"min_epochs": 2, "max_epochs": 3}},
    "max_steps": {"seventeen": {"max_steps": 17}, "none": {"max_steps": 0}},
    "min_steps": {"seventeen": {"min_steps": 17, "max_epochs": 1}},
    "max_time": {"an hour": {"max_time": timedelta(hours=1)}, "no time": {"max_time": timedelta(0)}},
    "limit_train_batches": {
        "a number": {"limit_train_batches": 5},
        "a share": {"limit_train_batches": 0.5},
        "none": {"limit_train_batches": 0},
    },
    "limit_val_batches": {"one": {"limit_val_batches": 1}, "none": {"limit_val_batches": 0}},
    "limit_test_batches": {"one": {"limit_test_batches": 1}},
    "limit_predict_batches": {"one": {"limit_predict_batches": 1}},
    "overfit_batches": {"two": {"overfit_batches": 2}, "a share": {"overfit_batches": 0.5}},
    "val_check_interval": {
        "batches": {"val_check_interval": 4},
        "a share": {"val_check_interval": 0.5},
        "across epochs": {"val_check_interval": 7, "check_val_every_n_epoch": None},
    },
    "check_val_every_n_epoch": {"two": {"check_val_every_n_epoch": 2}},
    "num_sanity_val_steps": {"none": {"num_sanity_val_steps": 0}, "all": {"num_sanity_val_steps": -1}},
    "log_every_n_steps": {
        "each": {"log_every_n_steps": 1},
        "never": {"log_every_n_steps": 0},
        "beyond": {"log_every_n_steps": 100},
    },
    "enable_checkpointing": {"on": {"enable_checkpointing": True}},
    "enable_progress_bar": {"on": {"enable_progress_bar": True}},
    "enable_model_summary": {"on": {"enable_model_summary": True}},
    "accumulate_grad_batches": {
        "three": {"accumulate_grad_batches": 3},
        "five, which leaves a rest": {"accumulate_grad_batches": 5},
    },
    "gradient_clip_val": {"norm": {"gradient_clip_val": 0.1}, "none": {"gradient_clip_val": 0}},
    "gradient_clip_algorithm": {"value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    "deterministic": {"on": {"deterministic": True}, "warn": {"deterministic": "warn"}},
    "benchmark": {"on": {"benchmark": True}},
    "inference_mode": {"off": {"inference_mode": False}},
    "use_distributed_sampler": {"off": {"use_distributed_sampler": False}},
    "profiler": {
        "simple": {"profiler": "simple"},
        "simple, with its object": lambda: {"profiler": SimpleProfiler()},
        "advanced": lambda: {"profiler": AdvancedProfiler()},
        # That of torch ends a process in its second fit, guarded or not; test_processes.py has it.
    },
    "detect_anomaly": {"on": {"detect_anomaly": True}},
    "barebones": {
        "on": {
            "barebones": True,
            "without": [
                "logger", "log_every_n_steps", "enable_checkpointing", "enable_progress_bar", "enable_model_summary",
            ],
        }
    },
    "sync_batchnorm": {"on": {"sync_batchnorm": True}},
    "reload_dataloaders_every_n_epochs": {"one": {"reload_dataloaders_every_n_epochs": 1}},
    "default_root_dir": {"relative": {"default_root_dir": "here", "logger": True}},
    "enable_autolog_hparams": {"off": {"enable_autolog_hparams": False}},
}  # fmt: skip
#: Those that no pair needs, and why.
LEFT_OUT = {
    "callbacks": "test_callbacks.py has them",
    "num_nodes": "more than one node is a launcher's business; the pair of `devices` gives it",
    "model_registry": "needs an account of a service",
}
CASES = [(flag, name) for flag, values in FLAGS.items() for name in values]
#: Those with which no step is taken.
WITHOUT_A_STEP = [
    ("max_epochs", "none"),
    ("max_steps", "none"),
    ("max_time", "no time"),
    ("limit_train_batches", "none"),
]
OF_OTHER_STAGES = ("limit_val_batches", "limit_test_batches", "limit_predict_batches", "inference_mode")
#: Near another one, or long; left to `make test-long` and `make pairs`.
SLOW = [
    ("accelerator", "auto"), ("devices", "auto"), ("devices", "one"), ("strategy", "auto"), ("plugins", "environment"),
    ("plugins", "checkpoints"), ("profiler", "simple, with its object"), ("log_every_n_steps", "beyond"),
    ("log_every_n_steps", "each"), ("precision", "16-mixed"), ("precision", "32"), ("logger", "a table"),
    ("max_epochs", "three"), ("max_steps", "none"), ("limit_train_batches", "a share"), ("overfit_batches", "a share"),
    ("val_check_interval", "a share"), ("accumulate_grad_batches", "three"), ("gradient_clip_val", "none"),
    ("deterministic", "warn"), ("benchmark", "on"), ("enable_autolog_hparams", "off"),
    ("use_distributed_sampler", "off"), ("limit_val_batches", "none"), ("default_root_dir", "relative"),
]  # fmt: skip


def has(flag):
    return flag in inspect.signature(pl.Trainer.__init__).parameters


@pytest.mark.parametrize(
    ("flag", "name"),
    [pytest.param(*case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES],
)
def test_a_guard_changes_nothing(flag, name, tmp_path):
    if not has(flag):
        pytest.skip(f"this Lightning has no {flag}")
    value = FLAGS[flag][name]

    def all_stages(trainer, module):
        trainer.fit(module)
        trainer.validate(module, verbose=False)
        trainer.test(module, verbose=False)
        trainer.predict(module, return_predictions=False)

    assert_same(
        tmp_path,
        options=value if callable(value) else lambda: dict(value),
        run=all_stages if flag in OF_OTHER_STAGES else fit,
        judged=(flag, name) not in WITHOUT_A_STEP,
    )


def test_each_option_has_a_pair():
    options = {name for name in inspect.signature(pl.Trainer.__init__).parameters if name != "self"}
    assert options - {*FLAGS, *LEFT_OUT} == set()
    assert {*FLAGS} & {*LEFT_OUT} == set()


def test_a_pair_sees_what_a_guard_changes(tmp_path):
    """A comparison that finds nothing has to be able to find something."""

    class Meddling(Net):
        def on_fit_start(self):
            if any(type(callback).__name__ == "GradGuard" for callback in self.trainer.callbacks):
                torch.rand(1)

    with pytest.raises(AssertionError, match=r"default: \['random'\]|default: \['weights'\]"):
        assert_same(tmp_path, module=Meddling)
