"""Send the numbers to a logger of your own: this one keeps an alarm whenever a number exceeds its limit.

python examples/own_logger.py
"""

import warnings

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, GradientWarning


class Alarm(Logger):
    """Keep a line for each step at which a number exceeds its limit."""

    name, version, experiment = "alarm", 0, None

    def __init__(self, limits: dict[str, float]):
        super().__init__()
        self.limits, self.lines = limits, []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        for name, limit in self.limits.items():
            if metrics.get(name, limit) > limit:
                self.lines.append(f"step {step}: {name} is {metrics[name]:.3g}, above {limit:g}")


class Sigmoids(L.LightningModule):
    def __init__(self):
        super().__init__()
        layers = [layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
        self.net = nn.Sequential(*layers, nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> list[str]:
    L.seed_everything(0)
    x = torch.randn(640, 8)
    alarm = Alarm({"gradguard/depth_tilt_decades": 2.5, "gradguard/skipped_total": 0})
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=alarm, log_every_n_steps=10, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[GradGuard()],
    )  # fmt: skip
    trainer.fit(Sigmoids(), DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 16))
    print(*alarm.lines, sep="\n")
    return alarm.lines


if __name__ == "__main__":
    warnings.simplefilter("ignore", GradientWarning)
    main()
