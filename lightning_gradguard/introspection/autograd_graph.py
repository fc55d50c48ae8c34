"""Read the structure of a model from autograd.

Order, paths and kinds of operations. The graph is traversed once from ``loss.grad_fn``. It covers functional calls and
modules alike, and can be read after the backward pass too, which frees only the saved tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_gradguard.introspection.graph_problems import GraphProblem
from lightning_gradguard.introspection.operations import (
    LOOKUPS,
    MERGES,
    VIEWS,
    composed_kind,
    kind_of,
    operation_of,
)


@dataclass(frozen=True)
class GraphSummary:
    """Structure of an autograd graph, without its tensors.

    Attributes:
        names: The parameters, as given.
        order: Indices into ``names`` from input to output, by first use in the forward pass. Parameters that
            share a first use, and those without a path, stay beside their neighbours in ``names``.
        missing: Trainable parameters without a path from the loss. Empty where the graph cannot tell: without a graph,
            under re-entrant checkpointing, and for sharded parameters, of which the graph holds a gathered copy.
        embeddings: Look-up tables and positional tables: parameters of two dimensions or more that are indexed, or
            added as they are. Their gradient says nothing about depth.
        shortest: Nodes on the shortest path from the loss to each reached parameter, both ends included.
        longest: The same on the longest path.
        kinds: For each reached parameter the number of nodes of each kind on its shortest path; see
            `operations.kind_of`.
        loss_ops: Counts of the operations after the last matrix product: the loss function, and what leads to it.
        products: Most matrix products and convolutions on any one path.
        recurrent: Parameters that are applied again and again along one path, or by a fused recurrent layer.
        recurrences: Number of times the most used of them is applied; 0 when a fused layer hides it.
        skips: True if some value is added or concatenated to something computed from it.
        opaque: True if a node hides part of the model (compiled, re-entrantly checkpointed, flattened).
        dtypes: Names of the dtypes to which something is converted, such as "float16" under autocast.
        nodes: Number of nodes in the graph; 0 without one.
        problems: Mistakes that the graph shows.
        normalised: Parameters whose scale a normalization right behind them removes.
    """

    names: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    missing: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    shortest: Mapping[str, int] = field(default_factory=dict)
    longest: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    loss_ops: Mapping[str, int] = field(default_factory=dict)
    products: int = 0
    recurrent: frozenset[str] = frozenset()
    recurrences: int = 0
    skips: bool = False
    opaque: bool = False
    dtypes: frozenset[str] = frozenset()
    nodes: int = 0
    problems: tuple[GraphProblem, ...] = ()
    normalised: frozenset[str] = frozenset()


def summarize_graph(loss: Tensor, parameters: Mapping[str, Tensor]) -> GraphSummary:
    """Summarize a loss's autograd graph in linear time.

    Args:
        loss: The tensor that was, or is about to be, differentiated. Without a ``grad_fn`` the summary is empty.
        parameters: Name to parameter, in the order of ``named_parameters``.
    """
    names = tuple(parameters)
    if loss.grad_fn is None:
        return GraphSummary(names=names, order=tuple(range(len(names))))
    graph = Graph(loss.grad_fn)
    leaves = {name: graph.leaves[id(p)] for name, p in parameters.items() if id(p) in graph.leaves}
    uses = {name: graph.uses(leaf) for name, leaf in leaves.items()}
    tables = frozenset(
        n for n in leaves if parameters[n].ndim >= 2 and _is_table([graph.ops[i] for i in uses[n]])
    )
    whole = {n for n, p in parameters.items() if p.requires_grad and not hasattr(p, "placements")}
    products = max(graph.products)
    recurrent = frozenset(n for n in leaves if any(graph.node_kinds[i] == "recurrent" for i in uses[n]))
    recurrences = 0
    matrices = sum(parameters[n].ndim >= 2 for n in leaves.keys() - tables)
    if products >= max(8, 2 * matrices):
        # More products in a row than there are matrices: some are applied again and again.
        unrolled = {n: len(nodes) for n, nodes in uses.items() if len(nodes) >= 4 and n not in tables}
        recurrent |= unrolled.keys()
        recurrences = max(unrolled.values(), default=0)
    return GraphSummary(
        names=names,
        order=_order(names, {n: min(graph.sequence[i] for i in nodes) for n, nodes in uses.items() if nodes}),
        missing=frozenset() if graph.hides_leaves else frozenset(whole - leaves.keys()),
        embeddings=tables,
        shortest={name: graph.shortest[leaf] for name, leaf in leaves.items()},
        longest={name: graph.longest[leaf] for name, leaf in leaves.items()},
        kinds={name: graph.kinds[leaf] for name, leaf in leaves.items()},
        loss_ops=graph.loss_ops(),
        products=products,
        recurrent=recurrent,
        recurrences=recurrences,
        skips=graph.has_skip(),
        opaque=graph.hides_leaves or any(op.startswith("CompiledFunction") for op in graph.ops),
        dtypes=frozenset(graph.dtypes),
        nodes=len(graph.ops),
        normalised=frozenset(n for n, nodes in uses.items() if nodes and graph.is_normalised(nodes)),
    )


class Graph:
    """Autograd graph as lists, breadth-first from the loss.

    It keeps no node alive.

    Args:
        root: Node of the loss.

    Attributes:
        ops: Operation of each node, such as "Addmm".
        node_kinds: Kind of each operation; see `operations.kind_of`.
        sequence: Sequence number of each node, in the order of the forward pass.
        edges: Children of each node, as pairs of node and output.
        parents: Parents of each node.
        leaves: Id of each leaf tensor to its node.
        shortest: Nodes on the shortest path from the loss.
        longest: The same on the longest path.
        products: Most matrix products on a path from the loss, the node included.
        in_loss: True where no path from the loss has a matrix product.
        kinds: Counts of the kinds on the shortest path.
        hides_leaves: True if leaf tensors are not the parameters themselves.
        dtypes: Names of the dtypes to which something is converted.
    """

    def __init__(self, root: Any) -> None:
        self.ops: list[str] = []
        self.sequence: list[int] = []
        self.edges: list[list[tuple[int, int]]] = []
        self.leaves: dict[int, int] = {}
        self.hides_leaves = False
        self.dtypes: set[str] = set()
        self.shortest = [1]
        self._discoverer = [0]
        self._traverse(root)
        self.parents: list[list[int]] = [[] for _ in self.ops]
        for index, edges in enumerate(self.edges):
            for child, _ in edges:
                self.parents[child].append(index)
        self.node_kinds = [kind_of(op) or self._composed_kind(index) for index, op in enumerate(self.ops)]
        self.kinds = self._count_kinds()
        self.longest, self.products, self.in_loss = self._measure_paths()

    def uses(self, leaf: int) -> list[int]:
        """Return the nodes that compute with a leaf."""
        found: list[int] = []
        pending, seen = [leaf], {leaf}
        while pending:
            for parent in self.parents[pending.pop()]:
                if parent not in seen:
                    seen.add(parent)
                    (pending if self.ops[parent] in VIEWS else found).append(parent)
        return found

    def is_normalised(self, nodes: list[int], reach: int = 64) -> bool:
        """Return True if every path from these nodes meets a normalization.

        Only operations come before it that keep a change of scale: views, sums with what is no other layer's output,
        ReLU, pooling.

        Args:
            nodes: Products with one parameter.
            reach: Nodes to visit.
        """
        pending, seen = [*nodes], {*nodes}
        while pending:
            node = pending.pop()
            if not self.parents[node] or len(seen) > reach:
                return False
            for parent in self.parents[node]:
                if parent in seen or self.node_kinds[parent] == "normalisation":
                    continue
                op = self.ops[parent]
                inputs = sum(self.ops[child] != "AccumulateGrad" for child, _ in self.edges[parent])
                if not (op in VIEWS or _keeps_scale(op) or (op == "Add" and inputs == 1)):
                    return False
                seen.add(parent)
                pending.append(parent)
        return True

    def loss_ops(self) -> Counter[str]:
        """Count the operations after the last product.

        A division of the whole loss by a constant is left out: trainers do that.
        """
        scaled = self.ops[0] == "Div" and len(self.edges[0]) == 1
        return Counter(op for i, op in enumerate(self.ops) if self.in_loss[i] and not (i == 0 and scaled))

    def has_skip(self, budget: int = 20_000, reach: int = 400) -> bool:
        """Return True if there is a skip connection.

        Args:
            budget: Nodes to visit in all; a block of a residual net has tens.
            reach: Nodes to visit for one sum.
        """
        for index, op in enumerate(self.ops):
            inputs = [e for e in self.edges[index] if self.ops[e[0]] != "AccumulateGrad"]
            if op not in MERGES or len(inputs) < 2:
                continue
            inputs.sort(key=lambda edge: self.sequence[edge[0]])
            earliest, pending, seen = inputs[0], [inputs[-1][0]], set[int]()
            while pending and len(seen) < reach:
                node = pending.pop()
                if earliest in self.edges[node]:
                    return True
                # An earlier value cannot be computed from a later one.
                begin = self.sequence[earliest[0]]
                fresh = {c for c, _ in self.edges[node] if self.sequence[c] >= begin} - seen
                seen |= fresh
                pending += [c for c in fresh if self.edges[c]]
            budget -= len(seen) + 1
            if budget < 0:
                return False
        return False

    def _traverse(self, root: Any) -> None:
        # torch makes a new Python object for a node that nothing holds, so `nodes` holds them.
        nodes, found = [root], {root: 0}
        for index, node in enumerate(nodes):  # grows during the loop
            op = operation_of(node.name())
            if op == "AccumulateGrad":
                self.leaves[id(node.variable)] = index
                self.hides_leaves |= bool(getattr(node.variable, "_is_flat_param", False))
            self.hides_leaves |= op.startswith("CheckpointFunction")
            if op == "ToCopy":
                made = getattr(node, "_input_metadata", ())
                self.dtypes.update(str(one.dtype).removeprefix("torch.") for one in made)
            self.ops.append(op)
            self.sequence.append(node._sequence_nr())
            edges = []
            for child, output in node.next_functions:
                if child is None:
                    continue
                if child not in found:
                    found[child] = len(nodes)
                    nodes.append(child)
                    self.shortest.append(self.shortest[index] + 1)
                    self._discoverer.append(index)
                edges.append((found[child], output))
            self.edges.append(edges)

    def _composed_kind(self, index: int) -> str | None:
        below = [(self.ops[c], [self.ops[d] for d, _ in self.edges[c]]) for c, _ in self.edges[index]]
        return composed_kind(self.ops[index], below)

    def _count_kinds(self) -> list[dict[str, int]]:
        """Count kinds on the shortest path to each node."""
        counts: list[dict[str, int]] = []
        for index, kind in enumerate(self.node_kinds):
            above = counts[self._discoverer[index]] if index else {}
            counts.append(above if kind is None else {**above, kind: above.get(kind, 0) + 1})
        return counts

    def _measure_paths(self) -> tuple[list[int], list[int], list[bool]]:
        """Measure paths in topological order."""
        size = len(self.ops)
        longest, products, in_loss = [1] * size, [0] * size, [True] * size
        waiting = [len(parents) for parents in self.parents]
        ready = [0]
        while ready:
            index = ready.pop()
            products[index] += self.node_kinds[index] == "product"
            is_layer = self.node_kinds[index] in ("product", "recurrent")
            in_loss[index] &= not is_layer and bool(self.edges[index])
            for child, _ in self.edges[index]:
                longest[child] = max(longest[child], longest[index] + 1)
                products[child] = max(products[child], products[index])
                in_loss[child] &= in_loss[index]
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)
        return longest, products, in_loss


def _order(names: tuple[str, ...], first_use: Mapping[str, int]) -> tuple[int, ...]:
    """Sort indices by first use."""
    keys = [first_use.get(name) for name in names]
    for i in range(1, len(keys)):
        keys[i] = keys[i - 1] if keys[i] is None else keys[i]
    for i in reversed(range(len(keys) - 1)):
        keys[i] = keys[i + 1] if keys[i] is None else keys[i]
    return tuple(sorted(range(len(names)), key=lambda i: keys[i] or 0))


def _keeps_scale(operation: str) -> bool:
    """Return True for operations f with f(c x) = c f(x) for c > 0."""
    return operation in ("Relu", "LeakyRelu", "NativeDropout") or "Pool" in operation


def _is_table(operations: list[str]) -> bool:
    looked_up = any(op in LOOKUPS for op in operations)
    return looked_up or (bool(operations) and all(op in MERGES for op in operations))
