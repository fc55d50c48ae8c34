"""Definition of a public report: a small training that fails as reported, and its cured twin."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from lightning_gradguard import Cause, Fault

#: Variants that every case has; further ones are named by `Case.fixes`.
REPORTED, CURED = "reported", "cured"


@dataclass(frozen=True)
class Case:
    """Report of a failing training, with its known truth.

    Faults, causes and fixes are an expert's judgement, written before the product is asked. `establish` trains all
    variants without the product: the reported one stays below ``level``, the cured one reaches it.

    Attributes:
        id: Short and unique, such as "R07".
        title: What is wrong, in one line.
        address: Where it was reported, such as "pytorch/pytorch #19250".
        build: Function from variant to module and data. A variant is "reported", "cured" (the thread's own fix), or
            a name in ``fixes``. The caller seeds torch first; see `make`.
        score: Function from the trained module to its quality: accuracy, R squared or the like, 1 is perfect. It may
            be called during training and must draw no random numbers from the global generator.
        level: Quality that separates learning from not learning.
        faults: Faults that an expert accepts as the first warning.
        causes: Causes that an expert accepts as the first.
        fixes: Regular expression, searched in name, key and code of the first fix, to the variant that applies
            exactly that fix. The first that matches counts. A variant need not cure.
        said: Words of which one in a warning counts where no fault fits.
        steps: Number of optimizer steps.
        trainer: Function from variant to further arguments of the Trainer.
        kin: Families that the case belongs to, such as "recurrent".
    """

    id: str
    title: str
    address: str
    build: Callable[[str], tuple[L.LightningModule, Any]]
    score: Callable[[Any], Any]
    level: float
    faults: tuple[Fault, ...]
    causes: tuple[Cause, ...]
    fixes: dict[str, str]
    said: tuple[str, ...] = ()
    steps: int = 300
    trainer: Callable[[str], dict[str, Any]] | None = None
    kin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.faults or self.said):
            raise ValueError(f"case {self.id}: faults or said must say what a right warning is")
        if not (self.causes and self.fixes):
            raise ValueError(f"case {self.id}: causes and fixes must not be empty")

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of all variants, each once."""
        return tuple(dict.fromkeys((REPORTED, CURED, *self.fixes.values())))

    def make(self, variant: str, seed: int) -> tuple[L.LightningModule, Any]:
        """Build a variant from its own seed."""
        if variant not in self.variants:
            raise ValueError(f"variant of case {self.id} must be one of {self.variants}, got {variant!r}")
        L.seed_everything(seed, verbose=False)
        return self.build(variant)

    def quality(self, module: L.LightningModule) -> float:
        """Return the score; the module's modes and the random state stay as they are."""
        modes = {part: part.training for part in module.modules()}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            quality = float(self.score(module))
        for part, training in modes.items():
            part.training = training
        return quality

    def variant_of(self, *texts: str) -> str | None:
        """Return the variant that applies the fix with these texts; None if no entry matches."""
        text = "\n".join(texts)
        return next((v for pattern, v in self.fixes.items() if re.search(pattern, text, re.IGNORECASE)), None)
