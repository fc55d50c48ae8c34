"""Order and paths of tensors, from a model's passes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.introspection.autograd_graph import GraphSummary, read_graph
from lightning_gradguard.introspection.columns import MAX_COLUMNS
from lightning_gradguard.introspection.graph_problems import OWNERSHIP, GraphProblem
from lightning_gradguard.introspection.ownership import UnownedWeights, find_ownership_problems
from lightning_gradguard.introspection.probes import (
    ForwardUsage,
    InputProbe,
    SequenceGradientProbe,
    UnshardedParameterProbe,
)
from lightning_gradguard.introspection.result_usage import ResultUsage
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.parameters import is_compiled
from lightning_gradguard.stats.sharding import largest_over_ranks, mean_over_ranks, world_size

#: Most readings of the autograd graph; a model whose parts come and go keeps its order after that.
MAX_READINGS = 8
#: Steps to wait for a pass that shows the unsharded parameters, or what is done with results; a module compiled in
#: place shows none.
MAX_WAIT = 3


class PathMarks(NamedTuple):
    """Paths from the loss, bool [P] each; see `GradStats`."""

    cut: Tensor
    unused: Tensor
    ran: Tensor
    recurrent: Tensor
    idle: Tensor
    constant: Tensor
    hollow: Tensor
    normalised: Tensor
    selected: Tensor


class GraphObserver:
    """Follows the passes of a model, alike on all ranks.

    Args:
        named: Pairs of name and parameter.
        usage: Record of the first forward passes so far; None to begin one now.

    Attributes:
        graph_summary: Summary of the newest autograd graph that was read, or None.
        embeddings: Names of look-up tables.
        columns: Paths of layers from an input to the loss, as indices of tensors; see `Layout`.
        probed: Names of the recurrent tensors that are probed in the next pass.
        marks: Paths of the tensors since the newest `reset`.
        reached: Names of the tensors that have had a gradient since then.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], usage: ForwardUsage | None) -> None:
        self.graph_summary: GraphSummary | None = None
        self.embeddings: frozenset[str] = frozenset()
        self.columns: tuple[tuple[int, ...], ...] = ()
        self.probed: frozenset[str] = frozenset()
        self.marks: PathMarks
        self._named = named
        self._compiled = is_compiled(named) or (usage is not None and not usage.observes)
        self._usage = ForwardUsage(idle=self._compiled) if usage is None else usage
        self._used: frozenset[int] | None = None
        self._unsharded_probe: UnshardedParameterProbe | None = None
        self._unsharded: dict[int, Tensor] = {}
        self._waited = 0
        self._patterns: set[tuple[bool, ...]] = set()
        self._sequence_probe: SequenceGradientProbe | None = None
        self._result_usage: ResultUsage | None = None
        self._result_wait = 0
        self._input_probe: InputProbe | None = None
        self._input_probed: set[str] = set()
        self._ran: list[bool] = []
        self._unowned: UnownedWeights | None = None
        self._followed: frozenset[str] = frozenset()
        self._idle: frozenset[str] = frozenset()

    def reset(self, layout: Layout) -> None:
        """Begin with tensors of which nothing is known yet."""
        if self.graph_summary is not None:  # what it says of the optimizer's tensors is of the former ones
            self.graph_summary = replace(self.graph_summary, problems=())
        self.embeddings, self.columns = frozenset(), ()
        self.reached: frozenset[str] = frozenset()
        self._pattern: tuple[bool, ...] = ()
        self._patterns.clear()
        if self._result_usage is not None:
            self._result_usage.close()
        if self._input_probe is not None:
            self._input_probe.close()
        self._input_probe, self._input_probed = None, set()
        self._unowned = None
        self._result_usage, self._followed = None, frozenset()
        self._idle = frozenset()
        self.marks = PathMarks(*[layout.nowhere] * len(PathMarks._fields))
        if layout.shards is not None and self._unsharded_probe is None:
            self._unsharded_probe, self._waited = UnshardedParameterProbe(idle=self._compiled), 0

    def update_order(
        self,
        layout: Layout,
        pattern: tuple[bool, ...],
        graph: Tensor | None,
        *,
        owned: bool = False,
    ) -> Layout:
        """Return the layout in the order of a graph.

        The graph is read if tensors have gradients that had none before.

        In a distributed program every rank has to call it, all with a graph or all without one.

        Args:
            layout: The order known so far.
            pattern: P times, True if the tensor has a gradient.
            graph: Tensor whose autograd graph shows the order, or None.
            owned: True if the tensors are those of an optimizer, so that others may be missing from it.
        """
        self._used = self._usage.close() if self._used is None else self._used
        if self._result_usage is not None:
            self._take_result_usage(layout)
        if self._input_probe is not None:
            self._take_inputs(layout)
        if self._unowned is not None:
            self._look_for_remade(self._unowned)
        if pattern != self._pattern:
            self._pattern = pattern
            self.reached |= frozenset(compress(layout.names, pattern))
        known = pattern in self._patterns or len(self._patterns) >= MAX_READINGS
        if known or graph is None or graph.grad_fn is None or not self._knows_leaves():
            return layout
        self._patterns.add(pattern)
        pairs = list(zip(layout.names, layout.parameters, strict=True))
        parameters = {name: self._unsharded.get(id(p), p) for name, p in pairs}
        try:
            summary, others = read_graph(graph, parameters)
        except Exception:  # an odd graph must not end a training: it counts as not seen
            summary = GraphSummary(names=layout.names, order=tuple(range(len(layout.names))), opaque=True)
            others = []
        if owned and layout.shards is None:
            reached = frozenset(summary.shortest)
            # Gradients without a path were put there by hand, such as those of a copy: the loop knows what it does.
            by_hand = not reached.issuperset(compress(layout.names, pattern))
            cut = {n: p for n, p in parameters.items() if n in summary.missing and id(p) in self._used}
            problems: tuple[GraphProblem, ...] = ()
            self._unowned = None
            with suppress(
                Exception
            ):  # the objects of other programs are looked through, which may do anything
                problems = find_ownership_problems(parameters, reached, others, self._named)
                self._unowned = None if by_hand else UnownedWeights.of(problems, others, cut)
            if self._unowned is not None:  # the next step tells which mistake it is
                problems = tuple(p for p in problems if p is not self._unowned.problem or not p.certain)
            summary = replace(summary, problems=(*summary.problems, *problems))
        if self._usage.is_loss_masked:
            summary = replace(summary, surrogate=False)
        summary = replace(
            summary, problems=(*summary.problems, *self._problems_of_input(parameters, summary))
        )
        summary, self._ran = _agree(summary, [id(p) in self._used for _, p in pairs], layout)
        unused = (
            frozenset(n for n, took_part in zip(layout.names, self._ran, strict=True) if not took_part)
            & summary.missing
        )
        self.graph_summary = replace(summary, idle=self._idle, unused=unused)
        self._follow_results(layout)
        self.embeddings = self.graph_summary.embeddings
        self.columns = _with_earlier(self.graph_summary.columns, self.columns)
        self.marks = _marks(self.graph_summary, self._ran, layout, self.marks.hollow)
        return layout.in_order(self.graph_summary.order, self.embeddings, self.columns)

    def _problems_of_input(
        self, parameters: Mapping[str, Tensor], summary: GraphSummary
    ) -> list[GraphProblem]:
        """Return the mistake that the first layer's input shows, if these tensors are that layer's.

        A normalization behind the layer makes up for the size of its input.
        """
        fed, tiny = self._usage.first_input[1], self._usage.tiny_input
        names = tuple(name for name, p in parameters.items() if id(p) in fed)
        if tiny is None or len(names) == 0 or len(summary.normalised.intersection(names)) > 0:
            return []
        return [tiny._replace(names=names)]

    def probe_inputs(self, layout: Layout, names: Iterable[str]) -> None:
        """Look in the next pass if these layers' input is exactly zero, once for each layer.

        In a distributed program every rank has to call it.

        Args:
            layout: The watched tensors.
            names: Names of weights whose gradient is exactly zero.
        """
        fresh = frozenset(names) - self._input_probed
        if fresh and self._input_probe is None and not self._compiled:
            self._input_probed |= fresh
            own = {n: p for n, p in zip(layout.names, layout.parameters, strict=True) if n in fresh}
            whole = {n: self._unsharded[id(p)] for n, p in own.items() if id(p) in self._unsharded}
            device = layout.numel.device if layout.shards is None else layout.shards.device
            self._input_probe = InputProbe(own, device, whole)

    def begin_pass(self) -> None:
        """Follow results in a pass that begins now, if they are in question."""
        if self._result_usage is not None:
            self._result_usage.begin()

    def end_pass(self, loss: Tensor) -> None:
        """Stop following results, at a loss."""
        if self._result_usage is not None:
            self._result_usage.end(loss)

    def leave_pass(self) -> None:
        """Undo `begin_pass`."""
        if self._result_usage is not None:
            self._result_usage.leave()

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
        if self._result_usage is not None:
            self._result_usage.close()
            self._result_usage = None
        if self._unsharded_probe is not None:
            self._unsharded_probe.close()

    def _follow_results(self, layout: Layout) -> None:
        """Observe the next pass if tensors took part in this one and have no path from the loss.

        The loss may have been computed with their results, and then the graph is cut, or without them.
        """
        summary = self.graph_summary
        if summary is None or self._compiled or summary.opaque or layout.shards is not None:
            return
        rows = list(zip(layout.names, layout.parameters, self._ran, strict=True))
        missing = summary.missing - self._followed
        doubtful = {n: p for n, p, took_part in rows if took_part and n in missing and p.requires_grad}
        if doubtful and self._result_usage is None:
            self._followed |= doubtful.keys()
            # Also those of other optimizers.
            cut = {id(p) for n, p, _ in rows if n in summary.missing}
            trained = [p for _, p in self._named if p.requires_grad and id(p) not in cut]
            self._result_usage, self._result_wait = ResultUsage(doubtful, trained), 0

    def _take_result_usage(self, layout: Layout) -> None:
        """Mark tensors whose result was not used, once a pass has shown it."""
        usage, summary = self._result_usage, self.graph_summary
        assert usage is not None
        assert summary is not None
        self._result_wait += 1
        # Several ranks must not wait for different passes, so they take the first.
        has_observed = usage.has_observed
        if not has_observed and self._result_wait < MAX_WAIT and world_size() == 1:
            return
        idle = usage.close()
        self._result_usage = None
        used = frozenset(layout.names) - idle if has_observed else frozenset(layout.names)
        if world_size() > 1:
            (row,) = largest_over_ranks([[int(name in used) for name in layout.names]], layout.numel.device)
            used = frozenset(compress(layout.names, row))
        self._idle |= self._followed - used
        self.graph_summary = replace(summary, idle=self._idle)
        self.marks = _marks(self.graph_summary, self._ran, layout, self.marks.hollow)

    def _look_for_remade(self, unowned: UnownedWeights) -> None:
        """Say at the second step which mistake weights in no optimizer are: gone ones were made in the pass."""
        self._unowned = None
        summary = self.graph_summary
        try:
            problem = unowned.as_remade()
        except Exception:  # the objects of other programs are looked through, which may do anything
            problem = None
        if problem is None and unowned.problem.certain:
            problem = unowned.problem
        if summary is not None and problem is not None:
            others = [p for p in summary.problems if p.kind not in OWNERSHIP or p.certain]
            self.graph_summary = replace(summary, problems=(*others, problem))

    def _take_inputs(self, layout: Layout) -> None:
        """Mark layers whose input was exactly zero, without a read on the host."""
        assert self._input_probe is not None
        fed, self._input_probe = self._input_probe.close(), None
        # A layer that was not called counts as fed.
        device = layout.numel.device if layout.shards is None else layout.shards.device
        rows = [(fed[n].float() if n in fed else layout.constant(1.0)).to(device) for n in layout.names]
        live = mean_over_ranks(torch.stack(rows)).to(layout.numel.device)
        self.marks = self.marks._replace(hollow=self.marks.hollow | (live == 0))

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

    Their graphs may differ: order and columns are the first rank's, everything else the union. Of mistakes in what the
    optimizer steps, those count that all ranks see.
    """
    if world_size() == 1:
        return summary, ran
    names = layout.names
    live = frozenset(names) - summary.constant
    groups = (
        frozenset(names) - summary.missing,
        summary.embeddings,
        summary.recurrent,
        live,
        summary.normalised,
        summary.selected,
        frozenset(names) if summary.surrogate else frozenset(),
    )
    is_first = torch.distributed.get_rank() == 0
    order = summary.order if is_first else [0] * len(names)
    # Place of each tensor in each column, from 1; 0 where it is in none.
    places = [[0] * len(names) for _ in range(MAX_COLUMNS)]
    for row, column in zip(places, summary.columns if is_first else (), strict=False):
        for place, tensor in enumerate(column, 1):
            row[tensor] = place
    kinds = [(kind, certain) for kind in OWNERSHIP for certain in (True, False)]
    unseen = [all((p.kind, p.certain) != kind for p in summary.problems) for kind in kinds]
    table = [order, ran, *([name in group for name in names] for group in groups), *places, unseen]
    width = max(len(names), len(kinds))
    padded = [[*map(int, row), *[0] * (width - len(row))] for row in table]
    device = layout.numel.device if layout.shards is None else layout.shards.device
    *rows, somewhere = largest_over_ranks(padded, device)
    common = {kind for kind, flag in zip(kinds, somewhere, strict=False) if not flag}
    order, seen, *flags = (row[: len(names)] for row in rows)
    found, embeddings, recurrent, live, normalised, selected, surrogate = (
        frozenset(compress(names, row)) for row in flags[: len(groups)]
    )
    columns = [
        sorted((place, i) for i, place in enumerate(row) if place) for row in flags[len(groups) :] if any(row)
    ]
    missing, constant = frozenset(names) - found, frozenset(names) - live
    agreed = replace(
        summary,
        order=tuple(order),
        columns=tuple(tuple(i for _, i in column) for column in columns),
        missing=missing,
        embeddings=embeddings,
        recurrent=recurrent,
        constant=constant,
        normalised=normalised,
        selected=selected,
        surrogate=bool(surrogate),
        problems=tuple(
            p for p in summary.problems if p.kind not in OWNERSHIP or (p.kind, p.certain) in common
        ),
    )
    return agreed, [bool(flag) for flag in seen]


def _with_earlier(
    newest: tuple[tuple[int, ...], ...], earlier: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], ...]:
    """Return the newest columns, and earlier ones of layers that have a rest, such as an expert without a token."""
    kept, known = list(newest), set().union(*newest)
    for column in earlier if newest else ():
        if not known.issuperset(column) and len(kept) < MAX_COLUMNS:
            known.update(column)
            kept.append(column)
    return tuple(kept)


def _marks(summary: GraphSummary, ran: list[bool], layout: Layout, hollow: Tensor) -> PathMarks:
    """Mark trainable tensors without a path from the loss."""
    names, trained = layout.names, [p.requires_grad for p in layout.parameters]
    ran_any = any(ran)
    lost = [ran_any and t and name in summary.missing for name, t in zip(names, trained, strict=True)]
    rows = {
        "cut": [a and b for a, b in zip(lost, ran, strict=True)],
        "unused": [a and not b for a, b in zip(lost, ran, strict=True)],
        "ran": [a and b for a, b in zip(ran, trained, strict=True)],
        "idle": [a and name in summary.idle for a, name in zip(lost, names, strict=True)],
        **{
            field: list(map(getattr(summary, field).__contains__, names))
            for field in ("recurrent", "constant", "normalised", "selected")
        },
    }
    # One tensor, since each is copied to the device.
    flags = torch.tensor(list(rows.values()), device=layout.numel.device)
    # Where nothing is marked, detectors see it without a look at the numbers.
    marks = {
        field: flag if any(row) else layout.nowhere
        for (field, row), flag in zip(rows.items(), flags.unbind(), strict=True)
    }
    return PathMarks(hollow=hollow, **marks)
