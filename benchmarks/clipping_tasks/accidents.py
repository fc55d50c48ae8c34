"""Accidents of a training: none, corrupt batches, or NaN gradients.

The seed alone decides which steps are hit and how, so that all clippers meet the same accidents.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.clipping_tasks.data import VOCABULARY

#: Share of the steps that are hit.
RATE = 1 / 50

#: Regime to its description.
REGIMES = {
    "clean": "nothing goes wrong",
    "corrupt": "one batch in fifty is corrupt",
    "nan": "one gradient in fifty holds a NaN",
}


def garbage(inputs: Tensor, targets: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Inputs out of a file of another kind: random bytes, or noise of ten times the usual size."""
    if inputs.is_floating_point():
        return 10 * inputs.std() * torch.randn(inputs.shape, generator=random), targets, 1.0
    window = torch.randint(VOCABULARY, (len(inputs), inputs.shape[1] + 1), generator=random)
    return window[:, :-1], window[:, 1:], 1.0


def misaligned(inputs: Tensor, targets: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Targets that belong to other examples of the batch."""
    return inputs, targets[torch.randperm(len(targets), generator=random)], 1.0


def repeated(inputs: Tensor, targets: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """One example over and over; in text, one run of three characters."""
    if inputs.is_floating_point():
        return inputs[:1].expand_as(inputs), targets[:1].expand_as(targets), 1.0
    gram = torch.randint(VOCABULARY, (3,), generator=random)
    window = gram[torch.arange(inputs.shape[1] + 1) % 3].expand(len(inputs), -1)
    return window[:, :-1], window[:, 1:], 1.0


def unnormalized(inputs: Tensor, targets: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """A loss that is summed over the batch instead of averaged."""
    return inputs, targets, float(targets.numel() if targets.ndim < 3 else len(targets))


Corruption = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor, float]]
CORRUPTIONS: tuple[Corruption, ...] = (garbage, misaligned, repeated, unnormalized)


class Accidents:
    """Accidents of one run.

    Args:
        regime: A key of `REGIMES`.
        steps: Number of steps of the run.
        seed: Seed of the run.
    """

    def __init__(self, regime: str, steps: int, seed: int) -> None:
        self.regime = regime
        self.random = torch.Generator().manual_seed(1000 + seed)
        count = 0 if regime == "clean" else max(len(CORRUPTIONS), round(RATE * steps))
        places = torch.randperm(steps, generator=self.random)[:count].tolist()
        self.hit = {step: number % len(CORRUPTIONS) for number, step in enumerate(places)}

    def batch(self, step: int, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return inputs and targets as the training receives them, and the factor of the loss."""
        if self.regime != "corrupt" or step not in self.hit:
            return inputs, targets, 1.0
        return CORRUPTIONS[self.hit[step]](inputs, targets, self.random)

    def gradients(self, step: int, model: nn.Module) -> None:
        """Write a NaN into one element of one gradient."""
        if self.regime == "nan" and step in self.hit:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            number = int(torch.randint(len(gradients), (), generator=self.random))
            gradients[number].view(-1)[0] = math.nan
