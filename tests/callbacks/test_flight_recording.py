"""Flight recorder in a real Trainer.

It writes what is promised, and does not change the training.
"""

import os
import re
import shutil
import warnings
import weakref
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradguard import GradGuard, GradientHalt, GradientWarning, Policy, Recorder, SpikeClip
from lightning_gradguard.callbacks import bundle_contents as windows
from lightning_gradguard.callbacks import flight_recording as recording
from lightning_gradguard.flight_recorder import randomness
from lightning_gradguard.flight_recorder.serialization import decode

quiet = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
pytestmark = quiet


class Net(pl.LightningModule):
    """Net with dropout and batch norm.

    A batch listed in ``bad`` gives NaN, one in ``fails`` an error.
    """

    def __init__(self, bad=(), fails=(), by_hand=False, optimizer=torch.optim.AdamW, **more):
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        self.optimizer = optimizer
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.automatic_optimization = not by_hand

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx in self.hparams.fails:
            raise ArithmeticError("as it happens")
        if batch_idx in self.hparams.bad:
            x = x * torch.nan
        if self.automatic_optimization:
            return nn.functional.cross_entropy(self.net(x), y)
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(x), y))
            self.optimizers().step()
        return None

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=1e-3)


def halt(fit, module, *callbacks, guard=None, **options):
    """Fit until a halt; return guard and halt."""
    guard = guard or GradGuard(policy=Policy.strict(), recorder=Recorder())
    with pytest.raises(GradientHalt) as caught:
        fit(module, guard, *callbacks, **options)
    return guard, caught.value


def load(guard):
    return torch.load(guard.bundle, weights_only=True)


def test_the_training_is_bit_identical_with_and_without(fit):
    results = []
    for recorder in (None, Recorder(on=("halt", "exception", "sigterm"))):
        module = Net()
        guard = GradGuard(clipper=SpikeClip(), recorder=recorder)
        fit(module, guard, accumulate_grad_batches=2)
        results.append((module.state_dict(), torch.rand(3), repr(guard.report)))
        assert guard.bundle is None
    for name, tensor in results[0][0].items():
        assert torch.equal(tensor, results[1][0][name])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]
    assert not list(Path().rglob("*.pt"))


class Watcher(pl.Callback):
    """Callback that keeps the state before each batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.state = {name: t.clone() for name, t in module.state_dict().items()}
        self.batch, self.random = batch, randomness.capture()


def test_the_bundle_holds_the_state_before_the_forward_pass(fit):
    watcher = Watcher()
    guard, _ = halt(fit, Net(bad=[7]), watcher)
    bundle = load(guard)
    (part,) = bundle["parts"]
    assert randomness.same(randomness.from_plain(part["random"]), watcher.random)
    for own, batch in zip(decode(part["batch"]), watcher.batch, strict=True):
        assert torch.equal(own, batch)
    kept = {**bundle["weights"], **bundle["buffers"]}
    assert kept.keys() == watcher.state.keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, watcher.state[name]), name
        assert tensor.isfinite().all()


def test_other_contents(fit):
    guard = GradGuard(policy=Policy.strict(), clipper=SpikeClip(), recorder=Recorder(steps=5))
    halt(fit, Net(bad=[7], width=3, act=nn.ReLU), guard=guard)
    bundle = load(guard)
    assert (bundle["reason"], bundle["step"], bundle["rank"], bundle["world_size"]) == ("halt", 7, 0, 1)
    (optimizer,) = bundle["optimizers"]
    assert (optimizer["kind"], optimizer["settings"][0]["lr"]) == ("AdamW", 1e-3)
    assert optimizer["names"][0] == [name for name, _ in Net().named_parameters()]
    assert optimizer["layers"] == ["net.0.weight", "net.3.weight"]
    history = optimizer["history"]
    assert history["step"].tolist() == [3, 4, 5, 6, 7]
    assert history["skip"].tolist() == [False] * 4 + [True]
    assert history["norms"].shape == (5, len(history["names"]))
    assert bundle["target"]["fault"] == bundle["findings"][-1]["fault"] == "nonfinite"
    assert bundle["diagnosis"]["text"].startswith("The gradients or the loss are NaN")
    assert bundle["diagnosis"]["data"]["fault"] == "nonfinite"
    assert bundle["report"]["skip"] is True
    assert "SpikeClip" in bundle["config"]["clipper"]
    assert "'nonfinite': 'halt'" in bundle["config"]["policy"]
    assert bundle["trainer"]["precision"] == "32-true"
    assert bundle["versions"]["torch"] == str(torch.__version__)
    assert bundle["versions"]["device"] == "cpu"
    hyper = bundle["hyper_parameters"]
    assert decode(hyper["values"]["width"]) == 3
    assert decode(hyper["values"]["bad"]) == [7]
    assert hyper["left_out"] == ["act (type)"]
    assert bundle["left_out"] == []


def test_the_halt_names_the_file_and_the_command_to_replay_it(fit, tmp_path):
    guard, error = halt(fit, Net(bad=[7]))
    assert guard.bundle == tmp_path / "gradguard" / "step-00000007.pt"
    assert re.search(r"\n\nFlight record: gradguard/step-00000007.pt \([\d.]+ kB\)\n", str(error))
    assert re.search(
        r"gradguard replay gradguard/step-00000007.pt --module \S*test_flight_recording:Net$", str(error)
    )
    assert str(error).startswith(str(error.diagnosis))


@pytest.mark.parametrize("recorder", [None, Recorder(on=("exception",))])
def test_nothing_is_written_unless_asked_for(fit, recorder):
    guard, error = halt(fit, Net(bad=[7]), guard=GradGuard(policy=Policy.strict(), recorder=recorder))
    assert str(error) == str(error.diagnosis)
    assert guard.bundle is None
    assert not list(Path().rglob("*.pt"))


def test_it_is_written_to_the_log_folder_or_the_given_folder(fit, tmp_path):
    guard, _ = halt(fit, Net(bad=[2]), logger=CSVLogger(tmp_path, name="runs", version="mine"))
    assert guard.bundle.parent == tmp_path / "runs" / "mine" / "gradguard"
    guard = GradGuard(policy=Policy.strict(), recorder=Recorder(folder="here/or there"))
    _, error = halt(fit, Net(bad=[2]), guard=guard)
    assert guard.bundle.parent.resolve() == tmp_path / "here" / "or there"
    assert "gradguard replay 'here/or there/step-00000002.pt'" in str(error)


@pytest.mark.parametrize("strict", [False, True])
def test_a_full_disk_warns_once_and_does_not_hide_the_halt(fit, monkeypatch, recwarn, strict):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "write_bundle", full)
    if strict:
        warnings.simplefilter("error", GradientWarning)
    guard, error = halt(fit, Net(bad=[7]))
    assert error.diagnosis.fault == "nonfinite"
    assert "No flight record was written to" in str(error)
    assert "No space left on device" in str(error)
    assert guard.bundle is None
    if not strict:
        said = [str(w.message) for w in recwarn if "flight record" in str(w.message)]
        assert len(said) == 1


def test_a_folder_that_is_a_file_warns(fit):
    Path("taken").write_text("")
    guard = GradGuard(policy=Policy.strict(), recorder=Recorder(folder="taken"))
    _, error = halt(fit, Net(bad=[7]), guard=guard)
    assert "No flight record was written to taken: " in str(error)


def test_any_error_is_recorded_if_asked_for(fit, recwarn):
    guard = GradGuard(recorder=Recorder(on=("exception",)))
    with pytest.raises(ArithmeticError, match="as it happens"):
        fit(Net(fails=[4]), guard)
    bundle = load(guard)
    assert (bundle["reason"], bundle["message"]) == ("exception", "ArithmeticError: as it happens")
    assert (bundle["target"], bundle["step"], bundle["parts"][0]["number"]) == (None, 4, 4)
    assert any("Flight record: gradguard/step-00000004.pt" in str(w.message) for w in recwarn)


class Interrupt(pl.Callback):
    def __init__(self, error):
        self.error = error

    def on_validation_start(self, trainer, module):
        raise self.error


@pytest.mark.parametrize(
    ("error", "kept"), [(KeyboardInterrupt(), False), (ValueError("in validation"), True)]
)
def test_ctrl_c_is_not_recorded_and_an_error_between_batches_without_batch(fit, error, kept):
    module = Net()
    module.validation_step = lambda batch, batch_idx: None
    module.val_dataloader = lambda: DataLoader([(torch.zeros(8), 0)])
    guard = GradGuard(recorder=Recorder(on=("exception",)))
    with pytest.raises((ValueError, SystemExit)):
        fit(module, guard, Interrupt(error), batches=6, num_sanity_val_steps=0)
    assert (guard.bundle is not None) == kept
    if kept:
        assert load(guard)["parts"] == []
        assert load(guard)["left_out"] == ["batch (training ended between two batches)"]


@pytest.mark.parametrize("room", [windows.HELD_BYTES, 1000])
def test_accumulated_batches_are_recorded_up_to_a_size(fit, monkeypatch, room):
    monkeypatch.setattr(windows, "HELD_BYTES", room)
    guard, _ = halt(fit, Net(bad=[9]), accumulate_grad_batches=4)
    bundle = load(guard)
    numbers = [part["number"] for part in bundle["parts"]]
    assert numbers == ([8, 9, 10, 11] if room > 1000 else [9, 10, 11][-len(numbers) :])
    assert (bundle["notes"] == []) == (room > 1000)
    if room == 1000:
        assert bundle["notes"] == [
            f"The first {4 - len(numbers)} of the accumulated batches are not in the record: "
            "at most 0 MB of them are held."
        ]


def test_with_lag_the_record_is_of_the_halted_step(fit):
    guard = GradGuard(policy=Policy.strict(), recorder=Recorder(), lag=1)
    fused = lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)  # noqa: E731
    watcher, states = Watcher(), []

    class Keep(pl.Callback):
        def on_train_batch_start(self, *args):
            states.append(watcher.state)

    with pytest.raises(GradientHalt) as caught:
        fit(Net(bad=[7], optimizer=fused), guard, watcher, Keep())
    bundle = load(guard)
    assert (caught.value.step, bundle["step"], bundle["parts"][0]["number"]) == (7, 7, 7)
    assert bundle["notes"] == ["Steps were judged one step late (lag=1)."]
    for name, tensor in {**bundle["weights"], **bundle["buffers"]}.items():
        assert torch.equal(tensor, states[7][name]), name


def test_a_batch_that_the_step_writes_to_is_noted(fit):
    module = Net(bad=[7])
    plain = module.training_step
    module.training_step = lambda batch, batch_idx: plain((batch[0].mul_(2), batch[1]), batch_idx)
    guard, _ = halt(fit, module)
    assert load(guard)["notes"][0].startswith("The training step wrote to the batch in place")


def test_with_manual_optimization_the_step_to_stop_at_is_recorded(fit):
    guard, error = halt(fit, Net(bad=[3], by_hand=True))
    assert error.step == 6
    assert load(guard)["parts"][0]["stop"] == 0
    assert load(guard)["parts"][0]["number"] == 3


def test_a_batch_of_an_unknown_class_is_named(fit):
    class Custom:
        pass

    module = Net(bad=[2])
    module.on_after_batch_transfer = lambda batch, _: Custom()
    module.training_step = lambda batch, batch_idx: module.net(torch.zeros(2, 8)).sum() * torch.nan
    guard, error = halt(fit, module, batches=4)
    assert load(guard)["parts"] == []
    assert "Left out: batch (Custom)" in str(error)
    assert "Replay the step" not in str(error)


def test_keep_batch_false_leaves_out_the_batch(fit):
    guard = GradGuard(policy=Policy.strict(), recorder=Recorder(keep_batch=False, max_bytes=20_000))
    halt(fit, Net(bad=[7]), guard=guard)
    assert load(guard)["left_out"] == ["batch (keep_batch is False)"]


def test_an_error_in_the_recorder_switches_it_off_with_one_warning(fit, monkeypatch, recwarn):
    def broken(module, onto):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(recording, "copy_buffers", broken)
    guard = GradGuard(recorder=Recorder())
    fit(Net(), guard)
    said = [str(w.message) for w in recwarn if "flight recorder is off" in str(w.message)]
    assert len(said) == 1
    assert "no such luck" in said[0]
    assert guard.summary["judged"] == 40


def test_no_batch_is_held_after_its_step(fit):
    seen, alive = [], []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            alive.append(sum(ref() is not None for ref in seen))
            seen.append(weakref.ref(batch[0]))

    fit(Net(), GradGuard(recorder=Recorder()), Look(), batches=12)
    with_recorder, alive[:] = list(alive), []
    seen.clear()
    fit(Net(), GradGuard(), Look(), batches=12)
    assert with_recorder == alive


def test_a_second_fit_starts_anew(fit):
    guard, _ = halt(fit, Net(bad=[7]))
    assert guard.bundle is not None
    fit(Net(), guard)
    assert guard.bundle is None


def test_validating_records_nothing(fit, tmp_path):
    module, guard = Net(), GradGuard(recorder=Recorder(on=("exception",)))

    def fails(batch, batch_idx):
        raise ValueError("only validated")

    module.validation_step = fails
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[guard])
    with pytest.raises(ValueError, match="only validated"):
        trainer.validate(module, DataLoader([(torch.zeros(8), 0)]), verbose=False)
    assert guard.bundle is None


def test_the_recorder_must_be_a_recorder():
    with pytest.raises(ValueError, match=r"recorder must be a Recorder, such as Recorder\(\), got True"):
        GradGuard(recorder=True)


def test_the_recorder_does_not_change_the_state_key():
    assert GradGuard(recorder=Recorder()).state_key == GradGuard().state_key


class Lazy(pl.LightningModule):
    """Net whose statistics are made in its first pass."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        x = batch[0] * (torch.nan if batch_idx == 5 else 1.0)
        return nn.functional.cross_entropy(self.net(x), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:A layer with UninitializedParameter:UserWarning")
@pytest.mark.filterwarnings("ignore:.*UninitializedParameter.*")
def test_a_lazy_module_has_a_record(fit):
    guard, halted = halt(fit, Lazy(), batches=8)
    assert halted.step == 5
    assert load(guard)["step"] == 5


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # of TensorBoard's own thread
@pytest.mark.parametrize("gone", ["working folder", "log folder", "both"])
def test_a_halt_stays_a_halt_if_folders_are_gone(fit, tmp_path, monkeypatch, gone):
    scratch, logs = tmp_path / "scratch", tmp_path / "logs"
    scratch.mkdir()
    home = Path.cwd()
    monkeypatch.chdir(scratch)

    class Remove(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3 and gone != "log folder":
                scratch.rmdir()
            if batch_idx == 3 and gone != "working folder":
                shutil.rmtree(logs)

    guard = GradGuard(policy=Policy.strict(), recorder=Recorder(folder=tmp_path / "records"))
    logger = TensorBoardLogger(logs)
    try:
        _, halted = halt(fit, Net(bad={5}), Remove(), guard=guard, logger=logger, log_every_n_steps=1)
    finally:
        os.chdir(home)
    assert halted.step == 5
    assert guard.bundle.exists()
    assert guard.bundle.name in str(halted)
