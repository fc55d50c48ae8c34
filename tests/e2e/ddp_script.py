"""Trained by two processes in test_ddp; each writes what it saw to a file of its own."""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradientHalt, Policy, SpikeClip

folder, bad, policy = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
warnings.simplefilter("ignore")


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        self.reports = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        # Only the second process sees the bad batch.
        if batch_idx in bad and self.global_rank == 1:
            x = x * float("nan")
        return nn.functional.cross_entropy(self.net(x), y)

    def on_train_batch_end(self, *_):
        report = guard.report
        self.reports.append([report.step, report.loss, report.total_norm, report.clipped_norm, report.skip])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


generator = torch.Generator().manual_seed(0)
x = torch.randn(2 * 30 * 8, 8, generator=generator)
data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=False)
guard = GradGuard(clipper=SpikeClip(), policy=getattr(Policy, policy)())
module = Module()
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", strategy="ddp", devices=2, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[guard],
)  # fmt: skip
halted = None
try:
    trainer.fit(module, data)
except GradientHalt as halt:
    halted = halt.step
seen = {
    "reports": module.reports,
    "findings": [[f.fault.value, f.step, list(f.parameters)] for f in guard.findings],
    "halted": halted,
    "summary": guard.summary,
    "weights": [p.flatten().tolist() for p in module.parameters()],
}
(folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))
