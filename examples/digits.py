"""Classify images with Lightning: two callbacks give histograms, a heat map and adaptive clipping.

python examples/digits.py && tensorboard --logdir runs
"""

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradHistogram, Policy, SteadyClip


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(epochs: int = 8) -> float:
    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
    train, val = torch.utils.data.random_split(data, [1437, 360])
    guard = GradGuard(clipper=SteadyClip(), policy=Policy.protect())
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=TensorBoardLogger("runs", name="digits"),
        callbacks=[GradHistogram(every_n_steps=20), guard], enable_checkpointing=False, log_every_n_steps=5,
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(train, 32, shuffle=True), DataLoader(val, 360))
    accuracy = trainer.callback_metrics["val_acc"].item()
    print(f"{guard.summary}; {100 * accuracy:.1f} % of the validation images are right")
    return accuracy


if __name__ == "__main__":
    main()
