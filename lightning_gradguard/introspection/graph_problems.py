"""Mistakes that an autograd graph shows before any step is taken."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Problem(str, Enum):
    """Kinds of mistakes."""

    SOFTMAX_TWICE = "softmax_twice"
    STALE_GRADIENTS = "stale_gradients"

    def __str__(self) -> str:
        return self.value


class GraphProblem(NamedTuple):
    """One mistake, with its evidence.

    Attributes:
        kind: What is wrong.
        text: What the graph shows, as one sentence with a period, for a message.
        names: Parameters concerned.
        certain: True if it is wrong whatever the loss does. Else it is worth saying only while the loss makes no
            progress.
    """

    kind: Problem
    text: str
    names: tuple[str, ...] = ()
    certain: bool = True
