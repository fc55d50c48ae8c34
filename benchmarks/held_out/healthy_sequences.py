"""Healthy trainings on sequences, sets, words and a graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out.data import alphabet_size, characters, recall
from benchmarks.held_out.recurrent import language_model
from benchmarks.held_out.training import Trial, seeded
from benchmarks.zoo.case import Case
from benchmarks.zoo.recipes import adam, adamw, sgd
from benchmarks.zoo.tasks import Task

#: Number of words in the texts' vocabulary.
WORDS = 2000


class Decoder(nn.Module):
    """Causal transformer of two layers with dropout, whose output layer is its embedding."""

    def __init__(self, width: int = 32, length: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet_size(), width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", torch.triu(torch.full((length, length), float("-inf")), 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x) + self.places
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask)
        return self.norm(hidden) @ self.embedding.weight.T


def _over_forty(step: int) -> float:
    return min(1.0, (step + 1) / 40)


def _decoder(seed: int) -> Trial:
    task = characters(24)
    return Trial(Decoder(), task, adamw(3e-3), seed, schedule=_over_forty, batch_size=8, examined=64)


def _language_model(seed: int) -> Trial:
    return language_model(seed, optimizer=sgd(5.0), width=40, length=20, batch_size=12)


class Pointer(nn.Module):
    """Attention that points at a position of its input."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, width, batch_first=True, bidirectional=True)
        self.query, self.key = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        self.energy = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(x)
        query = self.query(hidden.mean(1, keepdim=True))
        return self.energy(torch.tanh(self.key(hidden) + query)).squeeze(2)


def _pointer(seed: int) -> Trial:
    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(size, 10, 1, generator=generator)
        return x, x[:, :, 0].argmax(1)

    return Trial(Pointer(), Task(draw), adam(5e-3), seed)


class GraphConvolution(nn.Module):
    """Two rounds over a matrix of neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        hidden = torch.relu(self.first(neighbours @ x))
        return self.out(torch.relu(self.second(neighbours @ hidden)))


def _one_graph(seed: int) -> Trial:
    """Return a single graph of 120 nodes in three classes, with labels on the first forty."""
    centres = torch.randn(3, 8, generator=seeded(seed))
    y = torch.randint(3, (120,), generator=seeded(seed + 1))
    x = 0.6 * centres[y] + torch.randn(120, 8, generator=seeded(seed + 2))
    alike = (y[:, None] == y) & (torch.rand(120, 120, generator=seeded(seed + 3)) < 0.15)
    stray = torch.rand(120, 120, generator=seeded(seed + 4)) < 0.01
    edges = alike.float() + stray.float() + torch.eye(120)
    edges = edges / edges.sum(1, keepdim=True)
    known = torch.arange(120) < 40

    def objective(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        return F.cross_entropy(net(x, edges)[known], y[known])

    def on_the_others(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return (net(x, edges)[~known].argmax(1) == y[~known]).float().mean()

    return Trial(
        GraphConvolution(),
        Task(lambda generator, size: (x, edges, y)),
        adam(1e-2, weight_decay=5e-4),
        seed,
        objective=objective,
        measure=on_the_others,
    )


class DilatedConvolutions(nn.Module):
    """Causal convolutions with growing dilation, with skips."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(8 if k == 0 else width, width, 2, dilation=2**k) for k in range(5)
        )
        self.out = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for k, conv in enumerate(self.convs):
            hidden = torch.relu(conv(F.pad(x, (2**k, 0))))
            x = hidden if k == 0 else x + hidden
        return self.out(x[:, :, -1])


def _dilated(seed: int) -> Trial:
    return Trial(DilatedConvolutions(), recall(seed, 28), adam(1e-2), seed)


class Translator(nn.Module):
    """Encoder and decoder with teacher forcing; the target is the reverse of the input."""

    def __init__(self, symbols: int = 6, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols + 1, width)
        self.encoder, self.decoder = (nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.out = nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        start = torch.full_like(x[:, :1], self.out.out_features)
        previous = torch.cat([start, x.flip(1)[:, :-1]], 1)
        _, state = self.encoder(self.embedding(x))
        return self.out(self.decoder(self.embedding(previous), state)[0])


def _translator(seed: int) -> Trial:
    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(6, (size, 5), generator=generator)
        return x, x.flip(1)

    return Trial(Translator(), Task(draw), adam(1e-2), seed)


class BagOfWords(nn.Module):
    """Mean of embedded words, and a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(WORDS, width, mode="mean")
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.embedding(x)))


def _words(seed: int) -> Trial:
    """Return texts of twenty Zipf-distributed words; each class has its own frequent words."""
    common = 1 / (torch.arange(WORDS) + 3.0)
    weights = torch.stack(
        [common[torch.randperm(WORDS, generator=seeded(seed + k))] * 0.5 + common for k in range(4)]
    )

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (size,), generator=generator)
        return torch.multinomial(weights[y], 20, True, generator=generator), y

    return Trial(BagOfWords(), Task(draw), adam(2e-2), seed)


class Transcriber(nn.Module):
    """Log-probabilities of symbols and of a blank at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 24, batch_first=True, bidirectional=True)
        self.out = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0]).log_softmax(2)


def _transcription(seed: int) -> Trial:
    symbols = torch.randn(5, 6, generator=seeded(seed))

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(1, 5, (size, 4), generator=generator)
        held = symbols[y.repeat_interleave(3, 1)]
        return held + 0.3 * torch.randn(size, 12, 6, generator=generator), y

    def objective(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
        x, y = batch
        steps, lengths = torch.full((len(y),), 12), torch.full((len(y),), 4)
        return F.ctc_loss(net(x).transpose(0, 1), y, steps, lengths, zero_infinity=True)

    return Trial(Transcriber(), Task(draw), adam(1e-2), seed, objective=objective, batch_size=32)


CASES = [
    Case("HB08", "transformer decoder on characters, tied weights, warm-up", _decoder, 0.25),
    Case("HB10", "LSTM language model, SGD at 5, as is usual there", _language_model, 0.2),
    Case("HB21", "attention that points at the largest number", _pointer, 0.7),
    Case("HB22", "graph convolution on a single graph with few labels", _one_graph, 0.8),
    Case("HB23", "dilated causal convolutions, recall over 28 steps", _dilated, 0.8),
    Case("HB25", "encoder and decoder: five symbols in reverse", _translator, 0.6),
    Case("HB32", "bags of Zipf words", _words, 0.7),
    Case("HD11", "connectionist temporal classification", _transcription, 0.4),
]
