"""Capture and restore torch's, Python's and NumPy's random generators.

A program that has not imported NumPy draws no number from it, so it is left alone there, and need not be installed.
"""

from __future__ import annotations

import random
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Randomness(NamedTuple):
    """States of the random generators.

    Attributes:
        torch: uint8 [5056].
        cuda: uint8 [16], of the current device; None if CUDA is not in use.
        python: The state that ``random.getstate()`` returns.
        numpy: The state that ``numpy.random.get_state()`` returns, keys as a list; None without NumPy.
    """

    torch: Tensor
    cuda: Tensor | None
    python: tuple[Any, ...]
    numpy: tuple[Any, ...] | None


def capture() -> Randomness:
    """Return the current states.

    Nothing is read from a device: a GPU's generator keeps its state on the host.
    """
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state() if in_use else None
    numpy = None
    if (library := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = library.random.get_state(legacy=True)
        numpy = (str(kind), keys.tolist(), *rest)
    return Randomness(torch.get_rng_state(), cuda, random.getstate(), numpy)


def restore(states: Randomness) -> None:
    """Restore all generators that this machine has."""
    torch.set_rng_state(states.torch)
    if states.cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states.cuda)
    random.setstate(states.python)
    library = sys.modules.get("numpy")
    if states.numpy is not None and library is not None:
        library.random.set_state(states.numpy)


def reseed(seed: int) -> None:
    """Seed all generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    if (library := sys.modules.get("numpy")) is not None:
        library.random.seed(seed)


def same(a: Randomness, b: Randomness) -> bool:
    """Return True if two captures are equal."""
    cuda = (a.cuda is None) == (b.cuda is None)
    if a.cuda is not None and b.cuda is not None:
        cuda = torch.equal(a.cuda, b.cuda)
    return cuda and a.numpy == b.numpy and torch.equal(a.torch, b.torch) and a.python == b.python


def to_plain(states: Randomness) -> dict[str, Any]:
    """Convert states to plain types and tensors."""
    version, words, gauss = states.python
    python = [version, torch.tensor(words, dtype=torch.int64), gauss]
    numpy = None
    if states.numpy is not None:
        kind, keys, position, has_gauss, numpy_gauss = states.numpy
        numpy = [
            kind,
            torch.tensor(keys, dtype=torch.int64),
            int(position),
            int(has_gauss),
            float(numpy_gauss),
        ]
    return {"torch": states.torch, "cuda": states.cuda, "python": python, "numpy": numpy}


def from_plain(plain: dict[str, Any]) -> Randomness:
    """Convert the result of `to_plain` back."""
    version, words, gauss = plain["python"]
    python = (version, tuple(words.tolist()), gauss)
    numpy = None
    if plain["numpy"] is not None:
        kind, keys, *rest = plain["numpy"]
        numpy = (kind, keys.tolist(), *rest)
    return Randomness(plain["torch"], plain["cuda"], python, numpy)
