"""Which rows of a batch bring a fault: halves that show it are halved again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Groups that all show the fault; where a row from each does so, too, every row is taken to.
ENOUGH = 8


class BisectResult(NamedTuple):
    """What a search found.

    Attributes:
        rows: Those that bring the fault by themselves, in order; all of them where ``every``.
        groups: Groups that bring it, and could not be taken apart: within the passes there were, or since only several
            rows together bring it.
        every: Whether all rows do.
        passes: How many it took.
    """

    rows: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    every: bool
    passes: int

    @property
    def all(self) -> list[int]:
        """Every row of ``rows`` and ``groups``, in order."""
        return sorted({*self.rows, *(row for group in self.groups for row in group)})


def rows_of(kept: Sequence[int], count: int) -> Tensor:
    """Which row stands where when only some are kept: they stay in their places, and take turns in the others.

    The batch keeps its size, so that random numbers fall on the rows that they fell on.

    Args:
        kept: The rows.
        count: Rows of the batch, N.

    Returns:
        int64 [N].

    >>> rows_of([1, 3], 5).tolist()
    [1, 1, 1, 3, 1]
    """
    own, turns = set(kept), list(kept)
    return torch.tensor([row if row in own else turns[row % len(turns)] for row in range(count)])


def find_rows(shows: Callable[[Tensor], bool], count: int, most: int) -> BisectResult:
    """Finds the rows that bring a fault, of a batch that does.

    About 2 k log2(N/k) passes for k guilty rows of N.

    Args:
        shows: Whether a batch of such rows, int64 [N], shows it; see `rows_of`.
        count: Rows of the batch, N.
        most: Most passes.
    """
    pending = [tuple(range(count))]
    rows: list[int] = []
    together: list[tuple[int, ...]] = []
    passes, sampled = 0, False
    while pending:
        level = len(pending)
        below: list[tuple[int, ...]] = []
        for place, group in enumerate(pending):
            if len(group) == 1:
                rows.append(group[0])
                continue
            if passes + 2 > most:
                return BisectResult(tuple(sorted(rows)), (*together, *pending[place:], *below), False, passes)
            halves = group[: len(group) // 2], group[len(group) // 2 :]
            passes += 2
            faulty = [half for half in halves if shows(rows_of(half, count))]
            below += faulty
            if not faulty:
                together.append(group)
        if not sampled and not together and len(below) == 2 * level >= ENOUGH:
            sampled, passes = True, passes + len(below)
            if all(shows(rows_of([group[len(group) // 2]], count)) for group in below):
                return BisectResult(tuple(range(count)), (), True, passes)
        pending = below
    return BisectResult(tuple(sorted(rows)), tuple(together), len(rows) == count, passes)
