"""Generated sequences, sets and graphs."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from benchmarks.zoo.tasks import Task


def recall(seed: int, *, length: int = 60, classes: int = 4, features: int = 8, at: int = 0) -> Task:
    """Ask, at the end of a noisy sequence [B, length, features], for the class shown at step ``at``."""

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(classes, (size,), generator=generator)
        x = 0.3 * torch.randn(size, length, features, generator=generator)
        x[:, at, :classes] = 2.0 * F.one_hot(y, classes)
        return x, y

    return Task(draw, inputs=features, outputs=classes)


def summation(seed: int, *, length: int = 60, features: int = 8) -> Task:
    """Ask for the sign of the mean of one channel: every step of the sequence counts."""

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(2, (size,), generator=generator)
        x = torch.randn(size, length, features, generator=generator)
        x[:, :, 0] += 0.5 * (2.0 * y[:, None] - 1)
        return x, y

    return Task(draw, inputs=features, outputs=2)


def lookup(seed: int, *, pairs: int = 6, symbols: int = 8) -> Task:
    """Ask for the value of a key after key-value pairs.

    || Inputs [B, pairs + 1, 2 * symbols]; needs attention.
    """

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        keys = torch.rand(size, symbols, generator=generator).argsort(1)[:, :pairs]
        values = torch.randint(symbols, (size, pairs), generator=generator)
        asked = torch.randint(pairs, (size, 1), generator=generator)
        query = F.one_hot(keys.gather(1, asked), symbols)
        x = torch.cat([F.one_hot(keys, symbols), F.one_hot(values, symbols)], 2)
        last = torch.cat([query, torch.zeros_like(query)], 2)
        return torch.cat([x, last], 1).float(), values.gather(1, asked)[:, 0]

    return Task(draw, inputs=2 * symbols, outputs=symbols)


def zipf(seed: int, *, vocabulary: int = 60, length: int = 16) -> Task:
    """Return token sequences [B, length] with Zipf frequencies.

    || Each token has a usual successor, taken four times in five.
    """
    generator = Generator().manual_seed(seed)
    successor = torch.randperm(vocabulary, generator=generator)
    frequencies = 1 / torch.arange(1.0, vocabulary + 1)

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        fresh = torch.multinomial(frequencies, size * (length + 1), replacement=True, generator=generator)
        tokens = fresh.view(size, length + 1)
        keep = torch.rand(size, length, generator=generator) < 0.8
        for t in range(length):
            tokens[:, t + 1] = torch.where(keep[:, t], successor[tokens[:, t]], tokens[:, t + 1])
        return tokens[:, :-1], tokens[:, 1:]

    return Task(draw, inputs=vocabulary, outputs=vocabulary)


def communities(seed: int, *, nodes: int = 20, features: int = 8, normalise: bool = True) -> Task:
    """Return graphs of two communities; neighbours' features identify a node's community better than its own.

    Inputs [B, nodes, features + nodes]: features, then the adjacency matrix (rows sum to 1 if ``normalise``).
    """
    direction = F.normalize(torch.randn(features, generator=Generator().manual_seed(seed)), dim=0)

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        side = torch.randint(2, (size, nodes), generator=generator)
        same = side[:, :, None] == side[:, None, :]
        links = torch.rand(size, nodes, nodes, generator=generator) < torch.where(same, 0.7, 0.1)
        adjacency = (links | links.transpose(1, 2) | torch.eye(nodes, dtype=torch.bool)).float()
        if normalise:
            adjacency = adjacency / adjacency.sum(-1, keepdim=True)
        x = 0.7 * (2.0 * side[:, :, None] - 1) * direction
        x = x + torch.randn(size, nodes, features, generator=generator)
        return torch.cat([x, adjacency], 2), side

    return Task(draw, inputs=features, outputs=2)


def two_views(seed: int, *, features: int = 32, latent: int = 6) -> Task:
    """Return two noisy views of the same hidden numbers, [B, 2, features], for contrastive losses.

    || The target is unused.
    """
    generator = Generator().manual_seed(seed)
    mixing = torch.randn(2, latent, features, generator=generator) / latent**0.5

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(size, latent, generator=generator)
        x = torch.einsum("bl,vlf->bvf", hidden, mixing)
        return x + 0.1 * torch.randn(size, 2, features, generator=generator), torch.arange(size)

    return Task(draw, inputs=features, outputs=features)
