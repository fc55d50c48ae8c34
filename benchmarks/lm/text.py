"""The text: sources of Python's standard library, which lie on every machine, as bytes."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

#: Distinct tokens: ASCII, all else is one of them.
VOCABULARY = 128
#: Every so many files, one is held out.
HELD_OUT = 10


class Text(NamedTuple):
    """Tokens of the files to learn from, and of those held out, int64 [N] each."""

    train: Tensor
    held_out: Tensor


@cache
def library() -> Text:
    """All modules at the top of the standard library, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, file in enumerate(files):
        parts[number % HELD_OUT == 0].append(file.read_bytes())
    return Text(*(_tokens(b"\n".join(part)) for part in parts))


def windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """Pieces of a text, [B, length + 1]: inputs are all tokens but the last, targets all but the first."""
    return text[starts[:, None] + torch.arange(length + 1)]


def _tokens(text: bytes) -> Tensor:
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)
    return torch.where(tokens < VOCABULARY, tokens, 0)
