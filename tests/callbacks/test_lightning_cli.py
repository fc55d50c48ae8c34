"""Arguments from YAML through a real LightningCLI.

Every argument can be set, and errors name wrong values.
"""

import dataclasses
import inspect
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradguard
from lightning_gradguard import (
    GradGuard,
    GradHistogram,
    GradientWarning,
    Policy,
    Recorder,
    SpikeClip,
    testing,
)
from lightning_gradguard.callbacks.fault_injector import FaultInjector

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")

CLIPPERS = ["SteadyClip", "SpikeClip", "NormClip", "AGC", "AutoClip", "ZClip", "AdaGC"]
DETECTORS = [
    "NonFinite", "Underflow", "Disconnected", "DeadUnits", "DepthTilt", "TimeTilt", "Exploding", "Spike",
    "UpdateRatio", "Stalled",
]  # fmt: skip

ALL = """
callbacks:
  - class_path: lightning_gradguard.GradHistogram
    init_args:
      every_n_steps: 2
      include: ["*.weight"]
      exclude: [head.*]
      max_tensors: 3
      max_samples: null
      axis: value
      exponents: true
      of: [gradient, weight, update, activation]
  - class_path: lightning_gradguard.GradGuard
    init_args:
      detectors:
        - lightning_gradguard.NonFinite
        - class_path: lightning_gradguard.DepthTilt
          init_args: {limit: 3.5}
      clipper:
        class_path: lightning_gradguard.SpikeClip
        init_args: {z_threshold: 8, exclude: [head.*]}
      policy:
        respond: {vanishing: rollback, nonfinite: halt, spike: clip}
        patience: 3
        max_consecutive_skips: 2
        stop: graceful
        snapshot_every: 10
        lr_factor: 0.25
        max_rollbacks: 1
      monitor: loss
      trials: true
      recorder: {folder: flights, steps: 9, keep_batch: false, "on": [halt, sigterm], max_bytes: 1000, keep: 1}
      per_layer: true
      lag: 0
      progress_bar: true
"""


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.body(batch[0]).relu()), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(32, 4)
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 4)


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Run LightningCLI; return the callbacks from YAML."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    # Of how Lightning uses it.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

    def run(text, *, fit=False):
        options = {
            "accelerator": "cpu", "max_steps": 4, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, **yaml.safe_load(text),
        }  # fmt: skip
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"trainer": options}))
        arguments = [*(["fit"] if fit else []), "--config", str(path)]
        options = {"run": fit, "seed_everything_default": False, "save_config_callback": None}
        return LightningCLI(Model, Data, args=arguments, **options).trainer.callbacks

    return run


def guard_with(**arguments):
    callback = {"class_path": "lightning_gradguard.GradGuard", "init_args": arguments}
    return yaml.safe_dump({"callbacks": [callback]})


def test_every_argument(cli):
    histogram, guard = cli(ALL, fit=True)
    assert (guard.clipper, guard.monitor, guard.trials, guard.per_layer, guard.lag, guard.progress_bar) == (
        SpikeClip(z_threshold=8.0, exclude=("head.*",)), "loss", True, True, 0, True,
    )  # fmt: skip
    assert guard.detectors == (lightning_gradguard.NonFinite(), lightning_gradguard.DepthTilt(limit=3.5))
    assert guard.policy == Policy(
        respond={"vanishing": "rollback", "nonfinite": "halt", "spike": "clip"}, patience=3, max_consecutive_skips=2,
        stop="graceful", snapshot_every=10, lr_factor=0.25, max_rollbacks=1,
    )  # fmt: skip
    assert guard.recorder == Recorder("flights", 9, False, ("halt", "sigterm"), 1000, 1)
    assert guard.summary["judged"] == 4
    assert (histogram.include, histogram.axis, histogram.max_samples) == (["*.weight"], "value", None)


def test_the_yaml_above_has_every_argument():
    for callback, kind in zip(yaml.safe_load(ALL)["callbacks"], (GradHistogram, GradGuard), strict=True):
        assert set(callback["init_args"]) == set(inspect.signature(kind).parameters)
    arguments = yaml.safe_load(ALL)["callbacks"][1]["init_args"]
    for name, kind in (("policy", Policy), ("recorder", Recorder)):
        assert set(arguments[name]) == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", CLIPPERS)
def test_every_clipper_with_every_field(cli, name):
    kind = getattr(lightning_gradguard, name)
    part = kind(1.0) if name == "NormClip" else kind()
    part = dataclasses.replace(part, exclude=("head.*", "*.bias"))
    arguments = {f.name: getattr(part, f.name) for f in dataclasses.fields(kind)}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    (guard,) = cli(guard_with(clipper={"class_path": f"lightning_gradguard.{name}", "init_args": plain}))
    assert guard.clipper == part


def test_every_detector_with_every_field(cli):
    kinds = [getattr(lightning_gradguard, name) for name in DETECTORS]
    parts = [
        {
            "class_path": f"lightning_gradguard.{kind.__name__}",
            "init_args": {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)},
        }
        for kind in kinds
    ]
    (guard,) = cli(guard_with(detectors=parts))
    assert guard.detectors == tuple(kind() for kind in kinds)


@pytest.mark.parametrize("name", ["watch", "protect", "strict"])
def test_ready_policies(cli, name):
    (guard,) = cli(guard_with(policy={"class_path": f"lightning_gradguard.Policy.{name}"}))
    assert guard.policy == getattr(Policy, name)()


def test_faults_for_tests(cli):
    injection = {"class_path": "lightning_gradguard.testing.Spike", "init_args": {"at": [1, 2], "factor": 10}}
    callback = {
        "class_path": "lightning_gradguard.testing.FaultInjector",
        "init_args": {"injection": injection},
    }
    (injector,) = cli(yaml.safe_dump({"callbacks": [callback]}), fit=True)
    assert isinstance(injector, FaultInjector)
    assert injector.injection == testing.Spike(at=(1, 2), factor=10.0)


WRONG = {
    "misspelt fault": (
        {"policy": {"respond": {"vanshing": "halt"}}},
        "got 'vanshing'; did you mean 'vanishing'?",
    ),
    "unknown response": (
        {"policy": {"respond": {"vanishing": "hlt"}}},
        "Literal['ignore', 'warn', 'clip', 'skip'",
    ),
    "unknown key": ({"moniter": "val_acc"}, "'moniter' is not accepted"),
    "unknown key of the policy": ({"policy": {"patence": 3}}, "'patence' is not accepted"),
    "unknown key of a detector": (
        {"detectors": [{"class_path": "lightning_gradguard.DepthTilt", "init_args": {"limt": 3}}]},
        "'limt' is not accepted",
    ),
    "not a number": ({"policy": {"patience": "soon"}}, "Expected a <class 'int'>. Got value: soon"),
    "out of range": ({"policy": {"patience": -1}}, "patience must be a whole number, 0 or more, got -1"),
    "misspelt class": ({"clipper": "lightning_gradguard.SpikeClp"}, "no attribute 'SpikeClp'"),
    "a detector as clipper": (
        {"clipper": "lightning_gradguard.DepthTilt"},
        "does not implement protocol Clipper",
    ),
    "a clipper as detector": (
        {"detectors": ["lightning_gradguard.AGC"]},
        "does not implement protocol Detector",
    ),
    "a class of others": ({"clipper": "torch.optim.SGD"}, "does not implement protocol Clipper"),
    "without what is needed": ({"clipper": "lightning_gradguard.NormClip"}, "max_norm"),
    "lag": ({"lag": 2}, "lag must be None, 0 or 1, got 2"),
    "switch": ({"progress_bar": "two"}, "Expected a <class 'bool'>. Got value: two"),
    "occasion": ({"recorder": {"on": ["halted"]}}, "Got value: halted"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_named(cli, capsys, case):
    arguments, message = WRONG[case]
    with pytest.raises((SystemExit, ValueError)) as error:
        cli(guard_with(**arguments))
    said = capsys.readouterr().err + str(error.value)
    assert message in said


def test_patterns_and_a_monitor_from_yaml_are_checked_with_the_model(cli):
    clipper = {"class_path": "lightning_gradguard.AGC", "init_args": {"exclude": ["haed.*"]}}
    with pytest.raises(ValueError, match=r"got 'haed\.\*'; nearest names: head\."):
        cli(guard_with(clipper=clipper), fit=True)
    histogram = {"class_path": "lightning_gradguard.GradHistogram", "init_args": {"include": ["boddy.*"]}}
    with pytest.warns(
        GradientWarning, match=r"pattern 'boddy\.\*' matches no parameter. The nearest name is 'body\."
    ):
        cli(yaml.safe_dump({"callbacks": [histogram]}), fit=True)
    with pytest.warns(GradientWarning, match="monitor 'vall_acc' is not logged"):
        cli(guard_with(monitor="vall_acc"), fit=True)


def test_on_without_quotes_is_not_the_recorders(cli, capsys):
    """Reject ``on``, which YAML 1.1 reads as true.

    A comment in examples/config.yaml warns of it.
    """
    with pytest.raises(SystemExit):
        cli(ALL.replace('"on":', "on:"))
    assert "Key must be a string, got: True" in capsys.readouterr().err


def test_what_is_printed_can_be_read_again(cli, capsys, tmp_path):
    cli(ALL)
    arguments = ["--config", str(tmp_path / "config.yaml"), "--print_config"]
    with pytest.raises(SystemExit):
        LightningCLI(Model, Data, args=arguments, run=False, seed_everything_default=False)
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]
    (_, first), (_, second) = cli(ALL), cli(yaml.safe_dump({"callbacks": printed["callbacks"]}))
    assert first.state_key == second.state_key
    assert first.recorder == second.recorder


def test_the_example_sets_existing_arguments_only():
    example = yaml.safe_load((Path(__file__).parents[2] / "examples" / "config.yaml").read_text())
    for callback in example["trainer"]["callbacks"]:
        kind = getattr(lightning_gradguard, callback["class_path"].removeprefix("lightning_gradguard."))
        assert set(callback["init_args"]) <= set(inspect.signature(kind).parameters)
