"""Accidents of a training: none, corrupt batches, or NaN gradients.

The seed alone decides which steps are hit and how, so that all clippers meet the same accidents.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.lm.text import VOCABULARY

#: Share of the steps that are hit.
RATE = 1 / 50

#: Regime to its description.
REGIMES = {
    "clean": "nothing goes wrong",
    "corrupt": "one batch in fifty is corrupt",
    "nan": "one gradient in fifty holds a NaN",
}


def garbage(tokens: Tensor, targets: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """A binary file: inputs and targets are random bytes."""
    window = torch.randint(VOCABULARY, (len(tokens), tokens.shape[1] + 1), generator=random)
    return window[:, :-1], window[:, 1:], 1.0


def misaligned(tokens: Tensor, targets: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Targets that belong to other examples of the batch."""
    return tokens, targets[torch.randperm(len(targets), generator=random)], 1.0


def repeated(tokens: Tensor, targets: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """One run of three tokens over and over, the spike's cause that the OLMo 2 report names first."""
    gram = torch.randint(VOCABULARY, (3,), generator=random)
    window = gram[torch.arange(tokens.shape[1] + 1) % 3].expand(len(tokens), -1)
    return window[:, :-1], window[:, 1:], 1.0


def unnormalised(tokens: Tensor, targets: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """A loss that is summed over the batch's tokens instead of averaged."""
    return tokens, targets, float(targets.numel())


Corruption = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor, float]]
CORRUPTIONS: tuple[Corruption, ...] = (garbage, misaligned, repeated, unnormalised)


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

    def batch(self, step: int, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return inputs and targets as the training receives them, and the factor of the loss."""
        if self.regime != "corrupt" or step not in self.hit:
            return tokens, targets, 1.0
        return CORRUPTIONS[self.hit[step]](tokens, targets, self.random)

    def gradients(self, step: int, model: nn.Module) -> None:
        """Write a NaN into one element of one gradient."""
        if self.regime == "nan" and step in self.hit:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            number = int(torch.randint(len(gradients), (), generator=self.random))
            gradients[number].view(-1)[0] = math.nan
