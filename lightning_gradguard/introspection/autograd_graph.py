"""Read the structure of a model from autograd.

Order, paths and kinds of operations. The graph is traversed once from ``loss.grad_fn``. It covers functional calls and
modules alike, and can be read after the backward pass too, which frees only the saved tensors.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from lightning_gradguard.introspection.columns import find_columns
from lightning_gradguard.introspection.graph_problems import (
    GraphProblem,
    LossGraph,
    find_problems,
    is_policy_gradient,
    summed_rows,
)
from lightning_gradguard.introspection.norms_of_one_element import (
    averages_one_element,
    find_norms_of_one_element,
)
from lightning_gradguard.introspection.operations import (
    LOOKUPS,
    MERGES,
    VIEWS,
    composed_kind,
    kind_of,
    operation_of,
)

#: Operations that choose some of many results; the others get no gradient in this batch, and may in the next.
_SELECTIONS = frozenset({"Topk", "Scatter", "ScatterAdd", "Sort", "Kthvalue"})

#: Kinds of nodes at which a path between a parameter and the next layer ends.
_LAYERS = frozenset({"product", "recurrent", "normalisation"})


@dataclass(frozen=True)
class GraphSummary:
    """Structure of an autograd graph, without its tensors.

    Attributes:
        names: The parameters, as given.
        order: Indices into ``names`` from input to output, by first use in the forward pass. Parameters that
            share a first use, and those without a path, stay beside their neighbours in ``names``.
        columns: Paths of layers from an input to the loss, as indices into ``names``, input first; see
            `columns.find_columns`. Empty where the graph cannot tell.
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
        normalizations: Number of nodes that normalize.
        post_norms: Number of normalizations of a sum that nothing else uses, as at the end of a post-norm block.
        skips: True if some value is added or concatenated to something computed from it.
        hidden: Operations that are not autograd's own, and hide what they compute: custom functions, compiled and
            scripted parts.
        opaque: True if a node hides part of the model (compiled, re-entrantly checkpointed, flattened).
        dtypes: Names of the dtypes to which something is converted, such as "float16" under autocast.
        nodes: Number of nodes in the graph; 0 without one.
        problems: Mistakes that the graph shows.
        summed: Number of samples that the loss sums up; 0 if it is a mean, or the graph cannot tell.
        unused: Trainable tensors that took no part in the forward pass. Found by observing it.
        idle: Tensors that are computed with, and whose result the loss does not use. Found by observing a pass, not
            from the graph.
        constant: Tensors whose gradient is zero by design: each path to them goes through a softmax over one element.
        above: For each reached parameter the operations on its shortest path between it and the next layer towards the
            loss, the nearest to the loss first. Read when it is asked for.
        normalised: Parameters whose scale a normalization right behind them removes.
        selected: Parameters of whose results only some are chosen before the next layer, such as the k largest.
        surrogate: True for the loss of a policy gradient, whose value does not tell how well the policy does.
    """

    names: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    columns: tuple[tuple[int, ...], ...] = ()
    missing: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    shortest: Mapping[str, int] = field(default_factory=dict)
    longest: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    loss_ops: Mapping[str, int] = field(default_factory=dict)
    products: int = 0
    recurrent: frozenset[str] = frozenset()
    recurrences: int = 0
    normalizations: int = 0
    post_norms: int = 0
    skips: bool = False
    hidden: tuple[str, ...] = ()
    opaque: bool = False
    dtypes: frozenset[str] = frozenset()
    nodes: int = 0
    problems: tuple[GraphProblem, ...] = ()
    summed: int = 0
    unused: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()
    constant: frozenset[str] = frozenset()
    above: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    normalised: frozenset[str] = frozenset()
    selected: frozenset[str] = frozenset()
    surrogate: bool = False


class Leaf(NamedTuple):
    """Leaf tensor of a graph that is none of the parameters.

    Attributes:
        tensor: The tensor.
        uses: Number of operations that compute with it.
        is_weight: True for an `nn.Parameter`, and for a plain tensor that `multiplies`.
        multiplies: True if an input is multiplied with it, in a matrix product or a convolution.
        feeds: True if a parameter is used further on, between it and the loss.
        is_fed: True if what it is applied to was computed with a parameter.
    """

    tensor: Tensor
    uses: int
    is_weight: bool
    multiplies: bool
    feeds: bool
    is_fed: bool


def summarize_graph(loss: Tensor, parameters: Mapping[str, Tensor]) -> GraphSummary:
    """Summarize a loss's autograd graph in linear time.

    Args:
        loss: The tensor that was, or is about to be, differentiated. Without a ``grad_fn`` the summary is empty.
        parameters: Name to parameter, in the order of ``named_parameters``.
    """
    return read_graph(loss, parameters)[0]


def read_graph(loss: Tensor, parameters: Mapping[str, Tensor]) -> tuple[GraphSummary, list[Leaf]]:
    """Summarize a graph, and list its other leaves.

    The list is empty where leaves are hidden.

    Args:
        loss: As for `summarize_graph`.
        parameters: As for `summarize_graph`.
    """
    names = tuple(parameters)
    if loss.grad_fn is None:
        return GraphSummary(names=names, order=tuple(range(len(names)))), []
    with _garbage_left():
        return _read_graph(loss, names, parameters)


@contextmanager
def _garbage_left() -> Iterator[None]:
    """Collect no garbage for a while.

    Reading a graph makes many containers, without cycles. Each thousand of them would bring a search through all
    objects of the program nearer, which takes longer than the reading.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_graph(
    loss: Tensor, names: tuple[str, ...], parameters: Mapping[str, Tensor]
) -> tuple[GraphSummary, list[Leaf]]:
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
    end = LossGraph(loss.grad_fn)
    constant = graph.constant_leaves()
    order = _order(names, {n: min(graph.sequence[i] for i in nodes) for n, nodes in uses.items() if nodes})
    layers = {n: leaves[n] for n in leaves if parameters[n].ndim >= 2 and n not in tables}
    foreign = not graph.leaves.keys() <= {id(p) for p in parameters.values()}
    summary = GraphSummary(
        names=names,
        order=order,
        columns=() if graph.hides_leaves else find_columns(graph, layers, parameters, order),
        missing=frozenset() if graph.hides_leaves else frozenset(whole - leaves.keys()),
        embeddings=tables,
        shortest={name: graph.shortest[leaf] for name, leaf in leaves.items()},
        longest={name: graph.longest[leaf] for name, leaf in leaves.items()},
        kinds={name: graph.kinds[leaf] for name, leaf in leaves.items()},
        loss_ops=graph.loss_ops(),
        products=products,
        recurrent=recurrent,
        recurrences=recurrences,
        normalizations=graph.node_kinds.count("normalisation"),
        post_norms=graph.count_post_norms(),
        skips=graph.has_skip(),
        hidden=tuple(sorted(graph.hidden)),
        opaque=graph.hides_leaves or any(op.startswith("CompiledFunction") for op in graph.ops),
        dtypes=frozenset(graph.dtypes),
        nodes=len(graph.ops),
        problems=(*find_problems(end, foreign), *find_norms_of_one_element(graph, leaves, layers.keys())),
        summed=summed_rows(end),
        constant=frozenset(name for name, leaf in leaves.items() if leaf in constant),
        above=graph.paths_above(leaves),
        normalised=frozenset(n for n, nodes in uses.items() if nodes and graph.is_normalised(nodes)),
        selected=graph.selected(leaves),
        surrogate=is_policy_gradient(end),
    )
    return summary, [] if summary.opaque else graph.other_leaves(set(leaves.values()))


class PathsAbove(Mapping[str, tuple[str, ...]]):
    """Operations between each leaf and the next layer, as in `GraphSummary.above`.

    A path is listed when it is asked for, since all of them together may be as long as the square of the graph: in a
    residual net, the shortest path to an early layer passes beside all later ones.

    Args:
        first_uses: Node that uses each leaf, by name.
        ops: Operation of each node.
        discoverers: For each node the one before it on its shortest path.
        layers: For each node, True if it is a layer.
    """

    def __init__(
        self,
        first_uses: Mapping[str, int],
        ops: Sequence[str],
        discoverers: Sequence[int],
        layers: Sequence[bool],
    ) -> None:
        self._first_uses, self._ops, self._discoverers, self._layers = first_uses, ops, discoverers, layers

    def __getitem__(self, name: str) -> tuple[str, ...]:
        index, found = self._first_uses[name], list[str]()
        while index:
            index = self._discoverers[index]
            if self._layers[index]:
                break
            found.append(self._ops[index])
        return tuple(reversed(found))

    def __iter__(self) -> Iterator[str]:
        return iter(self._first_uses)

    def __len__(self) -> int:
        return len(self._first_uses)


class Graph:
    """Autograd graph as lists, breadth-first from the loss.

    It keeps no node alive, but the leaf tensors.

    Args:
        root: Node of the loss.

    Attributes:
        ops: Operation of each node, such as "Addmm".
        shapes: Shape of the first result of each node; () if unknown.
        node_kinds: Kind of each operation; see `operations.kind_of`.
        sequence: Sequence number of each node, in the order of the forward pass.
        edges: Children of each node, as pairs of node and output.
        parents: Parents of each node.
        leaves: Id of each leaf tensor to its node.
        constants: Nodes that give no gradient by design: a softmax over one element.
        shortest: Nodes on the shortest path from the loss.
        longest: The same on the longest path.
        topological: The nodes in an order in which each comes after those that use it.
        one_element: Nodes that take a mean, a norm or statistics of a single element.
        products: Most matrix products on a path from the loss, the node included.
        in_loss: True where no path from the loss has a matrix product.
        kinds: Counts of the kinds on the shortest path.
        hides_leaves: True if leaf tensors are not the parameters themselves.
        dtypes: Names of the dtypes to which something is converted.
        hidden: Operations that hide what they compute.
    """

    def __init__(self, root: Any) -> None:
        self.ops: list[str] = []
        self.shapes: list[tuple[int, ...]] = []
        self.one_element: set[int] = set()
        self.topological: list[int] = []
        self.sequence: list[int] = []
        self.edges: list[list[tuple[int, int]]] = []
        self.leaves: dict[int, int] = {}
        self.constants: set[int] = set()
        self._weights: dict[int, int] = {}  # product -> what it multiplies its input with
        self._variables: dict[int, Tensor] = {}
        self.hides_leaves = False
        self.dtypes: set[str] = set()
        self.hidden: set[str] = set()
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

    def paths_above(self, leaves: Mapping[str, int]) -> PathsAbove:
        """Return the operations between each leaf and the next layer towards the loss.

        Args:
            leaves: Node of each leaf by name.
        """
        return PathsAbove(
            {name: self._first_use(leaf) for name, leaf in leaves.items()},
            self.ops,
            self._discoverer,
            [kind in _LAYERS for kind in self.node_kinds],
        )

    def selected(self, leaves: Mapping[str, int]) -> frozenset[str]:
        """Return the leaves of whose results only some are chosen before the next layer.

        Args:
            leaves: Node of each leaf by name.
        """
        if _SELECTIONS.isdisjoint(self.ops):
            return frozenset()
        chosen = [False] * len(self.ops)  # between a node and the next layer
        for index in range(1, len(self.ops)):  # a node comes after its discoverer
            above = self._discoverer[index]
            if self.node_kinds[above] not in _LAYERS:
                chosen[index] = chosen[above] or self.ops[above] in _SELECTIONS
        return frozenset(name for name, leaf in leaves.items() if chosen[self._first_use(leaf)])

    def _first_use(self, leaf: int) -> int:
        """Return the node on the shortest path that uses a leaf, not as a view."""
        index = self._discoverer[leaf]
        while index and self.ops[index] in VIEWS:
            index = self._discoverer[index]
        return index

    def constant_leaves(self) -> set[int]:
        """Return leaves that only a constant leads to.

        If it is all leaves, the constant is the loss, which is no design.
        """
        if not self.constants:
            return set()
        pending, seen = [0], {0}
        while pending:
            for child, _ in self.edges[pending.pop()]:
                if child not in seen and child not in self.constants:
                    seen.add(child)
                    pending.append(child)
        hidden = set(self.leaves.values()) - seen
        return hidden if len(hidden) < len(self.leaves) else set()

    def other_leaves(self, own: set[int]) -> list[Leaf]:
        """Return the leaves that are not one's own, by first use.

        Args:
            own: Nodes of the parameters.
        """
        others = [leaf for leaf in self.leaves.values() if leaf not in own]
        if not others:
            return []
        users = {node for leaf in own for node in self.uses(leaf)}
        order = self.topological
        feeds, is_fed = [False] * len(self.ops), [False] * len(self.ops)
        for index in order:  # from the loss
            for child, _ in self.edges[index]:
                feeds[child] |= feeds[index] or index in users
        for index in reversed(order):
            is_fed[index] = index in own or any(is_fed[child] for child, _ in self.edges[index])
        found = []
        for leaf, uses in sorted(
            ((leaf, self.uses(leaf)) for leaf in others),
            key=lambda pair: min((self.sequence[i] for i in pair[1]), default=0),
        ):
            tensor = self._variables[leaf]
            multiplies = any(self._is_multiplied(leaf, use) for use in uses)
            found.append(
                Leaf(
                    tensor=tensor,
                    uses=len(uses),
                    is_weight=multiplies or isinstance(tensor, nn.Parameter),
                    multiplies=multiplies,
                    feeds=any(feeds[use] for use in uses),
                    is_fed=any(is_fed[use] for use in uses),
                )
            )
        return found

    def _is_multiplied(self, leaf: int, use: int) -> bool:
        """Return True if a product takes a leaf as its weight."""
        node = self._weights.get(use, -1)
        while node >= 0 and self.ops[node] in VIEWS and self.edges[node]:
            node = self.edges[node][0][0]
        return node == leaf

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

    def count_post_norms(self) -> int:
        """Count the normalizations of a sum of two computed values that nothing else uses.

        Where a block normalizes before its branch, the sum is also passed on as it is.
        """
        found = 0
        for index, kind in enumerate(self.node_kinds):
            if kind != "normalisation" or not self.edges[index]:
                continue
            below = self.edges[index][0][0]
            while self.ops[below] in VIEWS and self.edges[below]:
                below = self.edges[below][0][0]
            terms = [child for child, _ in self.edges[below] if self.ops[child] != "AccumulateGrad"]
            found += self.ops[below] == "Add" and len(terms) == 2 and len(set(self.parents[below])) == 1
        return found

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
                self._variables[index] = node.variable
                self.leaves[id(node.variable)] = index
                self.hides_leaves |= bool(getattr(node.variable, "_is_flat_param", False))
            self.hides_leaves |= op.startswith("CheckpointFunction")
            if isinstance(node, BackwardCFunction) or op.startswith("DifferentiableGraph"):
                self.hidden.add(op)
            if op == "ToCopy":
                self.dtypes.update(str(one.dtype).removeprefix("torch.") for one in _metadata(node))
            if op in _SOFTMAXES and _is_over_one_element(op, node):
                self.constants.add(index)
            self.ops.append(op)
            self.shapes.append(_shape(node))
            if averages_one_element(node, op, self.shapes[-1]):
                self.one_element.add(index)
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
            if kind_of(op) == "product":
                child = node.next_functions[1 if "Conv" in op else -1][0]
                self._weights[index] = found.get(child, -1)

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
            self.topological.append(index)
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


def _is_over_one_element(op: str, node: Any) -> bool:
    """Return True if a softmax, or attention, is over one element."""
    try:
        if "Softmax" in op:
            shape = _metadata(node)[0].shape
            return bool(shape[_signed(node._saved_dim)] == 1)
        key, output = node.next_functions[1]
        return key is not None and bool(_metadata(key)[output].shape[-2] == 1)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return False


def _metadata(node: Any) -> Any:
    """Return the shapes of what a node made; empty before torch 2.1."""
    return getattr(node, "_input_metadata", ())


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim


def _shape(node: Any) -> tuple[int, ...]:
    try:
        return tuple(_metadata(node)[0].shape)
    except (
        IndexError,
        RuntimeError,
        TypeError,
    ):  # nothing is made, or it has no shape, such as a nested tensor
        return ()


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


#: Operations that normalize over a dimension, so that a single element there is 1 whatever it was.
_SOFTMAXES = frozenset({
    "Softmax", "SafeSoftmax", "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention",
    "ScaledDotProductEfficientAttention", "ScaledDotProductCudnnAttention",
})  # fmt: skip


def _is_table(operations: list[str]) -> bool:
    looked_up = any(op in LOOKUPS for op in operations)
    return looked_up or (bool(operations) and all(op in MERGES for op in operations))
