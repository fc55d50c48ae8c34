"""Trainings whose results test_interpreter compares between ways to start Python; prints them as JSON."""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, GradientHalt, Policy, Recorder, SpikeClip


class Net(pl.LightningModule):
    def __init__(self, bad):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.bad = (
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
            bad,
        )

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        return nn.functional.cross_entropy(out.log() if batch_idx in self.bad else out, batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(folder, bad, *callbacks):
    x = torch.randn(320, 8, generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[GradHistogram(every_n_steps=9), *callbacks], default_root_dir=folder,
    )  # fmt: skip
    module, guard = Net(bad), callbacks[0]
    try:
        trainer.fit(module, DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 8))
    except GradientHalt as halt:
        halted = str(halt).partition("Flight record")[0]
    else:
        halted = None
    return {
        "halted": halted,
        "summary": guard.summary,
        "findings": [str(finding) for finding in guard.findings],
        "diagnosis": guard.diagnosis and guard.diagnosis.to_markdown(),
        "report": str(guard.report),
        "weights": [p.tolist() for p in module.parameters()],
        "records": guard.bundle is not None,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    guards = [
        ((), GradGuard(trials=True)),
        ((7,), GradGuard(clipper=SpikeClip(), policy=Policy.protect(), per_layer=True)),
        ((7,), GradGuard(lag=1, policy=Policy.protect())),
        (range(9, 40), GradGuard(policy=Policy.strict(), trials=True, recorder=Recorder())),
    ]
    print(json.dumps([fit(folder / str(number), bad, guard) for number, (bad, guard) in enumerate(guards)]))
