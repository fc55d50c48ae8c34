"""The tasks: what is learnt, with which optimizer and rates, and how the result is measured."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clipping_tasks.data import digits, library, windows
from benchmarks.clipping_tasks.models import (
    CNN,
    CONTEXT,
    CharacterGRU,
    Denoiser,
    LanguageModel,
    Mixer,
    Regressor,
    SequenceRegressor,
)

Batch = tuple[Tensor, Tensor]
#: Held-out windows of text.
EXAM = 256


class Problem(ABC):
    """A model with its data.

    Attributes:
        model: What is trained.
        batch_size: Examples in a batch.
    """

    model: nn.Module
    batch_size = 64

    @abstractmethod
    def batch(self, size: int, random: torch.Generator) -> Batch:
        """Return inputs and targets, drawn at random."""

    @abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss, float32 []."""

    @abstractmethod
    def exam(self) -> float:
        """Return the loss on what is held out, the same for all runs."""


class Text(Problem):
    """The next character of the standard library's sources.

    The loss is in nats per character.
    """

    batch_size = 16

    def __init__(self, model: Callable[[], nn.Module]) -> None:
        self.model = model()

    def batch(self, size: int, random: torch.Generator) -> Batch:
        text = library().train
        window = windows(text, torch.randint(len(text) - CONTEXT, (size,), generator=random), CONTEXT)
        return window[:, :-1], window[:, 1:]

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())

    def exam(self) -> float:
        text = library().held_out
        window = windows(text, torch.linspace(0, len(text) - CONTEXT - 1, EXAM).long(), CONTEXT)
        return self.loss(window[:, :-1], window[:, 1:]).item()


class Digits(Problem):
    """Which digit a noisy scan shows; the loss is in nats.

    The noise keeps the loss away from zero, where it would hang on a handful of images.
    """

    noise = 0.8

    def __init__(self, model: Callable[[], nn.Module]) -> None:
        self.model = model()

    def batch(self, size: int, random: torch.Generator) -> Batch:
        (x, _), (y, _) = digits()
        rows = torch.randint(len(x), (size,), generator=random)
        return x[rows] + self.noise * torch.randn(size, x.shape[1], generator=random), y[rows]

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(inputs), targets)

    def exam(self) -> float:
        (_, x), (_, y) = digits()
        x, y = x.repeat(4, 1), y.repeat(4)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        return self.loss(x + self.noise * noise, y).item()


class HeavyTails(Problem):
    """A function under noise of Student's t with 1.5 degrees of freedom, whose variance is infinite.

    Trained on the squared error, held out is the absolute error, which the noise does not drown.
    """

    inputs = 16

    def __init__(self) -> None:
        self.model = Regressor(self.inputs)
        self.teacher = torch.randn(2, self.inputs, generator=torch.Generator().manual_seed(0))

    def function(self, x: Tensor) -> Tensor:
        first, second = (x @ self.teacher.T / math.sqrt(self.inputs)).unbind(-1)
        return 2 * torch.sin(2 * first) + second.square()

    def batch(self, size: int, random: torch.Generator) -> Batch:
        x = torch.randn(size, self.inputs, generator=random)
        normal = torch.randn(size, generator=random)
        # Bailey's polar form of Student's t.
        u = torch.rand(size, generator=random).clamp(min=1e-6)
        noise = normal.sign() * (1.5 * (u ** (-2 / 1.5) - 1)).sqrt() * torch.cos(math.pi * normal.abs() / 4)
        return x, self.function(x) + 0.3 * noise

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self.model(inputs), targets)

    def exam(self) -> float:
        x, y = self.batch(2048, torch.Generator().manual_seed(1))
        return F.l1_loss(self.model(x), y).item()


class Outliers(Problem):
    """The strongest frequency's weight in a series, where 3 % of the targets are recorded 30 times too large.

    Trained on the squared error, held out is the absolute error.
    """

    length, batch_size = 16, 32

    def __init__(self) -> None:
        self.model = SequenceRegressor(self.length)

    def series(self, size: int, random: torch.Generator) -> Batch:
        amplitude, phase = torch.randn(size, generator=random), 6.28 * torch.rand(size, generator=random)
        speed = 0.2 + 0.6 * torch.rand(size, generator=random)
        time = torch.arange(self.length) - self.length / 2
        wave = amplitude[:, None] * torch.sin(speed[:, None] * time + phase[:, None])
        return wave + 0.1 * torch.randn(size, self.length, generator=random), amplitude.abs() * speed * 3

    def batch(self, size: int, random: torch.Generator) -> Batch:
        x, y = self.series(size, random)
        return x, torch.where(torch.rand(size, generator=random) < 0.03, 30 * y, y)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self.model(inputs), targets)

    def exam(self) -> float:
        x, y = self.batch(1024, torch.Generator().manual_seed(1))
        return F.l1_loss(self.model(x), y).item()


class Diffusion(Problem):
    """The noise in a noisy scan of a digit, at all levels of noise; the loss is its squared error.

    A target's rows are the noise, and in a last column the level, from 0 to 1.
    """

    def __init__(self) -> None:
        self.model = Denoiser()

    def noisy(self, images: Tensor, random: torch.Generator) -> Batch:
        time, noise = (
            torch.rand(len(images), 1, generator=random),
            torch.randn(images.shape, generator=random),
        )
        angle = time * math.pi / 2
        return images * angle.cos() + noise * angle.sin(), torch.cat([noise, time], 1)

    def batch(self, size: int, random: torch.Generator) -> Batch:
        (x, _), _ = digits()
        return self.noisy(x[torch.randint(len(x), (size,), generator=random)], random)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self.model(inputs, targets[:, -1]), targets[:, :-1])

    def exam(self) -> float:
        (_, x), _ = digits()
        return self.loss(*self.noisy(x.repeat(4, 1), torch.Generator().manual_seed(1))).item()


@dataclass(frozen=True)
class Task:
    """One row of the page.

    Attributes:
        title: What is trained.
        problem: Makes the model, from torch's global seed.
        optimizer: Makes the optimizer from parameters and ``lr``.
        rates: Peak learning rates of the sweep, from low to too high.
        steps: Steps of a run.
        warm_up: Share of the steps in which the rate rises; from there it falls along a cosine to a tenth.
        adaptive: True if the optimizer divides by a running size of the gradient.
        growth: How many times larger batches are in the second half.
    """

    title: str
    problem: Callable[[], Problem]
    optimizer: Callable[..., torch.optim.Optimizer]
    rates: tuple[float, ...]
    steps: int = 250
    warm_up: float = 0.0
    adaptive: bool = True
    growth: int = 1

    def factor(self, step: int) -> float:
        """Return the part of the peak rate that a step is taken with."""
        warm = round(self.warm_up * self.steps)
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, self.steps - warm))


def _sweep(lowest: float) -> tuple[float, ...]:
    return tuple(float(f"{lowest * 2**power:.2g}") for power in range(7))


_SGD: Any = partial(torch.optim.SGD, momentum=0.9, fused=True)
_ADAM: Any = partial(torch.optim.Adam, fused=True)
_ADAMW: Any = partial(torch.optim.AdamW, fused=True, betas=(0.9, 0.95), weight_decay=0.1)

TASKS: dict[str, Task] = {
    "lm-adamw": Task(
        "language model (transformer), AdamW",
        partial(Text, LanguageModel),
        _ADAMW,
        _sweep(1e-3),
        warm_up=0.1,
    ),
    "gru-adam": Task("character model (GRU), Adam", partial(Text, CharacterGRU), _ADAM, _sweep(2e-3)),
    "mixer-adamw": Task("digits (MLP-Mixer), AdamW", partial(Digits, Mixer), _ADAMW, _sweep(2e-3)),
    "heavy-adam": Task("regression under heavy-tailed noise, Adam", HeavyTails, _ADAM, _sweep(4e-3)),
    "outliers-adam": Task("series (transformer) with outlying targets, Adam", Outliers, _ADAM, _sweep(1e-3)),
    "diffusion-adam": Task("small diffusion model, Adam", Diffusion, _ADAM, _sweep(1e-3)),
    "gru-sgd": Task(
        "character model (GRU), SGD",
        partial(Text, CharacterGRU),
        _SGD,
        _sweep(0.1),
        adaptive=False,
    ),
    "cnn-sgd": Task("digits (CNN), SGD", partial(Digits, CNN), _SGD, _sweep(0.02), adaptive=False),
    "heavy-sgd": Task(
        "regression under heavy-tailed noise, SGD",
        HeavyTails,
        _SGD,
        _sweep(0.02),
        adaptive=False,
    ),
}
