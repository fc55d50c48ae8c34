"""What the model's passes show of the watched tensors: their order, which have a path from the loss, which recur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.introspection.autograd_graph import GraphSummary, summarize_graph
from lightning_gradguard.introspection.forward_probes import ForwardUsage, UnshardedParameterProbe
from lightning_gradguard.introspection.sequence_probe import SequenceGradientProbe
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.parameters import is_compiled
from lightning_gradguard.stats.sharding import largest_over_ranks, world_size

#: Most walks over the autograd graph; a model whose parts come and go keeps its order after that.
MAX_WALKS = 8
#: Steps for which a pass is waited for that shows the whole parameters; a module compiled in place shows none.
MAX_WAIT = 3


class Marks(NamedTuple):
    """What is known of each tensor's path from the loss, bool [P] each; see `GradStats`."""

    cut: Tensor
    unused: Tensor
    ran: Tensor
    recurrent: Tensor


class GraphObserver:
    """Follows the passes of a model; where there are several ranks, all of them know the same.

    Args:
        named: Pairs of name and parameter.
        usage: What has been seen of the first forward passes; looked at from now on when None.

    Attributes:
        graph_summary: What the newest walk over an autograd graph showed, or None.
        embeddings: Names of look-up tables.
        asked: Names of what is looked at in the next pass.
        marks: What is known of the tensors of the newest `start`.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], usage: ForwardUsage | None) -> None:
        self.graph_summary: GraphSummary | None = None
        self.embeddings: frozenset[str] = frozenset()
        self.marks: Marks
        self._compiled = is_compiled(named)
        self._usage = ForwardUsage(idle=self._compiled) if usage is None else usage
        self._used: frozenset[int] | None = None
        self._unseen: UnshardedParameterProbe | None = None
        self._waited = 0
        self._whole: dict[int, Tensor] = {}
        self._patterns: set[tuple[bool, ...]] = set()
        self._time_spy: SequenceGradientProbe | None = None
        self.asked: frozenset[str] = frozenset()

    def start(self, layout: Layout) -> None:
        """Begins with tensors of which nothing is known yet."""
        self.embeddings = frozenset()
        self._patterns.clear()
        nothing = torch.zeros_like(layout.is_layer)
        self.marks = Marks(nothing, nothing, nothing, nothing)
        if layout.shards is not None and self._unseen is None:
            self._unseen, self._waited = UnshardedParameterProbe(idle=self._compiled), 0

    def arrange(self, layout: Layout, pattern: tuple[bool, ...], graph: Tensor | None) -> Layout:
        """The layout in the order that an autograd graph shows, when tensors have gradients that had none before.

        In a distributed program every rank has to call it, with a graph or all without one.

        Args:
            layout: The order that is known.
            pattern: Which tensors have a gradient.
            graph: Tensor whose autograd graph shows the order, or None.
        """
        self._used = self._usage.close() if self._used is None else self._used
        known = pattern in self._patterns or len(self._patterns) >= MAX_WALKS
        if known or graph is None or graph.grad_fn is None or not self._knows_whole_parameters():
            return layout
        self._patterns.add(pattern)
        pairs = list(zip(layout.names, layout.parameters, strict=True))
        graph_summary = summarize_graph(graph, {name: self._whole.get(id(p), p) for name, p in pairs})
        self.graph_summary, ran = _agree(graph_summary, [id(p) in self._used for _, p in pairs], layout)
        self.embeddings = self.graph_summary.embeddings
        self.marks = _marks(self.graph_summary, ran, layout)
        return Layout.of(dict(pairs), order=self.graph_summary.order, embeddings=self.embeddings)

    def ask_for_time(self, layout: Layout, recurrent: frozenset[str] | None = None) -> None:
        """Looks at the next pass of a recurrent model: how gradients fall over the steps of a sequence.

        Args:
            layout: The watched tensors.
            recurrent: Names of those that are applied again and again; what the newest walk showed when None.
        """
        if recurrent is None:
            recurrent = self.graph_summary.recurrent if self.graph_summary is not None else frozenset()
        if recurrent and self._time_spy is None:
            self.asked = recurrent
            own = [p for n, p in zip(layout.names, layout.parameters, strict=True) if n in recurrent]
            self._time_spy = SequenceGradientProbe(
                frozenset(id(q) for p in own for q in (p, self._whole.get(id(p), p)))
            )

    def take_time_tilt(self) -> tuple[bool, Tensor | None]:
        """Whether the pass was looked at, and what was seen of it."""
        spy, self._time_spy, self.asked = self._time_spy, None, frozenset()
        return spy is not None, None if spy is None else spy.close()

    def close(self) -> None:
        """Takes away the hooks that are still there."""
        self._usage.close()
        self.take_time_tilt()
        if self._unseen is not None:
            self._unseen.close()

    def _knows_whole_parameters(self) -> bool:
        """Whether the leaves of the graph are known; of sharded parameters after a pass that was looked at."""
        self._waited += self._unseen is not None
        if self._unseen is not None and (self._unseen.seen or self._waited == MAX_WAIT):
            self._whole, self._unseen = self._unseen.close(), None
            self._used = (self._used or frozenset()) | self._whole.keys()
        return self._unseen is None


def _agree(graph_summary: GraphSummary, ran: list[bool], layout: Layout) -> tuple[GraphSummary, list[bool]]:
    """What holds on all ranks, whose graphs may differ: the order of the first, and what any of them saw."""
    if world_size() == 1:
        return graph_summary, ran
    names = layout.names
    groups = (frozenset(names) - graph_summary.missing, graph_summary.embeddings, graph_summary.recurrent)
    order = graph_summary.order if torch.distributed.get_rank() == 0 else [0] * len(names)
    table = [order, ran, *([name in group for name in names] for group in groups)]
    device = layout.numel.device if layout.shards is None else layout.shards.device
    order, seen, *flags = largest_over_ranks(table, device)
    found, embeddings, recurrent = (frozenset(compress(names, row)) for row in flags)
    missing = frozenset(names) - found
    agreed = replace(
        graph_summary, order=tuple(order), missing=missing, embeddings=embeddings, recurrent=recurrent
    )
    return agreed, [bool(flag) for flag in seen]


def _marks(graph_summary: GraphSummary, ran: list[bool], layout: Layout) -> Marks:
    """Marks trainable tensors without a path from the loss: those that took part in the pass, and the others."""
    pairs = list(zip(layout.names, layout.parameters, strict=True))
    lost = [name in graph_summary.missing and p.requires_grad and any(ran) for name, p in pairs]

    def mark(flags: Sequence[bool]) -> Tensor:
        return torch.tensor(flags, device=layout.numel.device)

    return Marks(
        cut=mark([a and b for a, b in zip(lost, ran, strict=True)]),
        unused=mark([a and not b for a, b in zip(lost, ran, strict=True)]),
        ran=mark([a and p.requires_grad for a, (_, p) in zip(ran, pairs, strict=True)]),
        recurrent=mark([name in graph_summary.recurrent for name, _ in pairs]),
    )
