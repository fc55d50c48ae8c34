"""Build the guard with its clipper, detectors, policy and recorder from config.yaml, with LightningCLI.

python examples/cli.py fit --config examples/config.yaml
python examples/cli.py fit --config examples/config.yaml --print_config
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(L.LightningModule):
    def __init__(self, width: int = 64):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


class Digits(L.LightningDataModule):
    def __init__(self, batch_size: int = 32):
        super().__init__()
        pixels, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
        self.train, self.val = torch.utils.data.random_split(data, [1437, 360])
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 360)


def main(args: list[str] | None = None) -> LightningCLI:
    return LightningCLI(Classifier, Digits, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
