"""Find the rows of a batch that cause a fault, by halving the parts that show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Number of parts that all show the fault from which one row of each is tested: if these do too, every row counts as a
#: cause.
_SAMPLED_PARTS = 8


class BisectResult(NamedTuple):
    """Rows of a batch that cause a fault.

    Attributes:
        rows: Rows that cause it by themselves, in order; all rows if ``every``.
        groups: Groups of rows that cause it and were not divided further: only several rows together cause it, or the
            limit of passes was reached.
        every: True if each row of the batch causes it.
        passes: Number of passes run.
    """

    rows: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    every: bool
    passes: int

    @property
    def all(self) -> list[int]:
        """Every row of ``rows`` and ``groups``, in order."""
        return sorted({*self.rows, *(row for group in self.groups for row in group)})


def bisect_rows(shows_fault: Callable[[Tensor], bool], count: int, most: int) -> BisectResult:
    """Find the rows that cause a fault, in a batch that shows it.

    Takes about 2 k log2(N/k) passes for k rows of N.

    Args:
        shows_fault: Function that runs a pass on a batch of the given rows, int64 [N], and returns True if the fault
            occurs; see `keep_rows`.
        count: Rows of the batch, N.
        most: Largest number of passes.
    """
    pending = [tuple(range(count))]
    rows: list[int] = []
    together: list[tuple[int, ...]] = []
    passes, sampled = 0, False
    while pending:
        parts = len(pending)
        found: list[tuple[int, ...]] = []
        for place, group in enumerate(pending):
            if len(group) == 1:
                rows.append(group[0])
                continue
            if passes + 2 > most:
                return BisectResult(tuple(sorted(rows)), (*together, *pending[place:], *found), False, passes)
            halves = group[: len(group) // 2], group[len(group) // 2 :]
            passes += 2
            faulty = [half for half in halves if shows_fault(keep_rows(half, count))]
            found += faulty
            if not faulty:
                together.append(group)
        if not sampled and not together and len(found) == 2 * parts >= _SAMPLED_PARTS:
            sampled, passes = True, passes + len(found)
            if all(shows_fault(keep_rows([group[len(group) // 2]], count)) for group in found):
                return BisectResult(tuple(range(count)), (), True, passes)
        pending = found
    return BisectResult(tuple(sorted(rows)), tuple(together), len(rows) == count, passes)


def keep_rows(kept: Sequence[int], count: int) -> Tensor:
    """Return the row at each place of a batch that keeps only some rows.

    Kept rows stay at their places and are repeated at the others. The batch keeps its size, so that random numbers fall
    on the same rows as before.

    Args:
        kept: Rows to keep.
        count: Rows of the batch, N.

    Returns:
        int64 [N].

    >>> keep_rows([1, 3], 5).tolist()
    [1, 1, 1, 3, 1]
    """
    own, repeated = set(kept), list(kept)
    return torch.tensor([row if row in own else repeated[row % len(repeated)] for row in range(count)])
