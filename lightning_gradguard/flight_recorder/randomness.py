"""Capture and restore torch's, Python's and NumPy's random generators."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Randomness(NamedTuple):
    """States of the random generators.

    Attributes:
        torch: uint8 [5056].
        cuda: uint8 [16], of the current device; None if CUDA is not in use.
        python: The state that ``random.getstate()`` returns.
        numpy: The state that ``np.random.get_state()`` returns.
    """

    torch: Tensor
    cuda: Tensor | None
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]


def capture() -> Randomness:
    """Return the current states.

    Nothing is read from a device: a GPU's generator keeps its state on the host.
    """
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state() if in_use else None
    numpy = np.random.get_state(legacy=True)
    return Randomness(torch.get_rng_state(), cuda, random.getstate(), tuple(numpy))


def restore(states: Randomness) -> None:
    """Restore all generators that this machine has."""
    torch.set_rng_state(states.torch)
    if states.cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states.cuda)
    random.setstate(states.python)
    np.random.set_state(states.numpy)


def reseed(seed: int) -> None:
    """Seed all generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def same(a: Randomness, b: Randomness) -> bool:
    """Return True if two captures are equal."""
    cuda = (a.cuda is None) == (b.cuda is None)
    if a.cuda is not None and b.cuda is not None:
        cuda = torch.equal(a.cuda, b.cuda)
    numpy = a.numpy[2:] == b.numpy[2:] and np.array_equal(a.numpy[1], b.numpy[1])
    return cuda and numpy and torch.equal(a.torch, b.torch) and a.python == b.python


def to_plain(states: Randomness) -> dict[str, Any]:
    """Convert states to plain types and tensors."""
    kind, keys, position, has_gauss, gauss = states.numpy
    version, words, python_gauss = states.python
    numpy = [
        str(kind),
        torch.from_numpy(np.asarray(keys, np.int64)),
        int(position),
        int(has_gauss),
        float(gauss),
    ]
    python = [version, torch.tensor(words, dtype=torch.int64), python_gauss]
    return {"torch": states.torch, "cuda": states.cuda, "python": python, "numpy": numpy}


def from_plain(plain: dict[str, Any]) -> Randomness:
    """Convert the result of `to_plain` back."""
    version, words, gauss = plain["python"]
    kind, keys, *rest = plain["numpy"]
    python = (version, tuple(words.tolist()), gauss)
    return Randomness(plain["torch"], plain["cuda"], python, (kind, keys.numpy().astype(np.uint32), *rest))
