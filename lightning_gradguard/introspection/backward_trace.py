"""Trace the node of an autograd graph that made the first NaN in a backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_gradguard.introspection.batch import is_finite, nonfinite_kind
from lightning_gradguard.introspection.nonfinite_trace import ForwardTrace, NonFiniteSource, own_class
from lightning_gradguard.introspection.operation_facts import OperationFacts, facts_of
from lightning_gradguard.introspection.operations import VIEWS, kind_of, operation_of
from lightning_gradguard.introspection.user_lines import line_of

#: Operations whose gradient is a sum, product or copy of what they are given, so that an Inf out of it is an overflow.
_ARITHMETIC = frozenset(
    {"Mul", "Add", "Sub", "Neg", "Sum", "Expand", "Repeat", "ToCopy", "Cat", "Index", "Gather"}
)
#: Operations that leave out elements, by the name of their function.
_CHOOSERS = {
    "Where": "where",
    "MaskedFill": "masked_fill",
    "MaskedScatter": "masked_scatter",
    "MaskedSelect": "masked_select",
}
#: Operations from element to element, through which an operation may reach one of these.
_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Neg", "Rsub", "Pow", "Sqrt", "Log", "Exp", "Abs", *VIEWS}
)
#: Steps that are searched for them.
_REACH = 24


class BackwardTrace:
    """Hooks that observe one backward pass.

    Args:
        loss: The tensor that will be differentiated, once.
        forward: The trace of its forward pass.
    """

    def __init__(self, loss: Tensor, forward: ForwardTrace) -> None:
        self._forward = forward
        self._nodes: list[Any] = [loss.grad_fn]
        self._parents: dict[Any, list[tuple[int, int]]] = {}
        self._bad: dict[int, tuple[bool, ...]] = {}
        self._arrived: dict[
            int, Tensor
        ] = {}  # at operations that leave out elements: where a gradient arrives
        self._sources: dict[int, NonFiniteSource] = {}  # in the order of the backward pass
        for index, node in enumerate(self._nodes):  # grows during the loop
            for slot, (child, _) in enumerate(node.next_functions):
                if child is not None:
                    if child not in self._parents:
                        self._parents[child] = []
                        self._nodes.append(child)
                    self._parents[child].append((index, slot))
            if node.next_functions:
                node.register_hook(self._inspect(index))

    def first_source(self) -> tuple[NonFiniteSource, bool, bool] | None:
        """Return the first source that reaches a gradient.

        The first flag is True if it lies in the loss, the second if it lies in the forward pass: a node that was given
        NaN or Inf there. None without a source.
        """
        leaves = [n for n in self._nodes if not n.next_functions]
        gradients = [(n, getattr(getattr(n, "variable", None), "grad", None)) for n in leaves]
        pending = [n for n, gradient in gradients if gradient is not None and not is_finite(gradient)]
        seen, reached = set(pending), set()
        while pending:
            for index, slot in self._parents.get(pending.pop(), ()):
                node = self._nodes[index]
                if self._bad.get(index, ())[slot : slot + 1] != (True,):
                    continue
                if index in self._sources:
                    reached.add(index)
                elif node not in seen:
                    seen.add(node)
                    pending.append(node)
        first = next((index for index in self._sources if index in reached), None)
        if first is None:
            return None
        call = self._forward.calls.get(self._nodes[first])
        earlier = [source for source in (() if call is None else call.given) if not source.intended]
        if earlier:
            source, node = min(earlier, key=lambda source: source.call), self._sources[first]
            if source.path and node.facts is not None and node.facts.chooser:
                # Values of the batch that are left out on purpose: it is the gradient that still sees them.
                in_loss = self._nodes[first]._sequence_nr() > self._forward.last_sequence
                return replace(node, tensor=source.path), in_loss, False
            if source.facts is not None and node.facts is not None:
                facts = replace(source.facts, unselected=node.facts.unselected, chooser=node.facts.chooser)
                source = replace(source, facts=facts)
            return source, source.call > self._forward.last_use, True
        in_loss = self._nodes[first]._sequence_nr() > self._forward.last_sequence
        return self._sources[first], in_loss, False

    def _inspect(self, index: int) -> Callable[..., None]:
        def hook(produced: tuple[Tensor | None, ...], incoming: tuple[Tensor | None, ...]) -> None:
            if operation_of(self._nodes[index].name()) in _CHOOSERS and incoming[0] is not None:
                self._arrived[index] = incoming[0] != 0
            bad = tuple(g is not None and not is_finite(g) for g in produced)
            if not any(bad):
                return
            self._bad[index] = bad
            if all(g is None or is_finite(g) for g in incoming):
                worst = [g for g, is_bad in zip(produced, bad, strict=True) if is_bad and g is not None]
                unselected = _is_unselected(produced, incoming)
                chooser = self._chooser(index, worst) if unselected else ""
                self._sources[index] = self._describe(index, worst, unselected=unselected, chooser=chooser)

        return hook

    def _describe(
        self, index: int, worst: list[Tensor], *, unselected: bool, chooser: str
    ) -> NonFiniteSource:
        node = self._nodes[index]
        name, operation = node.name().rsplit("::", 1)[-1], operation_of(node.name())
        call = self._forward.calls.get(node)
        module, layer = self._forward.owners.get(node, ("", ""))
        values = nonfinite_kind(*worst)
        is_sum = operation in _ARITHMETIC or kind_of(operation) == "product"
        line = line_of(node.metadata.get("traceback_", ()))
        dtype = str(worst[0].dtype).removeprefix("torch.")
        overflow = math.inf if is_sum and values == "Inf" else 0.0
        # The nodes of a gradient that is differentiated again are those of other functions.
        facts = (
            OperationFacts("")
            if call is None or call.function == "grad"
            else facts_of(call, self._forward.provenance)
        )
        if own := own_class(node):
            facts = OperationFacts("", custom=own)
        facts = replace(facts, unselected=unselected, chooser=chooser)
        return NonFiniteSource(
            name, module, layer, line, values, len(self._sources), dtype=dtype, overflow=overflow, facts=facts
        )

    def _chooser(self, index: int, worst: list[Tensor]) -> str:
        """Return the operation that leaves out the elements without a finite gradient; empty without one."""
        pending, seen = [index], {index}
        while pending and len(seen) < _REACH:
            for parent, _ in self._parents.get(self._nodes[pending.pop(0)], ()):
                operation = operation_of(self._nodes[parent].name())
                if operation in _CHOOSERS:
                    arrived = self._arrived.get(parent)
                    bad = ~worst[0].isfinite()
                    # A gradient that is zero before it gets there is left out by something else.
                    unknown = arrived is None or arrived.shape != bad.shape
                    return _CHOOSERS[operation] if unknown or bool(arrived[bad].any()) else ""  # type: ignore[index]
                if parent not in seen and operation in _ELEMENTWISE:
                    seen.add(parent)
                    pending.append(parent)
        return ""


def _is_unselected(produced: tuple[Tensor | None, ...], incoming: tuple[Tensor | None, ...]) -> bool:
    """Return True if gradients are NaN or Inf only where the incoming one is zero."""
    came = next((g for g in incoming if g is not None), None)
    bad = [g for g in produced if g is not None and not is_finite(g)]
    if came is None or any(g.shape != came.shape for g in bad):
        return False
    return all(bool((came[~g.isfinite()] == 0).all()) for g in bad)
