"""Data of the tasks: real text and images that every machine has, and series and tables made by a formula."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

#: Number of distinct tokens: ASCII, and one token for everything else.
VOCABULARY = 128
#: One of this many files is held out.
HELD_OUT = 10
#: Width and height of the images, pixels.
IMAGE = 8


class Split(NamedTuple):
    """Training data and held-out data."""

    train: Tensor
    held_out: Tensor


@cache
def library() -> Split:
    """Return the top-level modules of the standard library, sorted by name, as bytes, int64 [N] each."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, file in enumerate(files):
        parts[number % HELD_OUT == 0].append(file.read_bytes())
    return Split(*(_tokens(b"\n".join(part)) for part in parts))


def windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return windows of a text, [B, length + 1]; inputs are all tokens but the last, targets all but the first."""
    return text[starts[:, None] + torch.arange(length + 1)]


@cache
def digits() -> tuple[Split, Split]:
    """Return scans of handwritten digits, float32 [N, 64], and what they show, int64 [N]; each split."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order] / 8 - 1, torch.tensor(labels)[order]
    return Split(x[:1437], x[1437:]), Split(y[:1437], y[1437:])


def _tokens(text: bytes) -> Tensor:
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)
    return torch.where(tokens < VOCABULARY, tokens, 0)
