"""Nets of the held-out cases on sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.held_out.data import alphabet_size, characters
from benchmarks.held_out.training import Trial
from benchmarks.zoo.models import Activation, Init
from benchmarks.zoo.training import MakeOptimizer


class LastState(nn.Module):
    """Recurrent module of torch, and a linear layer on its last output."""

    def __init__(self, rnn: nn.RNNBase, outputs: int) -> None:
        super().__init__()
        self.rnn, self.out = rnn, nn.Linear(rnn.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Unrolled(nn.Module):
    """Recurrent net as a loop over a cell, with no recurrent module of torch except an ``LSTMCell``."""

    def __init__(self, outputs: int, width: int, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.width = cell, width
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = memory = x.new_zeros(len(x), self.width)
        for step in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                hidden, memory = self.cell(x[:, step], (hidden, memory))
            else:
                hidden = self.cell(x[:, step], hidden)
        return self.out(hidden)


class LinearCell(nn.Module):
    """One step of a plain recurrence, from two linear layers."""

    def __init__(self, inputs: int, width: int, activation: Activation, recurrent: Init) -> None:
        super().__init__()
        self.inward, self.back = nn.Linear(inputs, width), nn.Linear(width, width, bias=False)
        self.activation = activation
        recurrent(self.back.weight)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.activation(self.inward(x) + self.back(hidden))


def remembering_gru(inputs: int, width: int, *, keep: float = 5.0) -> nn.GRU:
    """Return a GRU whose update gates start at ``keep``: high values keep the past, low values forget it."""
    gru = nn.GRU(inputs, width, batch_first=True)
    with torch.no_grad():
        gru.bias_ih_l0[width : 2 * width] = 0.0
        gru.bias_hh_l0[width : 2 * width] = keep
    return gru


class CharacterModel(nn.Module):
    """LSTM that predicts the next character at each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet_size(), width)
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.out = nn.Linear(width, alphabet_size())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.embedding(x))[0])


def language_model(
    seed: int, *, optimizer: MakeOptimizer, width: int = 32, length: int = 16, batch_size: int = 16
) -> Trial:
    """Return a `CharacterModel` on pieces of the text."""
    return Trial(
        CharacterModel(width), characters(length), optimizer, seed, batch_size=batch_size, examined=64
    )
