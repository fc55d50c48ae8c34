"""Generated data and small tables: each task draws batches, and defines its loss and its quality."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from sklearn import datasets
from torch import Generator, Tensor
from torch.nn import functional as F

from benchmarks.held_out.training import seeded
from benchmarks.zoo.tasks import Task, explained

#: Number of characters in the text for language models.
TEXT_LENGTH = 60_000


def templates(seed: int, *, noise: float = 1.0, classes: int = 10) -> Task:
    """Return class templates [B, 64] plus noise."""
    centres = torch.randn(classes, 64, generator=seeded(1000 + seed))

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(classes, (size,), generator=generator)
        return centres[y] + noise * torch.randn(size, 64, generator=generator), y

    return Task(draw)


def rotated_templates(seed: int) -> Task:
    """Return `templates` in a slightly rotated space, for fine-tuning a net that has learned them."""
    own = templates(seed)
    turn = torch.linalg.qr(torch.eye(64) + 0.15 * torch.randn(64, 64, generator=seeded(seed)))[0]

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        x, y = own.draw(generator, size)
        return x @ turn.T, y

    return Task(draw)


def pairs(seed: int, *, classes: int) -> Task:
    """Return two examples of `templates`, with 1.0 if they share a class and 0.0 if not."""
    own = templates(seed, classes=classes)

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
        x, y = own.draw(generator, size)
        other, label = own.draw(generator, size)
        return x, other, (y == label).float()

    return Task(draw)


def views(seed: int) -> Task:
    """Return two noisy views of the same examples of `templates`."""
    own = templates(seed)

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        x, _ = own.draw(generator, size)
        first = x + 0.5 * torch.randn(size, 64, generator=generator)
        return first, x + 0.5 * torch.randn(size, 64, generator=generator)

    return Task(draw)


def rings(seed: int, *, noise: float = 0.1) -> Task:
    """Return two noisy circles in the plane, of radius 1 and 0.4."""

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(2, (size,), generator=generator)
        angle = 2 * math.pi * torch.rand(size, generator=generator)
        radius = torch.where(y == 0, 1.0, 0.4)
        x = torch.stack([radius * angle.sin(), radius * angle.cos()], 1)
        return x + noise * torch.randn(size, 2, generator=generator), y

    return Task(draw)


def ring_points(generator: Generator, size: int) -> tuple[Tensor]:
    """Return points of `rings` without their classes, for density estimation."""
    x, _ = rings(0, noise=0.05).draw(generator, size)
    return (x * 1.5 + 0.5,)


def waves(seed: int, *, features: int = 12, scale: float = 1.0) -> Task:
    """Return a line plus a sine of 12 numbers that are ``scale`` wide; mean squared error."""
    line = torch.randn(features, 1, generator=seeded(seed + 50)) / features**0.5
    wave = torch.randn(features, 1, generator=seeded(seed + 51)) / features**0.5

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, features, generator=generator)
        y = x @ line + 0.7 * torch.sin(2 * (x @ wave)) + 0.05 * torch.randn(size, 1, generator=generator)
        return scale * x, y

    return Task(draw, F.mse_loss, explained)


def digits(*, standard: bool = True) -> Task:
    """Return handwritten digits as 64 numbers, standardised or from -1 to 1."""
    x, y = _table(datasets.load_digits)
    return _rows(_standardised(x) if standard else x / 8 - 1, y)


def digit_pictures() -> Task:
    """Return handwritten digits as pictures [B, 1, 8, 8] from -1 to 1."""
    x, y = _table(datasets.load_digits)
    return _rows(x.view(-1, 1, 8, 8) / 8 - 1, y)


def digit_vectors() -> Task:
    """Return digits from -1 to 1 without their classes, for autoencoders."""
    own = digits(standard=False)
    return Task(lambda generator, size: own.draw(generator, size)[:1])


def wine(*, standard: bool) -> Task:
    """Return thirteen measurements of wine in three classes; their units differ widely unless standardised."""
    x, y = _table(datasets.load_wine)
    return _rows(_standardised(x) if standard else x, y)


def recall(seed: int, steps: int) -> Task:
    """Return one of 5 symbols, then noise symbols, one-hot [B, steps, 8]; the answer is the first symbol."""

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(5, (size,), generator=generator)
        tokens = 5 + torch.randint(3, (size, steps), generator=generator)
        tokens[:, 0] = y
        return F.one_hot(tokens, 8).float(), y

    return Task(draw)


@cache
def text() -> tuple[Tensor, int]:
    """Return characters of a standard library module as numbers, and the number of distinct characters."""
    source = inspect.getsource(argparse)[:TEXT_LENGTH]
    alphabet = sorted(set(source))
    return torch.tensor([alphabet.index(c) for c in source]), len(alphabet)


def characters(length: int) -> Task:
    """Return pieces of the text; the answer is the next character at each position."""
    tokens, _ = text()

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - length - 1, (size,), generator=generator)
        pieces = tokens[starts[:, None] + torch.arange(length + 1)]
        return pieces[:, :-1], pieces[:, 1:]

    return Task(draw)


def alphabet_size() -> int:
    return text()[1]


def with_factor(task: Task, factor: float) -> Task:
    """Return the task with its loss multiplied by a factor."""
    return dataclasses.replace(task, loss=lambda output, target: factor * task.loss(output, target))


def changed(task: Task, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Task:
    """Return the task with all its examples changed."""
    return dataclasses.replace(task, draw=lambda generator, size: change(*task.draw(generator, size)))


def _rows(x: Tensor, y: Tensor) -> Task:
    """Return rows of a table, drawn with replacement."""

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x), (size,), generator=generator)
        return x[rows], y[rows]

    return Task(draw)


def _table(load: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    data = load()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.std(0) + 1e-6)
