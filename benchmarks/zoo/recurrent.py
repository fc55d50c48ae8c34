"""Nets on sequences, sets and graphs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.models import Init, initialise


class Recurrent(nn.Module):
    """Recurrent layer and a head on its last state.

    Args:
        kind: ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``.
        inputs: Number of features of a step.
        outputs: Number of outputs.
        width: Size of the hidden state.
        recurrent: Initialisation of the recurrent matrices.
        forget: Bias of an LSTM's forget gate.
        relu: Use ReLU instead of tanh in an ``nn.RNN``.
    """

    def __init__(
        self,
        kind: type[nn.RNNBase],
        inputs: int,
        outputs: int,
        *,
        width: int = 24,
        recurrent: Init | None = None,
        forget: float | None = None,
        relu: bool = False,
    ) -> None:
        super().__init__()
        options = {"nonlinearity": "relu"} if relu else {}
        self.rnn = kind(inputs, width, batch_first=True, **options)
        self.head = nn.Linear(width, outputs)
        with torch.no_grad():
            if recurrent is not None:
                recurrent(self.rnn.weight_hh_l0)
            if forget is not None:
                self.rnn.bias_ih_l0[width : 2 * width] = forget
                self.rnn.bias_hh_l0[width : 2 * width] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    """Self-attention with one head of full width; ``sharpness`` multiplies the logits."""

    def __init__(self, width: int, *, sharpness: float = 1.0, causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.scale, self.causal = sharpness / math.sqrt(width), causal

    def forward(self, x: Tensor) -> Tensor:
        logits = self.scale * self.q(x) @ self.k(x).transpose(-1, -2)
        if self.causal:
            ones = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device)
            logits = logits.masked_fill(ones.triu(1), -math.inf)
        return self.out(torch.softmax(logits, -1) @ self.v(x))


class Transformer(nn.Module):
    """Pre-LN transformer on tokens [B, T] or vectors [B, T, F]; ``pooled`` returns its last step only."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        layers: int = 2,
        width: int = 32,
        tokens: bool = True,
        pooled: bool = False,
        sharpness: float = 1.0,
        weight: Init | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(inputs, width) if tokens else nn.Linear(inputs, width)
        self.place = nn.Parameter(0.02 * torch.randn(32, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.attention = nn.ModuleList(
            Attention(width, sharpness=sharpness, causal=not pooled) for _ in range(layers)
        )
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.last_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        self.pooled = pooled
        if weight is not None:
            initialise(self, weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place[: x.shape[1]]
        for i, attend in enumerate(self.attention):
            x = x + attend(self.norms[2 * i](x))
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        x = self.last_norm(x)
        return self.head(x[:, -1] if self.pooled else x)


class Messages(nn.Module):
    """Message passing: ``rounds`` of mixing neighbours' features; inputs as from `communities`."""

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        rounds: int = 3,
        width: int = 24,
        weight: Init | None = None,
        bias: float | None = None,
    ) -> None:
        super().__init__()
        sizes = [features] + [width] * rounds
        self.features = features
        self.rounds = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.head = nn.Linear(width, outputs)
        initialise(self.rounds, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        h, adjacency = x[..., : self.features], x[..., self.features :]
        for mix in self.rounds:
            h = torch.relu(mix(adjacency @ h))
        return self.head(h)
