"""Decoder-only transformer with pre-normalisation: the usual form of a language model, but small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lm.text import VOCABULARY

WIDTH, LAYERS, HEADS, CONTEXT = 48, 2, 4, 32


class Block(nn.Module):
    """Causal self-attention and a feed-forward part, each on a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_feed = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = (
            nn.Linear(WIDTH, 4 * WIDTH, bias=False),
            nn.Linear(4 * WIDTH, WIDTH, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm_feed(x))))


class LanguageModel(nn.Module):
    """Transformer that predicts the next token: int64 [B, T] to logits [B, T, VOCABULARY]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.apply(_start)
        for block in self.blocks:
            for last in (block.mix, block.down):
                nn.init.normal_(last.weight, std=0.02 / (2 * LAYERS) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, window: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats per token; ``window`` is int64 [B, T + 1]."""
        return self.cross_entropy(window[:, :-1], window[:, 1:])

    def cross_entropy(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the same for separate inputs and targets, int64 [B, T] each."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


def _start(module: nn.Module) -> None:
    """Apply GPT-2's initialisation."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
