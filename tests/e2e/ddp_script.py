"""Trainings of two processes, for test_ddp.

Each process writes its results to a file of its own.
"""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradientHalt, NormClip, Policy, SpikeClip
from lightning_gradguard.testing import FaultInjector, Spike


class Protected(pl.LightningModule):
    """Net that gets NaN in the second process, in batches ``bad``."""

    def __init__(self, bad, guard):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        self.bad, self.guard, self.reports = bad, guard, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx in self.bad and self.global_rank == 1:
            x = x * float("nan")
        return nn.functional.cross_entropy(self.net(x), y)

    def on_train_batch_end(self, *_):
        report = self.guard.report
        self.reports.append([report.step, report.loss, report.total_norm, report.clipped_norm, report.skip])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Vanishing(pl.LightningModule):
    """Net whose gradients vanish; its step may communicate."""

    def __init__(self, talks):
        super().__init__()
        torch.manual_seed(0)
        layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.Sigmoid())]
        self.net, self.talks = nn.Sequential(*layers, nn.Linear(16, 2)), talks

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if self.talks:
            torch.distributed.all_reduce(loss.detach().clone())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, guard, batches, width, *callbacks):
    """Train; return the trainer and the step of the halt."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * batches * 8, width, generator=generator)
    data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=False)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", strategy="ddp", devices=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, guard],
    )  # fmt: skip
    try:
        trainer.fit(module, data)
    except GradientHalt as halt:
        return trainer, halt.step
    return trainer, None


def protect(bad, policy):
    guard = GradGuard(clipper=SpikeClip(), policy=getattr(Policy, policy)())
    module = Protected(bad, guard)
    trainer, halted = fit(module, guard, batches=30, width=8)
    return trainer, {
        "reports": module.reports,
        "findings": [[f.fault.value, f.step, list(f.parameters)] for f in guard.findings],
        "halted": halted,
        "summary": guard.summary,
        "weights": [p.flatten().tolist() for p in module.parameters()],
    }


def clip_spikes(at):
    """The spike is in the gradients of the second process alone, before they are averaged."""
    guard = GradGuard(clipper=NormClip(1e-3), policy=Policy(respond={"spike": "clip"}, patience=4))
    module = Protected([], guard)
    trainer, _ = fit(module, guard, 60, 8, FaultInjector(Spike(at=at, factor=1e4, rank=1)))
    return trainer, {
        "reports": module.reports,
        "spans": guard._registry.guards[0].clip_spans,
        "weights": [p.flatten().tolist() for p in module.parameters()],
    }


def try_fixes(talks):
    guard = GradGuard(policy=Policy.strict(), trials=True)
    trainer, halted = fit(Vanishing(talks), guard, batches=150, width=16)
    return trainer, {
        "halted": halted,
        "fault": guard.diagnosis.fault.value,
        "tried": [remedy.tried for remedy in guard.diagnosis.remedies],
        "trials": " ".join(guard.diagnosis.trials),
    }


warnings.simplefilter("ignore")
folder, case, arguments = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
trainer, seen = {"protect": protect, "clip_spikes": clip_spikes, "try_fixes": try_fixes}[case](*arguments)
(folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))
