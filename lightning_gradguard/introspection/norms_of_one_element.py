"""Find normalizations over a single element, whose result is the same for every input."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lightning_gradguard.introspection.graph_problems import GraphProblem, Problem
from lightning_gradguard.introspection.operations import VIEWS

if TYPE_CHECKING:
    from lightning_gradguard.introspection.autograd_graph import Graph

_BATCH_NORM = re.compile("Batch_?Norm")
#: Operations whose result is the statistic of some elements, by which a normalization written by hand divides.
_STATISTICS = ("Mean", "LinalgVectorNorm", "Norm", "Var", "Std", "VarMean", "StdMean")
#: Operations between a statistic and the values that are divided by it.
_BETWEEN = VIEWS | {"Add", "Sqrt", "Rsqrt", "Pow", "ClampMin", "Clamp", "Maximum", "Reciprocal"}
#: Fraction of the layers that a normalization cuts off from which it is an error whatever the loss does.
_CERTAIN_SHARE = 0.5


def averages_one_element(node: Any, op: str, shape: tuple[int, ...]) -> bool:
    """Return True if a node's statistics are over one element.

    Args:
        node: The backward node.
        op: Its operation, such as "NativeGroupNorm".
        shape: Shape of its result.
    """
    try:
        if op == "NativeGroupNorm":
            elements = int(getattr(node, "_saved_C")) * int(getattr(node, "_saved_HxW"))  # noqa: B009
            return elements == int(getattr(node, "_saved_group"))  # noqa: B009
        if op in ("NativeLayerNorm", "FusedRmsNorm"):
            return bool(math.prod(getattr(node, "_saved_normalized_shape")) == 1)  # noqa: B009
        if op in _STATISTICS:
            made = getattr(node.next_functions[0][0], "_input_metadata")  # noqa: B009
            return bool(shape) and math.prod(made[0].shape) == math.prod(shape)
        if _BATCH_NORM.search(op) and len(shape) > 1:
            return bool(getattr(node, "_saved_training", False)) and math.prod(shape) == shape[1]
    except (AttributeError, IndexError, RuntimeError, TypeError):  # the node does not tell
        return False
    return False


def find_norms_of_one_element(
    graph: Graph, leaves: Mapping[str, int], layers: Collection[str]
) -> tuple[GraphProblem, ...]:
    """Return the mistake, if some layer gets its gradient through such normalizations only.

    A normalization subtracts the mean, so that a single element becomes 0 and the result is the bias.

    Args:
        graph: The graph.
        leaves: Node of each parameter by name.
        layers: Names of the layers' weights.
    """
    norms = {node for node in graph.one_element if graph.ops[node] not in _STATISTICS}
    norms |= {i for i, op in enumerate(graph.ops) if op in ("Sub", "Mul", "Div") and _is_by_hand(graph, i)}
    if not norms:
        return ()
    own = {child for node in norms for child, _ in graph.edges[node] if graph.ops[child] == "AccumulateGrad"}
    # The variance of one element is 0, whatever it is.
    constant = {node for node in graph.one_element if graph.ops[node].startswith(("Var", "Std"))}
    reached = _reached(graph, norms | constant)
    inside = [name for name, leaf in leaves.items() if leaf in own]
    cut = [name for name in layers if leaves[name] not in reached and leaves[name] not in own]
    on_input = any(
        inputs and own.issuperset(child for child, _ in inputs)
        for inputs in map(graph.edges.__getitem__, norms)
    )
    if not cut and not on_input:
        return ()  # values pass beside it too
    where = list(dict.fromkeys(name.rpartition(".")[0] or name for name in inside))
    place = " and ".join(f"`{name}`" for name in where[:3]) or "A normalization"
    if not where and cut:
        place += f" after `{max(cut, key=lambda name: _last_use(graph, leaves[name]))}`"
    verb = "normalize" if len(where) > 1 else "normalizes"
    text = f"{place} {verb} over a single element, so the result is the same for every input"
    if cut:
        text += f", and {_listing(cut)} {'gets' if len(cut) == 1 else 'get'} no gradient through it"
    certain = bool(cut) and len(cut) >= _CERTAIN_SHARE * len(layers)
    kind = Problem.ONE_ELEMENT_NORMALIZATION
    return (GraphProblem(kind, text + ".", tuple(cut or inside), certain=certain),)


def _is_by_hand(graph: Graph, node: int) -> bool:
    """Return True for x - mean(x), x / norm(x) or x / rms(x) of one element."""
    inputs = [child for child, _ in graph.edges[node]]
    if len(inputs) != 2:
        return False
    for value, pending in ((inputs[0], [inputs[1]]), (inputs[1], [inputs[0]])):
        between = VIEWS if graph.ops[node] == "Sub" else _BETWEEN
        while pending:
            index = pending.pop()
            children = [child for child, _ in graph.edges[index]]
            if index in graph.one_element and graph.ops[index] in _STATISTICS:
                squared = [d for c in children if graph.ops[c] == "Pow" for d, _ in graph.edges[c]]
                if value in (children if graph.ops[node] == "Sub" else [*children, *squared]):
                    return graph.ops[node] == "Sub" or graph.ops[index] != "Mean" or bool(squared)
            elif graph.ops[index] in between and len(children) == 1:
                pending += children
    return False


def _reached(graph: Graph, without: set[int]) -> set[int]:
    """Return the nodes that the loss reaches without some others."""
    pending, seen = [0], {0, *without}
    while pending:
        for child, _ in graph.edges[pending.pop()]:
            if child not in seen:
                seen.add(child)
                pending.append(child)
    return seen - without


def _last_use(graph: Graph, leaf: int) -> int:
    return max((graph.sequence[node] for node in graph.uses(leaf)), default=0)


def _listing(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more layers"
