"""Watching changes no bit of a training.

Weights, optimizer, random numbers and loss scale are compared.
"""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, Policy, Recorder

#: Of ``torch.compile``, and of what checkpointing does to autograd.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning"),
    pytest.mark.filterwarnings("ignore:Using `torch.compile"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning"),
]


class Net(pl.LightningModule):
    """Net with batch norm, dropout and more."""

    def __init__(self, optimizer=torch.optim.AdamW, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.optimizer, self.parts = optimizer, parts
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        self.norm, self.dropout, self.tied = nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 16)
        self.recurrent = nn.GRU(4, 8, batch_first=True)
        if parts.get("shared"):
            self.tied.weight = self.second.weight
        if parts.get("frozen"):
            self.first.requires_grad_(False)
        self.body = torch.compile(self.hidden, backend="eager") if parts.get("compiled") else self.hidden

    def hidden(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.dropout(torch.tanh(self.second(x)))

    def training_step(self, batch, number):
        x, y = batch
        if self.parts.get("recurrent"):
            x = self.recurrent(x.reshape(-1, 2, 4).repeat(1, 8, 1))[0][:, -1]
        hidden = checkpoint(self.body, x, use_reentrant=False) if self.parts.get("again") else self.body(x)
        loss = nn.functional.cross_entropy(self.last(torch.tanh(self.tied(hidden))), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=1e-2)


def fused(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


#: Name to the net's parts, the Trainer's options, and the guard's.
CASES = {
    "32": ({}, {}, {}),
    "64": ({}, {"precision": "64-true"}, {}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}, {}),
    "bf16-true": ({}, {"precision": "bf16-true"}, {}),
    "fp16": ({}, {"scale": 2.0**14}, {}),
    "fp16, overflowing": ({}, {"scale": 2.0**40}, {}),
    "fp16, fused": ({"optimizer": fused}, {"scale": 2.0**14}, {}),
    "accumulated": ({}, {"accumulate_grad_batches": 4}, {}),
    "accumulated, fp16": ({}, {"accumulate_grad_batches": 4, "scale": 2.0**14}, {}),
    "clipped by Lightning": ({}, {"gradient_clip_val": 0.1}, {}),
    "LBFGS": ({"optimizer": torch.optim.LBFGS}, {}, {}),
    "fused": ({"optimizer": fused}, {}, {}),
    "fused, late": ({"optimizer": fused}, {}, {"lag": 1}),
    "late": ({}, {}, {"lag": 1}),
    "compiled": ({"compiled": True}, {}, {}),
    "checkpointed": ({"again": True}, {}, {}),
    "shared": ({"shared": True}, {}, {}),
    "frozen": ({"frozen": True}, {}, {}),
    "recurrent": ({"recurrent": True}, {}, {"trials": True}),
    "trials": ({}, {}, {"trials": True}),
    "recorder": ({}, {}, {"recorder": Recorder(on=("halt", "exception", "sigterm"))}),
    "rollback": ({}, {}, {"policy": Policy(respond={"exploding": "rollback"}, snapshot_every=7)}),
    "strict": ({}, {}, {"policy": Policy(respond={"nonfinite": "halt"})}),
    "all at once": (
        {"again": True, "shared": True, "frozen": True, "recurrent": True},
        {"accumulate_grad_batches": 2, "scale": 2.0**14},
        {"trials": True, "recorder": Recorder(), "policy": Policy(respond={"exploding": "rollback"})},
    ),
}


#: Those left to `make test-long`: each is near another one.
SLOW = [
    "64",
    "bf16-mixed",
    "fp16, fused",
    "accumulated, fp16",
    "fused",
    "checkpointed",
    "shared",
    "frozen",
    "strict",
]


def train(folder, parts, options, guard=None):
    """Return all that a training leaves.

    It may have a guard and histograms of both kinds.
    """
    callbacks = []
    if guard is not None:
        callbacks = [GradHistogram(every_n_steps=3, exponents=True), guard]
        callbacks += [GradHistogram(every_n_steps=4, axis="value")]
    options = dict(options)
    scale = options.pop("scale", None)
    if scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=7)
        options["plugins"] = MixedPrecision("16-mixed", "cpu", scaler)
    torch._dynamo.reset()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=TensorBoardLogger(folder), log_every_n_steps=5,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
        **options,
    )  # fmt: skip
    module = Net(**parts)
    x = torch.randn(16 * 40, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    trainer.fit(module, DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 16, shuffle=True))
    return {
        "weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(),
        "random": torch.rand(3), "logged": trainer.logged_metrics, "scaler": trainer.precision_plugin.state_dict(),
    }  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_training_is_bit_for_bit_as_without(case, tmp_path):
    parts, options, arguments = CASES[case]
    guard = GradGuard(**arguments)
    bare, watched = train(tmp_path / "bare", parts, options), train(tmp_path, parts, options, guard)
    torch.testing.assert_close(watched, bare, rtol=0, atol=0)
    assert guard.summary["judged"] >= 10
    if "overflowing" in case:
        assert guard.summary["skipped"] > 10
    elif (
        "scale" not in options
    ):  # a scaler that has raised its scale too far skips a step, and would without us
        assert guard.summary["skipped"] == 0
