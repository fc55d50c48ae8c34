"""Order and paths of tensors, from a model's passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.introspection.autograd_graph import GraphSummary, summarize_graph
from lightning_gradguard.introspection.probes import (
    ForwardUsage,
    SequenceGradientProbe,
    UnshardedParameterProbe,
)
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.parameters import is_compiled
from lightning_gradguard.stats.sharding import largest_over_ranks, world_size

#: Most readings of the autograd graph; a model whose parts come and go keeps its order after that.
MAX_READINGS = 8
#: Steps to wait for a pass that shows the unsharded parameters; a module compiled in place shows none.
MAX_WAIT = 3


class PathMarks(NamedTuple):
    """Paths from the loss, bool [P] each; see `GradStats`."""

    cut: Tensor
    unused: Tensor
    ran: Tensor
    recurrent: Tensor
    normalised: Tensor


class GraphObserver:
    """Follows the passes of a model, alike on all ranks.

    Args:
        named: Pairs of name and parameter.
        usage: Record of the first forward passes so far; None to begin one now.

    Attributes:
        graph_summary: Summary of the newest autograd graph that was read, or None.
        embeddings: Names of look-up tables.
        probed: Names of the recurrent tensors that are probed in the next pass.
        marks: Paths of the tensors since the newest `reset`.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], usage: ForwardUsage | None) -> None:
        self.graph_summary: GraphSummary | None = None
        self.embeddings: frozenset[str] = frozenset()
        self.probed: frozenset[str] = frozenset()
        self.marks: PathMarks
        self._compiled = is_compiled(named)
        self._usage = ForwardUsage(idle=self._compiled) if usage is None else usage
        self._used: frozenset[int] | None = None
        self._unsharded_probe: UnshardedParameterProbe | None = None
        self._unsharded: dict[int, Tensor] = {}
        self._waited = 0
        self._patterns: set[tuple[bool, ...]] = set()
        self._sequence_probe: SequenceGradientProbe | None = None

    def reset(self, layout: Layout) -> None:
        """Begin with tensors of which nothing is known yet."""
        self.embeddings = frozenset()
        self._patterns.clear()
        nowhere = torch.zeros_like(layout.is_layer)
        self.marks = PathMarks(nowhere, nowhere, nowhere, nowhere, nowhere)
        if layout.shards is not None and self._unsharded_probe is None:
            self._unsharded_probe, self._waited = UnshardedParameterProbe(idle=self._compiled), 0

    def update_order(self, layout: Layout, pattern: tuple[bool, ...], graph: Tensor | None) -> Layout:
        """Return the layout in the order of a graph.

        The graph is read if tensors have gradients that had none before.

        In a distributed program every rank has to call it, all with a graph or all without one.

        Args:
            layout: The order known so far.
            pattern: P times, True if the tensor has a gradient.
            graph: Tensor whose autograd graph shows the order, or None.
        """
        self._used = self._usage.close() if self._used is None else self._used
        known = pattern in self._patterns or len(self._patterns) >= MAX_READINGS
        if known or graph is None or graph.grad_fn is None or not self._knows_leaves():
            return layout
        self._patterns.add(pattern)
        pairs = list(zip(layout.names, layout.parameters, strict=True))
        summary = summarize_graph(graph, {name: self._unsharded.get(id(p), p) for name, p in pairs})
        self.graph_summary, ran = _agree(summary, [id(p) in self._used for _, p in pairs], layout)
        self.embeddings = self.graph_summary.embeddings
        self.marks = _marks(self.graph_summary, ran, layout)
        return Layout.of(dict(pairs), order=self.graph_summary.order, embeddings=self.embeddings)

    def probe_sequence(self, layout: Layout, recurrent: frozenset[str] | None = None) -> None:
        """Probe gradients over time in the next pass.

        Args:
            layout: The watched tensors.
            recurrent: Names of the recurrent tensors; those of the newest graph when None.
        """
        if recurrent is None:
            recurrent = self.graph_summary.recurrent if self.graph_summary is not None else frozenset()
        if recurrent and self._sequence_probe is None:
            self.probed = recurrent
            own = [p for n, p in zip(layout.names, layout.parameters, strict=True) if n in recurrent]
            ids = frozenset(id(q) for p in own for q in (p, self._unsharded.get(id(p), p)))
            self._sequence_probe = SequenceGradientProbe(ids)

    def take_time_tilt(self) -> tuple[bool, Tensor | None]:
        """Return True if a pass was probed, and its time tilt.

        The tilt is float32 [], in decades, or None if the pass showed none.
        """
        probe, self._sequence_probe, self.probed = self._sequence_probe, None, frozenset()
        return probe is not None, None if probe is None else probe.close()

    def close(self) -> None:
        """Remove all hooks from the model."""
        self._usage.close()
        self.take_time_tilt()
        if self._unsharded_probe is not None:
            self._unsharded_probe.close()

    def _knows_leaves(self) -> bool:
        """Return True if the leaves of the graph are known.

        Those of sharded parameters are known after a pass that was probed.
        """
        self._waited += self._unsharded_probe is not None
        if self._unsharded_probe is not None and (self._unsharded_probe.seen or self._waited == MAX_WAIT):
            self._unsharded, self._unsharded_probe = self._unsharded_probe.close(), None
            self._used = (self._used or frozenset()) | self._unsharded.keys()
        return self._unsharded_probe is None


def _agree(summary: GraphSummary, ran: list[bool], layout: Layout) -> tuple[GraphSummary, list[bool]]:
    """Return what holds on all ranks.

    Their graphs may differ: the order is the first rank's, everything else the union.
    """
    if world_size() == 1:
        return summary, ran
    names = layout.names
    groups = (frozenset(names) - summary.missing, summary.embeddings, summary.recurrent, summary.normalised)
    order = summary.order if torch.distributed.get_rank() == 0 else [0] * len(names)
    table = [order, ran, *([name in group for name in names] for group in groups)]
    device = layout.numel.device if layout.shards is None else layout.shards.device
    order, seen, *flags = largest_over_ranks(table, device)
    found, embeddings, recurrent, normalised = (frozenset(compress(names, row)) for row in flags)
    missing = frozenset(names) - found
    agreed = replace(
        summary,
        order=tuple(order),
        missing=missing,
        embeddings=embeddings,
        recurrent=recurrent,
        normalised=normalised,
    )
    return agreed, [bool(flag) for flag in seen]


def _marks(summary: GraphSummary, ran: list[bool], layout: Layout) -> PathMarks:
    """Mark trainable tensors without a path from the loss."""
    pairs = list(zip(layout.names, layout.parameters, strict=True))
    lost = [name in summary.missing and p.requires_grad and any(ran) for name, p in pairs]

    def mark(flags: Sequence[bool]) -> Tensor:
        return torch.tensor(flags, device=layout.numel.device)

    return PathMarks(
        cut=mark([a and b for a, b in zip(lost, ran, strict=True)]),
        unused=mark([a and not b for a, b in zip(lost, ran, strict=True)]),
        ran=mark([a and p.requires_grad for a, (_, p) in zip(ran, pairs, strict=True)]),
        recurrent=mark([name in summary.recurrent for name, _ in pairs]),
        normalised=mark([name in summary.normalised for name, _ in pairs]),
    )
