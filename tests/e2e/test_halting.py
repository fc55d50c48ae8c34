"""Halts come before the bad step.

Neither checkpoints nor logs hold anything of that step.
"""

import csv
import math
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from torch import nn

from lightning_gradguard import GradGuard, GradientHalt, Policy

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the script is imported, too
from halting_script import BAD, Net, fit  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")


def fused(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def late(stop):
    return GradGuard(policy=Policy(respond={"nonfinite": "halt"}, stop=stop), lag=1)


def scaled():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))


#: Name to the net's arguments and the Trainer's.
CASES = {
    "plain": ({}, {}),
    "first step": ({"bad": 0}, {}),
    "min_steps": ({}, {"min_steps": 500}),
    "min_epochs": ({}, {"min_epochs": 2}),
    "accumulated": ({"bad": 9}, {"accumulate_grad_batches": 4}),
    "accumulated, first micro-batch": ({}, {"accumulate_grad_batches": 4}),
    "by hand": ({"by_hand": True}, {}),
    "SGD": ({"optimizer": torch.optim.SGD}, {}),
    "fused": ({"optimizer": fused}, {}),
    "fp16": ({}, {"plugins": scaled}),
    "fp16, fused": ({"optimizer": fused}, {"plugins": scaled}),
    "fp16, by hand": ({"by_hand": True}, {"plugins": scaled}),
    "late": ({"optimizer": fused}, {"guard": late}),
    "late, first step": ({"optimizer": fused, "bad": 0}, {"guard": late}),
}


def halted(case, stop, folder, **more):
    """Fit until a halt; return module, guard, error."""
    arguments, options = CASES[case]
    options = {**options, **more}
    guard = options.pop(
        "guard", lambda stop: GradGuard(policy=Policy(respond={"nonfinite": "halt"}, stop=stop))
    )(stop)
    if "plugins" in options:
        options["plugins"] = options["plugins"]()
    module, error = Net(**arguments), None
    try:
        fit(module, folder, stop=stop, guard=guard, **options)
    except GradientHalt as halt:
        error = halt
    return module, guard, error


@pytest.mark.parametrize("stop", ["raise", "graceful"])
@pytest.mark.parametrize("case", CASES)
def test_the_bad_step_changes_no_bit(case, stop, tmp_path):
    module, guard, error = halted(case, stop, tmp_path)
    assert (error is not None) == (stop == "raise")
    assert guard.stop_reason == "nonfinite"
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, module.kept[module.bad][name]), name
    accumulated = CASES[case][1].get("accumulate_grad_batches", 1)
    last = module.bad // accumulated * accumulated + accumulated - 1
    assert max(module.kept) == last + (
        "guard" in CASES[case][1] and module.bad > 0
    )  # late is one batch later
    if error is not None:
        steps_of_a_batch = 1 if module.automatic_optimization else 2
        assert error.step == module.bad // accumulated * steps_of_a_batch


@pytest.mark.parametrize("stop", ["raise", "graceful"])
@pytest.mark.parametrize("case", ["plain", "accumulated", "by hand", "fp16", "late", "first step"])
def test_all_checkpoints_are_finite(case, stop, tmp_path):
    """Check checkpoints of steps, epochs and exceptions.

    The last one is among them.
    """
    kept = OnExceptionCheckpoint(tmp_path, "exception")
    kept.teardown = lambda *_, **__: None  # which would take it away again
    module, _, _ = halted(case, stop, tmp_path, callbacks=[kept])
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    assert ("exception.ckpt" in [file.name for file in files]) == (stop == "raise")
    for file in files:
        saved = torch.load(file, weights_only=True)
        moments = [
            t for state in saved["optimizer_states"] for own in state["state"].values() for t in own.values()
        ]
        assert all(tensor.isfinite().all() for tensor in moments), file
        finite = {n for n, tensor in saved["state_dict"].items() if tensor.isfinite().all()}
        assert finite >= set(dict(module.named_parameters())), file
        # With lag=1, running statistics are restored one step late; by hand, the second forward pass comes after that.
        if case not in ("late", "by hand"):
            assert finite == saved["state_dict"].keys(), file


class Exploding(pl.LightningModule):
    """Net whose finite gradients grow until a halt."""

    def __init__(self):
        super().__init__()
        self.layer, self.kept, self.bad, self.automatic_optimization = nn.Linear(8, 1), [], 0, True

    def training_step(self, batch, number):
        self.kept.append(self.layer.weight.detach().clone())
        return (self.layer(batch[0]) - batch[1].float()[:, None]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("stop", ["raise", "graceful"])
def test_a_finite_fault_is_halted_before_its_step_too(stop, tmp_path):
    guard = GradGuard(policy=Policy(respond={"exploding": "halt"}, patience=0, stop=stop))
    module = Exploding()
    module.validation_step = lambda *_: None
    if stop == "raise":
        with pytest.raises(GradientHalt, match="explode"):
            fit(module, tmp_path, stop=stop, guard=guard)
    else:
        fit(module, tmp_path, stop=stop, guard=guard)
    assert guard.stop_reason == "exploding"
    assert math.isfinite(guard.report.total_norm)
    assert torch.equal(module.layer.weight, module.kept[-1])
    assert not torch.equal(module.kept[-1], module.kept[-2])


@pytest.fixture(scope="module")
def processes(python, tmp_path_factory):
    """Run a raising and a graceful training.

    Each gets a process of its own.
    """
    folder = tmp_path_factory.mktemp("halting")
    done = python.run(HERE / "halting_script.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_exit_status_is_that_of_a_failure_or_a_success(processes):
    assert int((processes / "raise" / "status").read_text()) == 1
    assert int((processes / "graceful" / "status").read_text()) == 0
    # The diagnosis comes last.
    said = (processes / "raise" / "stderr").read_text()
    assert "GradientHalt: The gradients or the loss are NaN or Inf, since step 8" in said
    assert "Traceback" not in (processes / "graceful" / "stderr").read_text()


@pytest.mark.parametrize(("stop", "status"), [("raise", "failed"), ("graceful", "success")])
def test_loggers_are_finalized_and_their_files_are_complete(processes, stop, status):
    folder = processes / stop
    assert (folder / "csv" / "finalized").read_text() == status
    rows = list(csv.DictReader((folder / "csv" / "metrics.csv").read_text().splitlines()))
    steps = {int(row["step"]) for row in rows if row["gradguard/total_norm_log10"]}
    assert steps >= {2, 5, BAD}  # every third, of which the last is the one that was halted
    assert [row["gradguard/skipped_total"] for row in rows if row["gradguard/skipped_total"]][-1] == "1.0"
    written = EventAccumulator(str(folder / "tb"), size_guidance={"tensors": 0}).Reload()
    assert [event.step for event in written.Scalars("gradguard/total_norm_log10")][-1] >= BAD
    text = make_ndarray(written.Tensors("gradguard/diagnosis")[-1].tensor_proto)[()].decode()
    assert "nonfinite" in text
    assert written.Images("0_gradguard/heatmap")


@pytest.mark.parametrize("stop", ["raise", "graceful"])
def test_checkpoints_of_a_process_have_finite_weights(processes, stop):
    files = list((processes / stop / "checkpoints").glob("*.ckpt"))
    assert len(files) >= BAD
    for file in files:
        saved = torch.load(file, weights_only=True)
        assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
        assert saved["global_step"] <= BAD + (stop == "graceful")
