"""Text to learn: the sources of Python's standard library, which every machine has, as bytes."""

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


class Text(NamedTuple):
    """Tokens of the training files and of the held-out files, int64 [N] each."""

    train: Tensor
    held_out: Tensor


@cache
def library() -> Text:
    """Read all top-level modules of the standard library, sorted by name."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, file in enumerate(files):
        parts[number % HELD_OUT == 0].append(file.read_bytes())
    return Text(*(_tokens(b"\n".join(part)) for part in parts))


def windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return windows of a text, [B, length + 1]. || Inputs are all tokens but the last, targets all but the first."""
    return text[starts[:, None] + torch.arange(length + 1)]


def _tokens(text: bytes) -> Tensor:
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)
    return torch.where(tokens < VOCABULARY, tokens, 0)
