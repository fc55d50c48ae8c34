"""Fine-tune a model: frozen layers are not judged; once they are unfrozen, they are.

python examples/fine_tuning.py
"""

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import GradGuard, Policy, SteadyClip


class Unfreeze(BaseFinetuning):
    """Train the head alone at first, and from an epoch on the body as well, at a tenth of the rate."""

    def __init__(self, epoch: int):
        super().__init__()
        self.epoch = epoch
        self.judged = {}

    def freeze_before_training(self, module):
        self.freeze(module.body)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(module.body, optimizer, initial_denom_lr=10)

    def on_train_epoch_end(self, trainer, module):
        guard = next(c for c in trainer.callbacks if isinstance(c, GradGuard))
        self.judged[trainer.current_epoch] = list(guard.report.norms)


class Classifier(L.LightningModule):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.head = body, nn.Linear(64, 5)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def loader(classes: range) -> DataLoader:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    chosen = (y >= classes.start) & (y < classes.stop)
    return DataLoader(TensorDataset(x[chosen], y[chosen] - classes.start), 32, shuffle=True)


def main(epochs: int = 6) -> tuple[dict, GradGuard]:
    L.seed_everything(0)
    body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    L.Trainer(max_epochs=epochs, **options).fit(Classifier(body), loader(range(5)))
    unfreeze, guard = Unfreeze(epochs // 2), GradGuard(clipper=SteadyClip(), policy=Policy.protect())
    trainer = L.Trainer(max_epochs=epochs, callbacks=[unfreeze, guard], **options)
    trainer.fit(Classifier(body), loader(range(5, 10)))
    print(f"judged in epoch 0: {unfreeze.judged[0]}")
    print(f"judged in epoch {epochs - 1}: {unfreeze.judged[epochs - 1]}")
    print(f"{guard.summary}, found: {guard.findings}; loss {trainer.callback_metrics['loss']:.3f}")
    return unfreeze.judged, guard


if __name__ == "__main__":
    main()
