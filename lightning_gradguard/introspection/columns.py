"""Find the columns of depth of a model: paths of layers from an input to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_gradguard.introspection.operations import VIEWS

if TYPE_CHECKING:
    from lightning_gradguard.introspection.autograd_graph import Graph

#: Most columns of a model; further layers join the first one.
MAX_COLUMNS = 64


def find_columns(
    graph: Graph, leaves: Mapping[str, int], parameters: Mapping[str, Tensor], order: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Return columns of layers that together hold every layer.

    Layers of one column are computed from each other, so that their gradients can be compared over depth. A net without
    branches is one column. Nets side by side have one each; parts that they share belong to several. Of the paths that
    are possible, the one with most layers that are in none so far comes next.

    Args:
        graph: The graph.
        leaves: Node of each layer's weight by name.
        parameters: Name to parameter.
        order: Indices into ``parameters`` from input to output.

    Returns:
        Indices into ``parameters``, input first. Empty if there is no layer.
    """
    names = tuple(parameters)
    places = [i for i in order if names[i] in leaves]
    upstream = _upstream(graph, [leaves[names[i]] for i in places])
    before = [_direct(inputs, upstream) for inputs in upstream]
    uncovered = (1 << len(places)) - 1
    columns: list[tuple[int, ...]] = []
    while uncovered and len(columns) < MAX_COLUMNS:
        column = _longest_path(before, uncovered)
        uncovered &= ~sum(1 << layer for layer in column)
        columns.append(tuple(places[layer] for layer in column))
    return tuple(columns)


def _upstream(graph: Graph, leaves: Sequence[int]) -> list[int]:
    """Return for each layer which layers lead to it.

    As bits: layer k is bit k. Only earlier layers count, so that a layer that is applied again and again has a place.
    """
    uses = _uses(graph, leaves)
    own = [0] * len(graph.ops)
    for layer, nodes in enumerate(uses):
        for node in nodes:
            own[node] |= 1 << layer
    below = [0] * len(graph.ops)
    for node in reversed(graph.topological):
        for child, _ in graph.edges[node]:
            below[node] |= below[child] | own[child]
    found = []
    for layer, nodes in enumerate(uses):
        bits = 0
        for node in nodes:
            bits |= below[node] | own[node]  # weights of one operation are of one column
        found.append(bits & ((1 << layer) - 1))
    return found


def _uses(graph: Graph, leaves: Sequence[int]) -> list[list[int]]:
    """Return the nodes in which each weight meets data.

    A node that is computed from weights alone and has the shape of one of them is still a weight: weight normalization,
    a scale, an added low-rank matrix.
    """
    shapes = {leaf: {graph.shapes[leaf]} for leaf in graph.leaves.values()}
    for node in reversed(graph.topological):
        inputs = [child for child, _ in graph.edges[node]]
        if not inputs or not all(child in shapes for child in inputs):
            continue
        known = set().union(*(shapes[child] for child in inputs))
        product = graph.node_kinds[node] in ("product", "recurrent", "attention")
        if graph.ops[node] in VIEWS or (graph.shapes[node] in known and not product):
            shapes[node] = known | {graph.shapes[node]}
    found = []
    for leaf in leaves:
        nodes: list[int] = []
        pending, seen = [leaf], {leaf}
        while pending:
            for parent in graph.parents[pending.pop()]:
                if parent not in seen:
                    seen.add(parent)
                    (pending if parent in shapes else nodes).append(parent)
        found.append(nodes)
    return found


def _direct(inputs: int, upstream: Sequence[int]) -> list[int]:
    """Return the layers that lead to one directly, not by way of another."""
    found = []
    while inputs:
        nearest = inputs.bit_length() - 1
        found.append(nearest)
        inputs &= ~(upstream[nearest] | 1 << nearest)
    return found


def _longest_path(before: Sequence[Sequence[int]], uncovered: int) -> list[int]:
    """Return the path with most uncovered layers, then with most layers."""
    size = len(before)
    length, previous = [0] * size, [-1] * size
    for layer, inputs in enumerate(before):
        for earlier in reversed(inputs):  # of equals the earliest
            if length[earlier] > length[layer]:
                length[layer], previous[layer] = length[earlier], earlier
        length[layer] += 1 + size * (uncovered >> layer & 1)
    layer = max(range(size), key=length.__getitem__)
    path = []
    while layer >= 0:
        path.append(layer)
        layer = previous[layer]
    return path[::-1]
