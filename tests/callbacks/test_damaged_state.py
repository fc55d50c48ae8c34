"""Damaged states in a checkpoint: judging or the heat map begins afresh with a warning, and the training goes on."""

import random
import warnings

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_gradguard import (
    Fault,
    Finding,
    GradGuard,
    GradientHalt,
    GradientWarning,
    Policy,
    Report,
    Severity,
    SpikeClip,
)
from lightning_gradguard.loggers.overview import Overview
from tests.callbacks.conftest import Classifier, loader
from tests.damage import JUNK, damaged_value, part_of, places, replaced

POLICIES = [Policy.watch(), Policy(respond={"nonfinite": "rollback", "exploding": "rollback"})]
few = settings(max_examples=max(6, settings.default.max_examples // 3))
many = settings(max_examples=4 * settings.default.max_examples)


def fit(guard, folder, epochs, checkpoint=None):
    torch.manual_seed(0)
    module = Classifier(depth=1)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=TensorBoardLogger(folder), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[guard], log_every_n_steps=2,
    )  # fmt: skip
    trainer.fit(module, loader(batches=6), ckpt_path=checkpoint)
    return trainer, module


def guard_of(policy):
    return GradGuard(clipper=SpikeClip(), policy=policy)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints after an epoch, one for each policy."""
    folder, saved = tmp_path_factory.mktemp("whole"), []
    for policy in POLICIES:
        trainer, _ = fit(guard_of(policy), folder, epochs=1)
        trainer.save_checkpoint(folder / "a.ckpt")
        saved.append(torch.load(folder / "a.ckpt", weights_only=False))
    return folder, saved


def with_damage(state, source):
    """Return a state of the callback, damaged most often in one of its parts."""
    part = source.choice([None, "display", "display", "recovery", "0"])
    times = source.choice([1, 1, 2, 4])
    return (
        {**state, part: damaged_value(state[part], source, times)}
        if part in state
        else damaged_value(state, source, times)
    )


@few
@given(st.integers(0, 1), st.integers(0, 2**32))
def test_a_training_goes_on_from_a_damaged_checkpoint(checkpoints, place, seed):
    source, (folder, saved) = random.Random(seed), checkpoints
    checkpoint = saved[place]
    (key,) = [name for name in checkpoint["callbacks"] if "GradGuard" in name]
    state = with_damage(checkpoint["callbacks"][key], source)
    if not isinstance(state, dict):
        return  # see below
    torch.save({**checkpoint, "callbacks": {key: state}}, folder / "b.ckpt")
    try:
        torch.load(folder / "b.ckpt", weights_only=True)
    except Exception:  # no checkpoint of any training holds it
        return
    guard = guard_of(POLICIES[place])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            _, module = fit(guard, folder, epochs=2, checkpoint=folder / "b.ckpt")
        except GradientHalt:  # of a fault that the state says is active
            return
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert guard.summary["judged"] >= 6
    # A sink that fails says so once, and is off from then on: a damaged state must not lead to that.
    ours = [str(w.message) for w in seen if issubclass(w.category, GradientWarning)]
    assert all("afresh" in text or "anew" in text or "since step" in text for text in ours)


@pytest.mark.parametrize(
    "value", [v for v in JUNK if not isinstance(v, dict)], ids=lambda v: type(v).__name__
)
def test_what_is_no_dict_is_refused(value):
    with pytest.raises(ValueError, match=r"state must be what GradGuard\.state_dict gave, got ") as caught:
        GradGuard().load_state_dict(value)
    assert str(caught.value).isprintable()


def test_keys_that_are_no_optimizers_are_left_out():
    guard = GradGuard()
    guard.load_state_dict({"x": {}, "-1": {}, 3: {}, "9" * 5000: {}, "²": {}, "0": {"steps": 1}})
    assert set(guard.state_dict()) == {"0", "recovery", "display"}


NAMES = ["a.weight", "b.weight"]


def overview_of(steps):
    overview = Overview(NAMES, [4, 4], matrices=[True, True])
    for step in range(steps):
        found = (Finding(Fault.SPIKE, Severity.WARNING, step, ("a.weight",), 4.0, 3.0, "Spike"),)
        norms = dict.fromkeys(NAMES, 0.5)
        overview.observe(Report(step, 1.0, 0.7, 0.7, None, 1.0, False, found if step == 3 else (), norms))
    return overview


STATE = overview_of(10).state_dict()
NUMBERS = [0, -1, 1, 300, 2**40, -(2**62), 10**30, 1e300, float("nan"), float("inf"), [], [300], [1] * 200]


@many
@given(st.integers(0, 2**32))
def test_a_damaged_overview_is_refused_or_goes_on(seed):
    source, state = random.Random(seed), STATE
    if source.random() < 0.5:
        state = damaged_value(state, source, source.choice([1, 2]))
    else:
        own = [
            path for path in places(state) if isinstance(part_of(state, path), (int, float, list)) and path
        ]
        state = replaced(state, source.choice(own), source.choice(NUMBERS))
    overview = overview_of(0)
    try:
        overview.load_state_dict(state)
    except Exception:  # the callback begins anew then, whatever it is
        return
    for step in range(10, 14):
        report = Report(step, 1.0, 0.7, 0.7, None, 1.0, False, (), dict.fromkeys(NAMES, 0.5))
        overview.observe(report)
        assert overview.build_record(report).scalars
    again = overview_of(0)
    again.load_state_dict(overview.state_dict())
