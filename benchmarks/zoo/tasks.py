"""Generated data: each task draws batches, and defines its loss and its quality."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Return the share of right answers; class scores are the last dimension."""
    return (output.argmax(-1) == target).float().mean()


def explained(output: Tensor, target: Tensor) -> Tensor:
    """Return R squared: the share of the target's variance that is explained."""
    spread = (target.float() - target.float().mean()).square().mean()
    return 1 - (output.float() - target.float()).square().mean() / spread


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.float().flatten(0, -2), target.flatten())


@dataclass(frozen=True)
class Task:
    """Task of a training: its data, its loss, and its measure of quality.

    Attributes:
        draw: Function from random generator and size to (inputs, targets).
        loss: Function from outputs and targets to a scalar.
        score: Function from outputs and targets to a quality, 1 at best.
        inputs: Number of features of an example, or of a step of a sequence.
        outputs: Number of outputs the net must have.
    """

    draw: Callable[[Generator, int], tuple[Any, Any]]
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    score: Callable[[Tensor, Tensor], Tensor] = accuracy
    inputs: int = 64
    outputs: int = 10


def templates(seed: int, *, noise: float = 1.0, classes: int = 10, features: int = 64) -> Task:
    """Return class templates plus noise."""
    centres = torch.randn(classes, features, generator=Generator().manual_seed(seed))

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(classes, (size,), generator=generator)
        return centres[y] + noise * torch.randn(size, features, generator=generator), y

    return Task(draw, inputs=features, outputs=classes)


def circles(seed: int, *, scale: float = 1.0, noise: float = 0.1) -> Task:
    """Return two noisy circles, one inside the other."""

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(2, (size,), generator=generator)
        angle = 2 * math.pi * torch.rand(size, generator=generator)
        radius = 1.5 - y.float()
        x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
        return scale * (x + noise * torch.randn(size, 2, generator=generator)), y

    return Task(draw, inputs=2, outputs=2)


def images(seed: int, *, classes: int = 6, side: int = 10, noise: float = 0.5) -> Task:
    """Return pictures [B, 1, side, side]: smooth class patterns at random offsets, plus noise."""
    coarse = torch.randn(classes, 1, 4, 4, generator=Generator().manual_seed(seed))
    patterns = F.interpolate(coarse, size=(side + 2, side + 2), mode="bilinear", align_corners=False)

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(classes, (size,), generator=generator)
        row, column = (int(v) for v in torch.randint(3, (2,), generator=generator))
        clean = patterns[y][:, :, row : row + side, column : column + side]
        return clean + noise * torch.randn(size, 1, side, side, generator=generator), y

    return Task(draw, inputs=1, outputs=classes)


def regression(
    seed: int, *, features: int = 16, outputs: int = 1, scale: float = 1.0, noise: float = 0.1
) -> Task:
    """Return a smooth function of 16 numbers with standard deviation ``scale``; mean squared error."""
    generator = Generator().manual_seed(seed)
    first, second = (
        torch.randn(features, 24, generator=generator),
        torch.randn(24, outputs, generator=generator),
    )

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, features, generator=generator)
        y = torch.tanh(x @ first / features**0.5) @ second / 24**0.5
        return x, scale * (1.6 * y + noise * torch.randn(size, outputs, generator=generator))

    return Task(draw, F.mse_loss, explained, features, outputs)


def linear(seed: int, *, features: int = 16) -> Task:
    """Return a noise-free linear function, which can be learned to a loss of exactly zero."""
    weights = torch.randn(features, 1, generator=Generator().manual_seed(seed))

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, features, generator=generator)
        return x, x @ weights / features**0.5

    return Task(draw, F.mse_loss, explained, features, 1)


def spirals(seed: int, *, turns: float = 1.0) -> Task:
    """Return two interleaved spirals in the plane."""

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(2, (size,), generator=generator)
        radius = 0.2 + 0.8 * torch.rand(size, generator=generator)
        angle = 2 * math.pi * turns * radius + math.pi * y
        x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
        return 2 * x + 0.03 * torch.randn(size, 2, generator=generator), y

    return Task(draw, inputs=2, outputs=2)


def parity(seed: int, *, bits: int = 24, order: int = 2) -> Task:
    """Return the product of two of 24 signs: a long plateau before anything is learned."""

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        x = 2.0 * torch.randint(2, (size, bits), generator=generator) - 1
        return x, (x[:, :order].prod(1) > 0).long()

    return Task(draw, inputs=bits, outputs=2)


def label_noise(seed: int, *, classes: int = 10, features: int = 64) -> Task:
    """Return labels that do not depend on the inputs."""

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, features, generator=generator)
        return x, torch.randint(classes, (size,), generator=generator)

    return Task(draw, inputs=features, outputs=classes)
