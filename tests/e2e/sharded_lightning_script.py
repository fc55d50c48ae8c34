"""Lightning trainings under FSDP2, for test_sharded.

Each of two processes writes its results.
"""

import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradientHalt, Policy, SpikeClip

STEPS, SAVED, ROWS = 30, 14, 8


class Module(pl.LightningModule):
    """Sigmoid layers, whose gradients vanish.

    The second process's batch is NaN at the steps ``bad``.

    Args:
        guard: Whose reports are written down.
        bad: Steps.
        path: Where a checkpoint goes after step `SAVED`, or None.
    """

    def __init__(self, guard, bad=(), path=None):
        super().__init__()
        torch.manual_seed(0)
        layers = [layer for _ in range(8) for layer in (nn.Linear(9, 9), nn.Sigmoid())]
        self.net = nn.Sequential(*layers, nn.Linear(9, 1))
        self.guard, self.bad, self.path = [guard], bad, path
        self.reports = []

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None and not hasattr(self.net[0].weight, "placements"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        # By the step and not by the loader, which begins anew where a training goes on within an epoch.
        ranks, step = self.trainer.world_size, self.trainer.global_step
        x = torch.randn(ROWS, 9, generator=torch.Generator().manual_seed(step))[self.global_rank :: ranks]
        loss = (self.net(x).squeeze(1) - x.sum(1)).square().mean()
        return loss * math.nan if step in self.bad and self.global_rank == ranks - 1 else loss

    def on_train_batch_end(self, *_):
        report = self.guard[0].report
        self.reports.append(
            [str(n) for n in (report.step, report.loss, report.total_norm, report.clipped_norm)]
        )
        self.reports[-1].append(report.skip)
        if self.trainer.global_step == SAVED and self.path is not None:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(guard, *, bad=(), path=None, resume=None, steps=STEPS, **kwargs):
    """Train, and return the results.

    Args:
        guard: The callback.
        bad: Steps whose batch is NaN.
        path: Where a checkpoint goes.
        resume: Where one comes from.
        steps: Most steps.
        kwargs: Of the trainer.
    """
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[guard], **kwargs,
    )  # fmt: skip
    module, halted = Module(guard, bad, path), None
    loader = DataLoader(TensorDataset(torch.zeros(trainer.world_size * steps)), batch_size=1)
    try:
        trainer.fit(module, loader, ckpt_path=resume)
    except GradientHalt as halt:
        halted = halt.step
    return {
        "rank": trainer.global_rank,
        "reports": module.reports,
        "halted": halted,
        "findings": [[f.fault.value, f.severity, f.step, list(f.parameters)] for f in guard.findings],
        "diagnosis": str(guard.diagnosis),
        "trials": " ".join(guard.diagnosis.trials) if guard.diagnosis is not None else "",
    }


def protecting():
    return GradGuard(clipper=SpikeClip(), policy=Policy.protect())


def stopping():
    return GradGuard(policy=replace(Policy.strict(), patience=5), trials=True)


def main(folder):
    def sharded():
        return {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "devices": 2}

    saved = folder / "checkpoint"
    seen = {
        "through": fit(protecting(), bad=(5,), path=saved, **sharded()),
        "resumed": fit(protecting(), resume=saved, **sharded()),
        "stopped": fit(stopping(), steps=60, **sharded()),
    }
    (folder / f"rank{seen['through']['rank']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
