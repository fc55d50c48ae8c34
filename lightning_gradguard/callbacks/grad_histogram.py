"""`GradHistogram`: write gradient histograms to TensorBoard."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.callbacks.compatibility import refuse_hidden_gradients
from lightning_gradguard.callbacks.trainer_adapter import (
    Callback,
    is_step_without_loss,
    logging_step,
    optimizer_index,
    scaler_of,
    warn,
)
from lightning_gradguard.engine.arguments import short_repr
from lightning_gradguard.engine.parameter_tracker import unscale
from lightning_gradguard.engine.readback import read
from lightning_gradguard.introspection.autograd_graph import summarize_graph
from lightning_gradguard.loggers import open_sinks
from lightning_gradguard.loggers.base import FailSafe, LogSink
from lightning_gradguard.loggers.histograms import (
    THRESHOLDS,
    WorstTensors,
    exponents_record,
    histogram_record,
)
from lightning_gradguard.loggers.tags import tag_group, tag_names
from lightning_gradguard.stats.histogram import AXES, EDGES, Axis, count
from lightning_gradguard.stats.parameters import are_same, members, select
from lightning_gradguard.stats.sharding import Shards, align_gradients, is_sharded, local
from lightning_gradguard.validation import check_whole

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

#: Most readings of the autograd graph; a model whose parts come and go keeps its order after that.
MAX_READINGS = 8

_BINS = len(EDGES) - 1


class GradHistogram(Callback):
    """Callback that writes gradient histograms to TensorBoard.

    Their tag is ``gradguard_hist_log10/NNN_name``.

    A histogram shows log10 of the gradient's magnitude, on a fixed axis from -12 to 3. Gradients that drift to the left
    vanish, those that drift to the right explode, and a high bar at the left edge counts exact zeros. If the callback
    stands before a `GradGuard` that clips, it shows gradients before clipping, else after clipping.

    With ``axis="value"`` a histogram shows the values of ``p.grad``, as ``gradguard_hist_value/NNN_name``. It has 30
    equal bins around zero. The axis ends at the largest magnitude or at 4 root mean squares, whichever is smaller, and
    the outer bins count everything beyond.

    With ``exponents=True`` the callback also shows which share of the gradient would lose digits or become zero in
    fp16, bf16 and two formats of fp8: scalars over all tensors, and a table by tensor in the text tab,
    ``gradguard_exponents/``.

    By default 4,096 elements of each tensor are read. In 95 of 100 histograms no cumulative share is then off by more
    than 2.1 % (see `lightning_gradguard.stats.histogram.count`). Of a sharded tensor each rank reads that many elements
    of its part.

    Example:
        >>> from lightning_gradguard import GradHistogram
        >>> histogram = GradHistogram(every_n_steps=50, exclude=["*.bias"])

    Args:
        every_n_steps: Optimizer steps between two histograms.
        include: Patterns of parameter names to show, such as "encoder.*"; all when None.
        exclude: Patterns of parameter names to leave out.
        max_tensors: Largest number of tensors shown at a time. If more match, those with the most unusual gradients are
            shown, and all are counted.
        max_samples: Largest number of elements read of each tensor, evenly strided; None reads all of them.
        axis: "log10" for magnitudes, "value" for values.
        exponents: Also show what narrow number formats would lose.

    Raises:
        ValueError: If a number is not a whole number, 1 or more, or if ``axis`` is neither of the two.
        TypeError: If a number is of another type, patterns are not a sequence of strings, or ``exponents`` is not a
            bool.
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
        check_whole("every_n_steps", every_n_steps)
        check_whole("max_tensors", max_tensors)
        if max_samples is not None:
            check_whole("max_samples", max_samples)
        if axis not in AXES:
            raise ValueError(f"axis must be {' or '.join(map(repr, AXES))}, got {axis!r}")
        if not isinstance(exponents, bool):
            raise TypeError(f"exponents must be True or False, got {exponents!r}")
        self.every_n_steps, self.max_tensors, self.max_samples = every_n_steps, max_tensors, max_samples
        self.include, self.exclude = include, exclude
        self.axis, self.exponents = axis, exponents
        self._patterns = NamePatterns(include, exclude)
        self._shown: dict[int, _ShownTensors] = {}
        self._loss: Tensor | None = None
        self._sinks: list[LogSink] = []
        self._fail_safe = FailSafe("GradHistogram")

    def __repr__(self) -> str:
        return short_repr(
            self,
            every_n_steps=(self.every_n_steps, 100),
            include=(self.include, None),
            exclude=(self.exclude, None),
            max_tensors=(self.max_tensors, 24),
            max_samples=(self.max_samples, 4096),
            axis=(self.axis, "log10"),
            exponents=(self.exponents, False),
        )

    def __getstate__(self) -> dict[str, Any]:
        # A copy writes nowhere, since an open file has one writer.
        return {**self.__dict__, "_sinks": [], "_loss": None, "_shown": {}}

    @cached_property
    def state_key(self) -> str:
        """Checkpoint key, equal for equal configuration."""
        names = ("every_n_steps", "include", "exclude", "max_tensors", "max_samples", "axis", "exponents")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that hide gradients.

        Raises:
            MisconfigurationException: Lightning's own, under such a strategy.
        """
        if stage == "fit":
            refuse_hidden_gradients(trainer, "GradHistogram", "show")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the loggers; warn of hidden tensors."""
        self._shown, self._fail_safe = {}, FailSafe("GradHistogram")
        self._sinks = open_sinks(trainer.loggers) if trainer.is_global_zero else []
        if not trainer.loggers and _first_time("no logger"):
            warn(
                trainer,
                "GradHistogram: nothing is written, since the Trainer has no logger. Use "
                "Trainer(logger=TensorBoardLogger(...)), or remove GradHistogram.",
            )
        named = list(pl_module.named_parameters())
        for problem in self._patterns.problems(list(select(named, None))) if named else ():
            warn(trainer, f"GradHistogram: {problem}")
        if self.axis == "value" and any(is_sharded(p) for _, p in named):
            warn(
                trainer,
                'GradHistogram: sharded gradients are left out, since axis="value" cannot show them. Use axis="log10".',
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget the last batch's loss."""
        self._loss = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss, whose graph orders the layers."""
        self._loss = loss

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Count and write the gradients, every ``every_n_steps`` steps."""
        loss, self._loss = self._loss, None
        step = trainer.global_step // max(1, len(trainer.optimizers))
        parameters = members(optimizer)
        if step % self.every_n_steps or not parameters:
            return
        if is_step_without_loss(pl_module, scaler_of(trainer), loss):
            return
        # If gradients are sharded, every rank has to take part, also rank 0 when its loggers have failed.
        if self._sinks or (trainer.loggers and any(map(is_sharded, parameters))):
            self._fail_safe.run(lambda: self._show(trainer, pl_module, optimizer, loss))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the loggers."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the loggers."""
        self._close()

    def _show(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: torch.optim.Optimizer,
        loss: Tensor | None,
    ) -> None:
        """Count gradients; write those of the worst tensors."""
        index, scaler = optimizer_index(trainer, optimizer), scaler_of(trainer)
        if index not in self._shown:
            self._shown[index] = _ShownTensors(optimizer, WorstTensors(self.max_tensors))
        tensors = self._shown[index]
        tensors.update(module, loss)
        if scaler is not None:  # gradients are still scaled before a fused optimizer's step
            unscale(tensors.optimizer, scaler)
        counted = self._count(tensors.parameters)
        if not self._sinks:
            return
        names = [name for name in tensors.names if name in counted]
        shown = tensors.worst.choose({name: counted[name].rms for name in names})
        if not shown:
            return
        titles = dict(zip(tensors.names, tag_names(tensors.names), strict=True))
        group = tag_group(index)
        limits = {name: counted[name].limit for name in shown} if self.axis == "value" else None
        step = logging_step(trainer)
        bins = {name: counted[name].bins for name in shown}
        records = [histogram_record(bins, titles, limits=limits, group=group)]
        if self.exponents:
            below = {name: counted[name].below for name in names}
            records.append(exponents_record(below, titles, shown, step=step, group=group))
        for sink in self._sinks:
            for record in records:
                sink.write(step, record)

    def _count(self, parameters: Mapping[str, Tensor]) -> dict[str, _Counted]:
        """Return the counts of each gradient by name.

        Every rank counts its part of a sharded gradient.
        """
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


@cache
def _given() -> set[str]:
    """Return the notices that were given in this process."""
    return set()


def _first_time(notice: str) -> bool:
    """Return True the first time in a process; remember it."""
    is_first = notice not in _given()
    _given().add(notice)
    return is_first


class _Counted(NamedTuple):
    rms: float  # not finite if an element is not
    limit: float
    bins: list[float]
    below: list[float]


class _ShownTensors:
    """Parameters of one optimizer, in order, and those shown.

    Attributes:
        optimizer: The optimizer.
        worst: Choice of the tensors that are shown.
        parameters: Parameters by name, in the order of ``named_parameters``, the same on every rank.
        names: Names from input to output, as far as a graph has shown.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, worst: WorstTensors) -> None:
        self.optimizer, self.worst = optimizer, worst
        self.parameters: dict[str, Tensor] = {}
        self.names: tuple[str, ...] = ()
        self._members: list[Tensor] = []
        self._patterns: set[tuple[bool, ...]] = set()

    def update(self, module: LightningModule, loss: Tensor | None) -> None:
        """Update parameters, and their order for new gradients."""
        found = members(self.optimizer)
        if not are_same(found, self._members):
            self._members, self._patterns = found, set()
            self.parameters = select(list(module.named_parameters()), self.optimizer)
            self.names = tuple(self.parameters)
        pattern = tuple(p.grad is not None for p in self.parameters.values())
        known = pattern in self._patterns or len(self._patterns) >= MAX_READINGS
        if known or loss is None or loss.grad_fn is None:
            return
        self._patterns.add(pattern)
        summary = summarize_graph(loss, self.parameters)
        self.names = tuple(summary.names[i] for i in summary.order)


class NamePatterns:
    """Shell-style patterns of parameter names, such as "encoder.*".

    They match whole names, with case.

    Args:
        include: Patterns of names to show; all when None.
        exclude: Patterns of names to leave out of those.

    Raises:
        TypeError: If patterns are not a sequence of strings.
    """

    def __init__(self, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
        for argument, patterns in (("include", include), ("exclude", exclude)):
            if patterns is None:
                continue
            if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
                raise TypeError(
                    f'{argument} must be a sequence of patterns such as ["encoder.*"], got {patterns!r}'
                )
        self._include, self._exclude = include, exclude or ()

    def match(self, name: str) -> bool:
        """Return True if the name is shown."""
        included = self._include is None or any(fnmatchcase(name, p) for p in self._include)
        return included and not any(fnmatchcase(name, p) for p in self._exclude)

    def problems(self, names: Sequence[str]) -> list[str]:
        """Return a message per pattern without match.

        Args:
            names: Names of all parameters of the model.
        """
        found = []
        for pattern in (*(self._include or ()), *self._exclude):
            if names and not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
                found.append(f"pattern {pattern!r} matches no parameter. The nearest name is {near!r}.")
        if names and not found and not any(self.match(name) for name in names):
            found.append(
                f"include={self._include!r} and exclude={self._exclude!r} leave no parameter to show."
            )
        return found
