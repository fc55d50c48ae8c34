"""The models of the tasks, small and in the usual form of their kind."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clipping_tasks.data import IMAGE, VOCABULARY

WIDTH, LAYERS, HEADS, CONTEXT = 48, 2, 4, 24


class Block(nn.Module):
    """Self-attention and a feed-forward part, each on a residual path with pre-normalization."""

    def __init__(self, width: int = WIDTH, *, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.up, self.down = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, HEADS, width // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.mix(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_feed(x))))


class LanguageModel(nn.Module):
    """Decoder-only transformer with GPT-2's initialization: int64 [B, T] to logits [B, T, VOCABULARY]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            for last in (block.mix, block.down):
                nn.init.normal_(last.weight, std=0.02 / (2 * LAYERS) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class CharacterGRU(nn.Module):
    """Recurrent character model: int64 [B, T] to logits [B, T, VOCABULARY]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.recurrent = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.recurrent(self.embed(tokens))[0])
        return logits


class Mixer(nn.Module):
    """MLP-Mixer of two blocks on patches of 2 x 2: [B, 64] to logits [B, 10]."""

    def __init__(self, width: int = 32, patches: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm_tokens": nn.LayerNorm(width),
                    "tokens": _mlp(patches, 2 * patches),
                    "norm_channels": nn.LayerNorm(width),
                    "channels": _mlp(width, 2 * width),
                }
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        images = pixels.view(-1, IMAGE // 2, 2, IMAGE // 2, 2).transpose(2, 3).reshape(len(pixels), -1, 4)
        x = self.embed(images)
        for block in self.blocks:
            x = x + block["tokens"](block["norm_tokens"](x).transpose(1, 2)).transpose(1, 2)  # type: ignore[index]
            x = x + block["channels"](block["norm_channels"](x))  # type: ignore[index]
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class CNN(nn.Module):
    """Plain convolutions without normalization: [B, 64] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(pixels.view(-1, 1, IMAGE, IMAGE)))
        return logits


class Regressor(nn.Module):
    """Plain MLP: [B, inputs] to [B]."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.head(self.body(x)).squeeze(-1)
        return values


class SequenceRegressor(nn.Module):
    """Transformer encoder that maps a series to one number: [B, T] to [B]."""

    def __init__(self, length: int, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(1, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, series: Tensor) -> Tensor:
        x = self.blocks(self.embed(series.unsqueeze(-1)) + self.place)
        values: Tensor = self.head(self.norm(x).mean(1)).squeeze(-1)
        return values


class Denoiser(nn.Module):
    """MLP with residual blocks and the noise level as input: [B, 64] and [B] to the noise [B, 64]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(IMAGE * IMAGE, width), nn.Linear(32, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), *_mlp(width, 2 * width)) for _ in range(3)
        )
        self.head = nn.Linear(width, IMAGE * IMAGE)

    def forward(self, noisy: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(torch.linspace(0, math.log(1000), 16))
        x = self.embed(noisy) + self.time(torch.cat([angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            x = x + block(x)
        noise: Tensor = self.head(x)
        return noise


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
