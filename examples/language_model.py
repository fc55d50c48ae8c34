"""Train a small character-level language model; every fiftieth gradient is 1,000 times too large, and is clipped.

python examples/language_model.py
"""

import math
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_gradguard import GradGuard, SteadyClip, testing

TEXT = Path(__file__).parents[1] / "LICENSE"
LENGTH = 64


class Windows(Dataset):
    """Pieces of a text; inputs are all characters but the last, targets all but the first."""

    def __init__(self, text: str):
        self.characters = sorted(set(text))
        self.tokens = torch.tensor([self.characters.index(c) for c in text])

    def __len__(self):
        return len(self.tokens) - LENGTH - 1

    def __getitem__(self, start):
        return self.tokens[start : start + LENGTH], self.tokens[start + 1 : start + LENGTH + 1]


class LanguageModel(L.LightningModule):
    def __init__(self, vocabulary: int, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(LENGTH, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def training_step(self, batch, batch_idx):
        tokens, targets = batch
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        h = self.layers(self.embedding(tokens) + self.position, mask=mask, is_causal=True)
        loss = nn.functional.cross_entropy(self.head(h).flatten(0, 1), targets.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 400) -> tuple[float, GradGuard]:
    L.seed_everything(0)
    data = Windows(TEXT.read_text())
    guard = GradGuard(clipper=SteadyClip())
    # Imitate corrupt batches, at known steps.
    corrupt = testing.FaultInjector(testing.Spike(at=range(50, steps, 50), factor=1e3))
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[guard, corrupt],
    )  # fmt: skip
    model = LanguageModel(len(data.characters))
    trainer.fit(model, DataLoader(data, 16, shuffle=True))
    loss = trainer.callback_metrics["loss"].item()
    even = math.log(len(data.characters))
    print(f"{guard.summary}; loss {loss:.2f}, where guessing among all characters gives {even:.2f}")
    return loss, guard


if __name__ == "__main__":
    main()
