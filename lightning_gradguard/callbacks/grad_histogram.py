"""The tensors whose gradients are shown: an optimizer's parameters by name, and their order from input to output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.callbacks.base import Callback
from lightning_gradguard.callbacks.name_patterns import Patterns
from lightning_gradguard.callbacks.trainer_adapter import (
    Losses,
    logging_step,
    optimizer_index,
    refuse_hidden_gradients,
    scaler_of,
    takes_no_step,
    unscale,
    warn,
)
from lightning_gradguard.engine.readback import read
from lightning_gradguard.introspection.autograd_graph import summarize_graph
from lightning_gradguard.loggers import open_sinks
from lightning_gradguard.loggers.base import FailSafe, LogSink
from lightning_gradguard.loggers.exponents import THRESHOLDS, exponents_record
from lightning_gradguard.loggers.histograms import WorstTensors, histogram_record
from lightning_gradguard.loggers.tags import tag_group, tag_names
from lightning_gradguard.stats.histogram import AXES, EDGES, Axis, count
from lightning_gradguard.stats.parameters import are_same, members, select
from lightning_gradguard.stats.sharding import Shards, align_gradients, is_sharded, local

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Most walks over the autograd graph; a model whose parts come and go keeps its order after that.
MAX_WALKS = 8


class TrackedTensors:
    """An optimizer's parameters, whose groups are read again at every look. Nothing of them is measured.

    Args:
        module: Tells the names.
        optimizer: Has the parameters, at least one.

    Attributes:
        optimizer: As given.
        parameters: Name to parameter, in the order of ``named_parameters``, the same on every rank.
        names: The names from input to output, as far as a graph has told.
    """

    def __init__(self, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._module = module
        self.optimizer = optimizer
        self._start()

    def follow_groups(self) -> None:
        """Reads the optimizer's parameter groups again."""
        if not are_same(members(self.optimizer), self._members):
            self._start()

    def arrange(self, graph: Tensor | None) -> None:
        """Takes the order from the graph of a loss, when tensors have gradients that had none before."""
        pattern = tuple(p.grad is not None for p in self.parameters.values())
        known = pattern in self._patterns or len(self._patterns) >= MAX_WALKS
        if known or graph is None or graph.grad_fn is None:
            return
        self._patterns.add(pattern)
        graph_summary = summarize_graph(graph, self.parameters)
        self.names = tuple(graph_summary.names[i] for i in graph_summary.order)

    def unscale(self, scaler: torch.amp.GradScaler | None) -> None:
        """Unscales gradients that are still scaled, as they are before a fused optimizer's step."""
        if scaler is not None:
            unscale(self.optimizer, scaler)

    def _start(self) -> None:
        self._members = members(self.optimizer)
        self.parameters = select(list(self._module.named_parameters()), self.optimizer)
        self.names = tuple(self.parameters)
        self._patterns: set[tuple[bool, ...]] = set()


_BINS = len(EDGES) - 1


class GradHistogram(Callback):
    """Writes gradient histograms to TensorBoard, as ``gradguard_hist_log10/NNN_name``.

    They show log10 of the magnitude on an axis from -12 to 3 that never changes: a drift to the left is vanishing, to
    the right exploding, and a wall at the left edge is exact zeros. Put before a `GradGuard` that clips, it shows
    gradients before clipping; put after it, after clipping.

    With ``axis="value"`` they show the values of ``p.grad``, as ``gradguard_hist_value/NNN_name``: 30 equal bins
    around zero, as wide as the largest magnitude, but no wider than 4 root mean squares to each side, beyond which
    the outer bins count all.

    With ``exponents=True`` it also tells how much of the gradient would lose digits, or be lost, in fp16, bf16 and two
    formats of fp8: shares of all elements as scalars, and a table by tensor in the text tab, ``gradguard_exponents/``.

    By default 4,096 elements of each tensor are read: no cumulative share of a histogram is then off by more than
    2.1 % in 95 of 100 (see `lightning_gradguard.stats.histogram.count`). Of a sharded tensor each rank reads as
    many of its part.

    Example:
        >>> from lightning_gradguard import GradHistogram
        >>> histogram = GradHistogram(every_n_steps=50, exclude=["*.bias"])

    Args:
        every_n_steps: Optimizer steps between two histograms.
        include: Patterns of parameter names to show, such as "encoder.*"; all when None.
        exclude: Patterns of parameter names to leave out.
        max_tensors: Most tensors shown at a time; the worst, where there are more. All that match are counted.
        max_samples: Most elements read of each tensor, evenly strided; None counts all of them, which is exact.
        axis: "log10" for magnitudes, "value" for values.
        exponents: Also tell what narrow number formats would lose.

    Raises:
        ValueError: If a number is not a positive whole number, or ``axis`` is neither of the two.
        TypeError: If patterns are not a sequence of strings, or ``exponents`` is not a bool.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 100,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        max_tensors: int = 24,
        max_samples: int | None = 4096,
        axis: Axis = "log10",
        exponents: bool = False,
    ) -> None:
        for name, number in (
            ("every_n_steps", every_n_steps),
            ("max_tensors", max_tensors),
            ("max_samples", max_samples),
        ):
            if name == "max_samples" and number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more, got {number!r}")
        if axis not in AXES:
            raise ValueError(f"axis must be {' or '.join(map(repr, AXES))}, got {axis!r}")
        if not isinstance(exponents, bool):
            raise TypeError(f"exponents must be True or False, got {exponents!r}")
        self.every_n_steps, self.max_tensors, self.max_samples = every_n_steps, max_tensors, max_samples
        self.include, self.exclude = include, exclude
        self.axis, self.exponents = axis, exponents
        self._patterns = Patterns(include, exclude)
        self._tensors: dict[int, TrackedTensors] = {}
        self._worst: dict[int, WorstTensors] = {}
        self._losses = Losses()
        self._sinks: list[LogSink] = []
        self._fuse = FailSafe("GradHistogram")

    def __getstate__(self) -> dict[str, Any]:
        """A copy writes nowhere: an open file has one writer."""
        return {**self.__dict__, "_sinks": [], "_losses": Losses(), "_tensors": {}, "_worst": {}}

    @cached_property
    def state_key(self) -> str:
        """Equal for equal configuration; asked for at each hook."""
        names = ("every_n_steps", "include", "exclude", "max_tensors", "max_samples", "axis", "exponents")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies that hide gradients."""
        if stage == "fit":
            refuse_hidden_gradients(trainer, "GradHistogram", "show")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the sinks, and says what cannot be shown."""
        self._tensors, self._worst = {}, {}
        self._fuse = FailSafe("GradHistogram")
        self._sinks = open_sinks(trainer.loggers) if trainer.is_global_zero else []
        if not trainer.loggers:
            warn(trainer, "GradHistogram has no logger to write to; give the Trainer a TensorBoardLogger")
        named = list(pl_module.named_parameters())
        for complaint in self._patterns.complaints(list(select(named, None))) if named else ():
            warn(trainer, f"GradHistogram: {complaint}")
        if self.axis == "value" and any(is_sharded(p) for _, p in named):
            warn(trainer, 'GradHistogram(axis="value") leaves out sharded gradients; axis="log10" shows them')

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forgets the last batch's loss."""
        self._losses.graph = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keeps the loss, whose graph tells the order of the layers."""
        self._losses.graph = loss

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Counts and writes, every so many steps."""
        graph, self._losses.graph = self._losses.graph, None
        step = trainer.global_step // max(1, len(trainer.optimizers))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if step % self.every_n_steps or not parameters or takes_no_step(pl_module, scaler_of(trainer), graph):
            return
        # Where gradients are sharded, no rank may stay away, not even rank 0 when its loggers have failed.
        if self._sinks or (trainer.loggers and any(map(is_sharded, parameters))):
            self._fuse.run(lambda: self._show(trainer, pl_module, optimizer, graph))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Flushes."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Flushes: after an exception Lightning calls no other hook."""
        self._close()

    def _show(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: torch.optim.Optimizer,
        graph: Tensor | None,
    ) -> None:
        index = optimizer_index(trainer, optimizer)
        if index not in self._tensors:
            self._tensors[index] = TrackedTensors(module, optimizer)
            self._worst[index] = WorstTensors(self.max_tensors)
        tensors = self._tensors[index]
        tensors.follow_groups()
        tensors.arrange(graph)
        tensors.unscale(scaler_of(trainer))
        counted = self._count(tensors.parameters)
        if not self._sinks:
            return
        names = [name for name in tensors.names if name in counted]
        shown = self._worst[index].choose({name: counted[name].rms for name in names})
        if not shown:
            return
        titles = dict(zip(tensors.names, tag_names(tensors.names), strict=True))
        group = tag_group(index)
        limits = {name: counted[name].limit for name in shown} if self.axis == "value" else None
        place = logging_step(trainer)
        panels = [
            histogram_record({name: counted[name].bins for name in shown}, titles, limits=limits, group=group)
        ]
        if self.exponents:
            below = {name: counted[name].below for name in names}
            panels.append(exponents_record(below, titles, shown, step=place, group=group))
        for sink in self._sinks:
            for panel in panels:
                sink.write(place, panel)

    def _count(self, parameters: dict[str, Tensor]) -> dict[str, _Counted]:
        """What was counted of each gradient that there is; every rank reads its part where they are sharded."""
        wanted = {name: p for name, p in parameters.items() if self._patterns.match(name)}
        if self.axis == "value":
            wanted = {name: p for name, p in wanted.items() if not is_sharded(p)}
        if not wanted:
            return {}
        tensors = list(wanted.values())
        shards = Shards.of(tensors)
        if shards is not None:
            align_gradients(tensors)
        counts = count(
            [None if p.grad is None else local(p.grad) for p in tensors],
            max_samples=self.max_samples,
            axis=self.axis,
            thresholds=THRESHOLDS if self.exponents else (),
        )
        table = torch.cat([counts.squares.unsqueeze(1), counts.bins, counts.below], 1)
        if shards is not None:
            table = shards.sum_over_ranks([table * shards.shares.unsqueeze(1)])[0].float()
        numbers = read(torch.cat([counts.limits.unsqueeze(1), table], 1).flatten())
        width = len(numbers) // len(wanted)
        found = {}
        for i, (name, p) in enumerate(wanted.items()):
            if p.grad is not None:
                limit, squares, *rest = numbers[i * width : (i + 1) * width]
                rms = (squares / max(p.numel(), 1)) ** 0.5
                found[name] = _Counted(rms, limit, rest[:_BINS], rest[_BINS:])
        return found

    def _close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []


class _Counted(NamedTuple):
    rms: float  # not finite where an element is not
    limit: float
    bins: list[float]
    below: list[float]
