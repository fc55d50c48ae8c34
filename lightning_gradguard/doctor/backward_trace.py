"""Watches one backward pass: the first node that makes what is not finite of what is, and reaches a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_gradguard.doctor.batch import is_finite, kind_of_values
from lightning_gradguard.doctor.forward_trace import Birth
from lightning_gradguard.doctor.operations import kind_of, operation_of
from lightning_gradguard.doctor.places import line_of

#: Operations whose gradient is a sum, product or copy of what they are given, so that an Inf out of it is an overflow.
_ARITHMETIC = frozenset(
    {"Mul", "Add", "Sub", "Neg", "Sum", "Expand", "Repeat", "ToCopy", "Cat", "Index", "Gather"}
)


class BackwardTrace:
    """Hooks on every node of a graph.

    Args:
        loss: What will be differentiated, once.
        owners: Node to name and class of the module that made it.
        last_sequence: Number of the newest node that uses a parameter; what is newer belongs to the loss.
    """

    def __init__(self, loss: Tensor, owners: dict[Any, tuple[str, str]], last_sequence: int) -> None:
        self._owners, self._last = owners, last_sequence
        self._nodes: list[Any] = [loss.grad_fn]
        self._parents: dict[Any, list[tuple[int, int]]] = {}
        self._bad: dict[int, tuple[bool, ...]] = {}
        self._born: dict[int, Birth] = {}  # in the order of the backward pass
        for index, node in enumerate(self._nodes):  # grows while it is walked
            for slot, (child, _) in enumerate(node.next_functions):
                if child is not None:
                    if child not in self._parents:
                        self._parents[child] = []
                        self._nodes.append(child)
                    self._parents[child].append((index, slot))
            if node.next_functions:
                node.register_hook(self._look(index))

    def birth(self) -> tuple[Birth, bool] | None:
        """The first birth in backward order that reaches a leaf's gradient, and whether it lies in the loss."""
        leaves = [n for n in self._nodes if not n.next_functions]
        gradients = [(n, getattr(getattr(n, "variable", None), "grad", None)) for n in leaves]
        pending = [n for n, gradient in gradients if gradient is not None and not is_finite(gradient)]
        seen, reached = set(pending), set()
        while pending:
            for index, slot in self._parents.get(pending.pop(), ()):
                node = self._nodes[index]
                if self._bad.get(index, ())[slot : slot + 1] != (True,):
                    continue
                if index in self._born:
                    reached.add(index)
                elif node not in seen:
                    seen.add(node)
                    pending.append(node)
        first = next((index for index in self._born if index in reached), None)
        if first is None:
            return None
        return self._born[first], self._nodes[first]._sequence_nr() > self._last

    def _look(self, index: int) -> Callable[..., None]:
        def hook(produced: tuple[Tensor | None, ...], incoming: tuple[Tensor | None, ...]) -> None:
            bad = tuple(g is not None and not is_finite(g) for g in produced)
            if not any(bad):
                return
            self._bad[index] = bad
            if all(g is None or is_finite(g) for g in incoming):
                worst = [g for g, is_bad in zip(produced, bad, strict=True) if is_bad and g is not None]
                self._born[index] = self._describe(self._nodes[index], worst)

        return hook

    def _describe(self, node: Any, worst: list[Tensor]) -> Birth:
        name, operation = node.name().rsplit("::", 1)[-1], operation_of(node.name())
        module, layer = self._owners.get(node, ("", ""))
        values = kind_of_values(*worst)
        sums = operation in _ARITHMETIC or kind_of(operation) == "product"
        line = line_of(node.metadata.get("traceback_", ()))
        dtype = str(worst[0].dtype).removeprefix("torch.")
        overflow = float("inf") if sums and values == "Inf" else 0.0
        return Birth(name, module, layer, line, values, len(self._born), dtype=dtype, overflow=overflow)
