"""Models whose gradients are measured: transformers of several sizes, and plain lists of tensors."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Block(nn.Module):
    """Causal self-attention and a feed-forward part, each on a residual path: 12 tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 32)
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_feed(x))))


class Transformer(nn.Module):
    """Transformer that predicts the next token with tied embeddings: int64 [B, T] to logits [B, T, vocabulary].

    Args:
        layers: Number of blocks.
        width: Width of the residual path.
        vocabulary: Number of tokens.
        context: Longest T with learned positions; 0 for none, since a causal mask also gives order.
    """

    def __init__(self, layers: int, width: int, vocabulary: int, context: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(context, width) if context else None
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.place is not None:
            x = x + self.place.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embed.weight)


class Training(L.LightningModule):
    """Next-token training with AdamW."""

    def __init__(self, net: Transformer, rate: float = 1e-3) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def training_step(self, window: Tensor) -> Tensor:
        loss = F.cross_entropy(self.net(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


def loader(batch: int, length: int, vocabulary: int, batches: int = 32) -> DataLoader[Tensor]:
    """Return batches of windows int64 [B, T + 1] that can be learned: each token mostly decides the next one."""
    rng = torch.Generator().manual_seed(0)
    follower = torch.randperm(vocabulary, generator=rng)
    columns = [torch.randint(vocabulary, (batches, batch), generator=rng)]
    for _ in range(length):
        strays = torch.randint(vocabulary, (batches, batch), generator=rng)
        strayed = torch.rand((batches, batch), generator=rng) < 0.1
        columns.append(torch.where(strayed, strays, follower[columns[-1]]))
    return DataLoader(list(torch.stack(columns, 2)), batch_size=None)


def tensors(shapes: list[tuple[int, ...]]) -> nn.ParameterList:
    """Return parameters of these shapes."""
    return nn.ParameterList([nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes])
