"""Halt on a loss that one row makes infinite, and replay the step from its flight record.

python examples/flight_recorder.py
"""

import warnings
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradientHalt, GradientWarning, Policy, Recorder, Replay, replay


class Model(L.LightningModule):
    """A classifier whose loss takes the logarithm of a probability that can be zero."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        probabilities = self.net(x).softmax(1)
        return -probabilities[torch.arange(len(y)), y].log().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(320, 8, generator=generator)
    y = (x.sum(1) > 0).long()
    # Far too large and wrongly labelled: the probability of its label is rounded to zero.
    x[165], y[165] = 1e4 * x[165], 1 - y[165]
    return DataLoader(TensorDataset(x, y), 16)


def main(folder: Path = Path("flights")) -> Replay:
    L.seed_everything(0)
    guard = GradGuard(policy=Policy.strict(), recorder=Recorder(folder=folder))
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[guard],
    )  # fmt: skip
    try:
        trainer.fit(Model(), data())
    except GradientHalt as halt:
        print(f"Halted before step {halt.step}; the record is {guard.bundle}.\n")

    # Later, on any machine: the file holds plain types and tensors, and reading it runs no code.
    record = torch.load(guard.bundle, weights_only=True)
    print(f"It holds: {', '.join(record)}.\n")
    # The same, run in this folder, as `gradguard replay flights/step-00000010.pt --module flight_recorder:Model`.
    answer = replay(guard.bundle, Model())
    print(answer)
    return answer


if __name__ == "__main__":
    warnings.simplefilter("ignore", GradientWarning)
    main()
