"""Train with two processes under DDP: only one of them meets a NaN, and both skip the same step.

python examples/distributed.py
"""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, Policy, SteadyClip, testing


class Regressor(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main() -> None:
    L.seed_everything(0)
    x = torch.randn(640, 8)
    guard = GradGuard(clipper=SteadyClip(), policy=Policy.protect())
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", strategy="ddp", devices=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[guard, testing.FaultInjector(testing.NaN(at=7, rank=1))],
    )  # fmt: skip
    trainer.fit(Regressor(), DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 16))
    skipped = [finding.step for finding in guard.findings]
    # One call writes the whole line, so that the processes' lines do not mix.
    print(
        f"process {trainer.global_rank}: skipped step {skipped} of {guard.summary['judged']}\n",
        end="",
        flush=True,
    )


if __name__ == "__main__":
    main()
