"""Trainings that test_resume interrupts.

They run whole, or from their checkpoints in a new process.

``python resume_script.py FOLDER NAME...`` goes on from ``FOLDER/NAME.ckpt``, and writes what came of it beside it.
"""

import inspect
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    GradGuard,
    GradientHalt,
    NormClip,
    Policy,
    SpikeClip,
    SteadyClip,
    ZClip,
)
from lightning_gradguard.detectors.depth import DepthTilt, TimeTilt
from lightning_gradguard.detectors.explosion import Exploding, NonFinite, Spike
from lightning_gradguard.detectors.inactivity import DeadUnits, Disconnected, Underflow
from lightning_gradguard.detectors.updates import Stalled, UpdateRatio
from lightning_gradguard.testing import DeadRows, FaultInjector, NaN
from lightning_gradguard.testing import Spike as Spiked

BATCHES, EPOCHS = 35, 2
#: Whether Lightning, going on within an epoch, takes the batch again at whose end it was saved, and ends the epoch
#: twice for a schedule. Then it is saved where the next batch begins, and there is no schedule.
TWICE = Version(pl.__version__) < Version("2.5")


class Net(pl.LightningModule):
    """Small net whose batches follow from their number.

    A resumed run sees the same ones.
    """

    def __init__(self, kind="plain", lr=0.05, optimizer=torch.optim.Adam):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.lr, self.optimizer = kind, lr, optimizer
        depth = 12 if kind in ("saturated", "amplified") else 2
        activation = {"saturated": nn.Sigmoid, "amplified": nn.Identity}.get(kind, nn.ReLU)
        layers = [part for _ in range(depth) for part in (nn.Linear(8, 8), activation())]
        self.body = nn.Sequential(*layers, nn.BatchNorm1d(8) if kind == "plain" else nn.Identity())
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.cell, self.head = nn.RNN(2, 8, batch_first=True), nn.Linear(8, 2)
        with torch.no_grad():
            if kind == "recurrent":
                self.cell.weight_hh_l0.copy_(0.3 * torch.eye(8))
            if kind == "amplified":
                for layer in self.body[:-1:2]:
                    nn.init.orthogonal_(layer.weight)

    def training_step(self, batch, number):
        random = torch.Generator().manual_seed(number + 1000 * self.trainer.current_epoch)
        x = torch.randn(16, 8, generator=random)
        if self.kind == "recurrent":
            x = torch.randn(16, 60, 2, generator=random)
            return nn.functional.cross_entropy(self.head(self.cell(x)[0][:, -1]), (x[:, 0, 0] > 0).long())
        hidden = x.to(self.head.weight.dtype)
        for part in self.body:
            hidden = part(hidden)
            if self.kind == "amplified" and isinstance(part, nn.Linear):
                hidden = 2 * hidden - hidden.detach()  # doubles the gradient alone
        if self.kind == "cut":
            hidden = hidden.detach()
        if self.kind == "experts":
            hidden = self.experts[number // 2 % 2](hidden)
        loss = nn.functional.cross_entropy(self.head(hidden), (x.sum(1) > 0).long())
        return loss * (1e-38 if self.kind == "tiny" else 1.0)

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=self.lr)
        return [optimizer], [] if TWICE else [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Follow(pl.Callback):
    """Callback that records results and saves a checkpoint.

    It is saved after ``at`` steps, or five after the first finding.
    """

    def __init__(self, guard, path, at):
        self.guard, self.path, self.at = guard, path, at
        self.saved, self.reports, self.known, self.due = 0, [], 0, False

    def on_train_batch_start(self, trainer, *_):
        if self.due and TWICE:
            self.save(trainer)

    def on_train_batch_end(self, trainer, module, *_):
        step = trainer.global_step
        self.reports.append((step, repr(self.guard.report)))
        if self.at is None and self.guard.findings:
            self.at = step + 5
        if step == self.at and not self.saved and self.path is not None:
            self.saved, self.known, self.due = step, len(self.guard.findings), True
            if not TWICE:
                self.save(trainer)

    def save(self, trainer):
        self.due = False
        trainer.save_checkpoint(self.path)


def fused(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def decaying(parameters, lr):
    """Return AdamW with strong weight decay.

    Each update is large beside its weights, which stay too small to learn anything.
    """
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=40.0)


def nan(*steps):
    return FaultInjector(NaN(at=steps, parameters="head.weight"))


def spikes(*steps):
    return FaultInjector(Spiked(at=steps, factor=1e4))


def one(detector):
    return {"detectors": [detector]}


BACK = Policy(respond={"nonfinite": "rollback"}, max_consecutive_skips=1, snapshot_every=10, max_rollbacks=2)
HALT = Policy(max_consecutive_skips=3)
CLIP = Policy(respond={"spike": "clip"}, patience=6)
CLIPPERS = [
    NormClip(0.5), AGC(), AutoClip(), ZClip(warmup_steps=5), AdaGC(warmup_steps=5), SpikeClip(),
    SteadyClip(),
    SpikeClip(exclude=("head.*",)),
]  # fmt: skip
DEAD = FaultInjector(DeadRows(at=range(5, 70), parameters="body.*"))

#: Name to net, guard, what goes wrong, and when it is saved; with None in the middle of the first episode.
CASES = {
    "NonFinite": ({}, one(NonFinite()), [nan(10, 11, 12, 13)], 12),
    "Spike": ({}, one(Spike()), [spikes(30, 37)], None),
    "Exploding": ({"kind": "amplified", "lr": 1e-6}, one(Exploding()), [], None),
    "DepthTilt": ({"kind": "saturated", "lr": 1e-4}, one(DepthTilt()), [], None),
    "TimeTilt": ({"kind": "recurrent", "lr": 1e-6}, one(TimeTilt()), [], None),
    "DeadUnits": ({"lr": 1e-6}, one(DeadUnits()), [DEAD], None),
    "Disconnected": ({"kind": "cut"}, one(Disconnected()), [], None),
    "Underflow": ({"kind": "tiny"}, one(Underflow()), [], None),
    "UpdateRatio": ({"lr": 0.01, "optimizer": decaying}, one(UpdateRatio()), [], None),
    "Stalled": ({"lr": 1e-12}, one(Stalled()), [], None),
    "all": ({"kind": "saturated", "lr": 1e-4}, {}, [nan(33, 50), spikes(40)], 47),
    "experts": ({"kind": "experts"}, {}, [nan(33)], 41),
    "SGD": ({"optimizer": torch.optim.SGD}, {"clipper": SpikeClip()}, [nan(20, 33), spikes(40)], 30),
    "accumulated": ({}, {"clipper": SpikeClip()}, [nan(6, 10), spikes(15)], 8),
    "rollback": ({}, {"policy": BACK}, [nan(24, 25, 55, 56)], 36),
    "halt": ({}, {"policy": HALT}, [nan(*range(30, 60))], 32),
    "clip": ({}, {"policy": CLIP, "clipper": AutoClip()}, [nan(33), spikes(31, 50)], 35),
    **{repr(c): ({}, {"clipper": c}, [nan(20, 45), spikes(31, 34, 50)], 33) for c in CLIPPERS},
}
#: The same judged one step late; each is saved while a step is under way.
LATE = {
    f"{name}, late": ({**net, "optimizer": fused}, {**guard, "lag": 1}, more, at)
    for name, (net, guard, more, at) in CASES.items()
    if name in ("NonFinite", "DepthTilt", "all", "halt", "clip", *map(repr, CLIPPERS[4:7]))
}


def file_of(folder, name):
    return folder / f"{[*CASES, *LATE].index(name):02d}.ckpt"


def train(name, folder, *, resumed, guard=None):
    """Train a case; return reports and outcome.

    Args:
        name: Of the case.
        folder: Where its checkpoint is.
        resumed: Whether to go on from the checkpoint, or to begin and leave one.
        guard: In place of the case's own.
    """
    net, arguments, faults, at = {**CASES, **LATE}[name]
    guard = guard or GradGuard(**{"policy": Policy(patience=20), **arguments})
    path, module = file_of(folder, name), Net(**net)
    follow = Follow(guard, None if resumed else path, at)
    if resumed:
        for p in module.parameters():
            nn.init.zeros_(p)  # what is right comes from the checkpoint
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[*faults, guard, follow],
        accumulate_grad_batches=2 if name == "accumulated" else 1,
        precision="bf16-true" if name == "Underflow" else "32-true",
    )  # fmt: skip
    source = {"ckpt_path": path} if resumed else {}
    if resumed and "weights_only" in inspect.signature(trainer.fit).parameters:
        source["weights_only"] = True
    halted = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(module, DataLoader(range(BATCHES), batch_size=None), **source)
        except GradientHalt as halt:
            halted = halt.step
    return {
        "saved": follow.saved, "reports": follow.reports, "known": follow.known,
        "findings": [repr(finding) for finding in guard.findings], "halted": halted,
        "stop_reason": guard.stop_reason, "summary": guard.summary, "state": repr(guard.state_dict()),
        "weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(),
    }  # fmt: skip


def main(folder, names):
    torch.set_num_threads(1)
    for name in names:
        torch.save(train(name, folder, resumed=True), file_of(folder, name).with_suffix(".pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
