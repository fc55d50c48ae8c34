"""Parameters of one optimizer that histograms are of, and what was counted of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_gradguard.engine.readback import read
from lightning_gradguard.loggers.histograms import ShownTensors
from lightning_gradguard.stats.histogram import EDGES, Counts
from lightning_gradguard.stats.parameters import are_same, members, select
from lightning_gradguard.stats.sharding import Shards

K = TypeVar("K")

_BINS = len(EDGES) - 1


class Counted(NamedTuple):
    """Counts of one tensor, read on the host."""

    rms: float  # not finite if an element is not
    limit: float
    bins: list[float]
    below: list[float]
    numel: float

    @classmethod
    def merge(cls, parts: Sequence[Counted]) -> Counted:
        """Join counts of several tensors; with an axis of values, those of the first."""
        if len(parts) == 1 or len({part.limit for part in parts}) > 1:
            return parts[0]
        numel = sum(part.numel for part in parts)
        squares = sum(part.rms**2 * part.numel for part in parts)
        bins = [sum(column) for column in zip(*(part.bins for part in parts), strict=True)]
        return cls((squares / max(numel, 1)) ** 0.5, parts[0].limit, bins, [], numel)


def table_of(counts: Counts) -> Tensor:
    """Return limits, squares, bins and thresholds as [T, N]."""
    head = torch.stack([counts.limits, counts.squares], 1)
    return torch.cat([head, counts.bins, counts.below], 1)


def read_counts(parameters: Mapping[K, Tensor], counts: Counts, *, sharded: bool = True) -> dict[K, Counted]:
    """Read counts of parameters, by key; those of a sharded one are summed over ranks.

    Args:
        parameters: The parameters.
        counts: Their counts.
        sharded: False if it is known that no parameter is sharded, since to look costs more than to read.
    """
    tensors, table = list(parameters.values()), table_of(counts)
    shards = Shards.of(tensors) if sharded else None
    if shards is not None:
        summed = shards.sum_over_ranks([table[:, 1:] * shards.shares.unsqueeze(1)])[0].float()
        table = torch.cat([table[:, :1], summed], 1)
    return parse_counts(read(table.flatten()), parameters, [p.numel() for p in tensors], table.shape[1])


def parse_counts(
    numbers: Sequence[float], keys: Iterable[K], numels: Sequence[float], width: int
) -> dict[K, Counted]:
    """Return counts by key from the numbers of `table_of`.

    Args:
        numbers: The rows, one after another.
        keys: One for each row.
        numels: Number of elements of each row's tensor.
        width: Numbers in a row.
    """
    found = {}
    for i, (key, numel) in enumerate(zip(keys, numels, strict=True)):
        limit, squares, *rest = numbers[i * width : (i + 1) * width]
        found[key] = Counted((squares / max(numel, 1)) ** 0.5, limit, rest[:_BINS], rest[_BINS:], numel)
    return found


class OptimizerTensors:
    """Parameters of one optimizer, and those shown.

    Args:
        optimizer: The optimizer.
        choice: Choice of the tensors that are shown.
        steps: Steps that the optimizer has taken.

    Attributes:
        named: Those that a guard has named, which are shown whatever the choice.
        step: Number of the step that is being taken.
        counted: What was counted last of each gradient; None before the first time.
        counted_at: Lightning's step of that.
        parameters: Parameters by name, in the order of ``named_parameters``, the same on every rank.
        after_step: Called once the step has been taken, or None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, choice: ShownTensors, steps: int) -> None:
        self._optimizer, self._choice = optimizer, choice
        self.step = steps - 1
        self.parameters: dict[str, Tensor] = {}
        self.named: list[str] = []
        self.counted: dict[str, Counted] | None = None
        self.counted_at = 0
        self.after_step: Callable[[], object] | None = None
        self._shown: list[str] = []
        self._members: list[Tensor] = []
        self._newest: int | None = None
        self._hook: Any = None

    def start_step(self, global_step: int, *, hook: bool) -> bool:
        """Count a step; return False if it is the same as before.

        Args:
            global_step: The Trainer's counter.
            hook: Something will be called after the step.
        """
        if self._newest == global_step:
            return False
        self._newest, self.step, self.after_step = global_step, self.step + 1, None
        if hook and self._hook is None:
            self._hook = self._optimizer.register_step_post_hook(self._finish_step)
        return True

    def _finish_step(self, *_: object) -> None:
        # The hook stays until the batch ends: it must not be removed while the optimizer goes through its hooks.
        after_step, self.after_step = self.after_step, None
        if after_step is not None:
            after_step()

    def close(self) -> None:
        """Remove the hook."""
        self.after_step = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def next_step(self, global_step: int) -> int:
        """Return the number of the coming step."""
        return self.step + (self._newest != global_step)

    def update(self, module: nn.Module) -> None:
        """Update the parameters, which may have been added."""
        found = members(self._optimizer)
        if not are_same(found, self._members):
            self._members = found
            self.parameters = select(list(module.named_parameters()), self._optimizer)

    def choose(self, names: Sequence[str]) -> list[str]:
        """Return the tensors to show, as `ShownTensors.choose`, and those that were named."""
        weights = {name for name in names if self.parameters[name].ndim > 1}
        chosen = {*self._choice.choose(names, weights), *self.named}
        self._shown = [name for name in names if name in chosen]
        return self._shown

    def add_named(self, is_named: Callable[[str], bool], most: int) -> dict[str, Counted]:
        """Show named tensors from now on; return the counts of those that were not shown last time.

        Args:
            is_named: Returns True for a name that was named.
            most: Number of named tensors that stay, the newest ones.
        """
        counted = self.counted or {}
        fresh = [name for name in counted if name not in self.named and is_named(name)]
        self.named = [*self.named, *fresh][-most:]
        return {name: counted[name] for name in fresh if name not in self._shown}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types."""
        return {"steps": self.step + 1, "shown": self._choice.state_dict(), "named": list(self.named)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with a checkpoint's state.

        Raises:
            ValueError: If it has another form.
        """
        self._choice.load_state_dict(state["shown"])
        self.named = list(state["named"])
        self.step = max(state["steps"], 0) - 1
