"""Train a GAN with manual optimization and two optimizers: each is judged and clipped by itself.

python examples/gan.py && tensorboard --logdir runs     # groups gradguard and gradguard_1
"""

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, SteadyClip


def net(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, outputs)
    )


class Gan(L.LightningModule):
    """Learn to draw points of a ring."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = net(8, 2), net(2, 1)

    def training_step(self, batch, batch_idx):
        (real,) = batch
        generator, critic = self.optimizers()
        fake = self.generator(torch.randn(len(real), 8, device=self.device))
        ones = torch.ones(len(real), 1, device=self.device)

        loss = cross_entropy(self.critic(real), 0.9 * ones) + cross_entropy(
            self.critic(fake.detach()), 0 * ones
        )
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()

        loss = cross_entropy(self.critic(fake), ones)
        generator.zero_grad()
        self.manual_backward(loss)
        generator.step()

    def configure_optimizers(self):
        options = {"lr": 1e-3, "betas": (0.5, 0.9)}
        return (
            torch.optim.Adam(self.generator.parameters(), **options),
            torch.optim.Adam(self.critic.parameters(), **options),
        )


def main(epochs: int = 20) -> tuple[float, GradGuard]:
    L.seed_everything(0)
    angles = 6.2832 * torch.rand(4096, 1)
    points = torch.cat([angles.cos(), angles.sin()], 1) + 0.02 * torch.randn(4096, 2)
    guard = GradGuard(clipper=SteadyClip())
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=TensorBoardLogger("runs", name="gan"),
        callbacks=[guard], enable_checkpointing=False, log_every_n_steps=10,
    )  # fmt: skip
    model = Gan()
    trainer.fit(model, DataLoader(TensorDataset(points), 64, shuffle=True))
    with torch.no_grad():
        radius = model.generator(torch.randn(1000, 8)).norm(dim=1)
    print(f"{guard.summary}; radius {radius.mean():.2f} ± {radius.std():.2f}, where 1 is right")
    return radius.mean().item(), guard


if __name__ == "__main__":
    main()
