"""Trained by two processes in test_ddp: a net whose gradients vanish, halted with remedies tried by each."""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradientHalt, Policy

folder, talks = Path(sys.argv[1]), json.loads(sys.argv[2])
warnings.simplefilter("ignore")


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.Sigmoid())]
        self.net = nn.Sequential(*layers, nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if talks:
            torch.distributed.all_reduce(loss.detach().clone())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


generator = torch.Generator().manual_seed(0)
x = torch.randn(2 * 150 * 8, 16, generator=generator)
data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=False)
guard = GradGuard(policy=Policy.strict(), trials=True)
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", strategy="ddp", devices=2, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[guard],
)  # fmt: skip
halted = None
try:
    trainer.fit(Module(), data)
except GradientHalt as halt:
    halted = halt.step
seen = {
    "halted": halted,
    "fault": guard.diagnosis.fault.value,
    "tried": [remedy.tried for remedy in guard.diagnosis.remedies],
    "trials": " ".join(guard.diagnosis.trials),
}
(folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))
