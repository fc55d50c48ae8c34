"""`GradHistogram`: histograms of log10 gradient magnitudes, on one fixed axis."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gradguard.callbacks.base import Callback
from lightning_gradguard.callbacks.trainer import Losses, logging_step, optimizer_index, scaler_of, warn
from lightning_gradguard.mailbox import read
from lightning_gradguard.signals.histogram import EDGES, count
from lightning_gradguard.signals.stats import measure
from lightning_gradguard.sinks.loggers import open_sinks
from lightning_gradguard.sinks.panel import Sink
from lightning_gradguard.sinks.selection import WorstTensors
from lightning_gradguard.sinks.tags import histogram_panel, tag_names
from lightning_gradguard.watch import Watch

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_BINS = len(EDGES) - 1


class GradHistogram(Callback):
    """Writes gradient histograms to TensorBoard, as ``gradguard_hist_log10/NNN_name``.

    They show log10 of the magnitude on an axis from -12 to 3 that never changes: a drift to the left is vanishing, to
    the right exploding, and a wall at the left edge is exact zeros. Put before a `GradGuard` that clips, it shows
    gradients before clipping; put after it, after clipping.

    Example:
        >>> from lightning_gradguard import GradHistogram
        >>> histogram = GradHistogram(every_n_steps=50, exclude=["*.bias"])

    Args:
        every_n_steps: Optimizer steps between two histograms.
        include: Patterns of parameter names to show, such as "encoder.*"; all when None.
        exclude: Patterns of parameter names to leave out.
        max_tensors: Most tensors shown at a time; the worst, where there are more.
        max_samples: Most elements read of each tensor, evenly strided; None for all.

    Raises:
        ValueError: If a number is not a positive whole number.
        TypeError: If patterns are not a sequence of strings.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 100,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        max_tensors: int = 24,
        max_samples: int | None = 4096,
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
        for name, patterns in (("include", include), ("exclude", exclude)):
            if patterns is None:
                continue
            if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
                raise TypeError(
                    f'{name} must be a sequence of patterns such as ["encoder.*"], got {patterns!r}'
                )
        self.every_n_steps, self.max_tensors, self.max_samples = every_n_steps, max_tensors, max_samples
        self.include, self.exclude = include, exclude
        self._watches: dict[int, Watch] = {}
        self._worst: dict[int, WorstTensors] = {}
        self._losses = Losses()
        self._sinks: list[Sink] = []

    @property
    def state_key(self) -> str:
        """Equal for equal configuration."""
        names = ("every_n_steps", "include", "exclude", "max_tensors", "max_samples")
        return self._generate_state_key(**{name: getattr(self, name) for name in names})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the sinks."""
        self._watches, self._worst = {}, {}
        self._sinks = open_sinks(trainer.loggers) if trainer.is_global_zero else []
        if not trainer.loggers:
            warn(trainer, "GradHistogram has no logger to write to; give the Trainer a TensorBoardLogger")
        names = [name for name, _ in pl_module.named_parameters()]
        for pattern in (*(self.include or ()), *(self.exclude or ())):
            if names and not fnmatch.filter(names, pattern):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
                warn(
                    trainer,
                    f"GradHistogram: pattern {pattern!r} matches no parameter; the nearest is {near!r}",
                )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keeps the loss, whose graph tells the order of the layers."""
        if self._sinks:
            self._losses.graph = loss

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Counts and writes, every so many steps."""
        graph, self._losses.graph = self._losses.graph, None
        step = trainer.global_step // max(1, len(trainer.optimizers))
        if (
            not self._sinks
            or step % self.every_n_steps
            or not any(g["params"] for g in optimizer.param_groups)
        ):
            return
        index = optimizer_index(trainer, optimizer)
        if index not in self._watches:
            self._watches[index] = Watch(pl_module.named_parameters(), optimizer)
            self._watches[index].close()
            self._worst[index] = WorstTensors(self.max_tensors)
        watch = self._watches[index]
        watch.follow_groups()
        watch.arrange(graph)
        watch.unscale(scaler_of(trainer))
        counts = self._count(watch, self._worst[index])
        if counts:
            titles = dict(zip(watch.ordered_names, tag_names(watch.ordered_names), strict=True))
            panel = histogram_panel(counts, titles, group=f"gradguard_{index}" if index else "gradguard")
            for sink in self._sinks:
                sink.write(logging_step(trainer), panel)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Flushes."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Flushes: after an exception Lightning calls no other hook."""
        self._close()

    def _count(self, watch: Watch, worst: WorstTensors) -> dict[str, list[float]]:
        """Name to 30 counts, from input to output, of the tensors that are to be shown now."""
        layout = watch.layout
        norms = read(measure(layout, watch.weights, watch.updates).norms)
        gradients = dict(zip(layout.names, watch.gradients(), strict=True))
        rms = {
            layout.names[i]: norms[i] / max(layout.parameters[i].numel(), 1) ** 0.5
            for i in layout.order
            if gradients[layout.names[i]] is not None and self._is_wanted(layout.names[i])
        }
        chosen = worst.choose(rms)
        if not chosen:
            return {}
        numbers = read(
            count([gradients[name] for name in chosen], max_samples=self.max_samples).bins.flatten()
        )
        return {name: numbers[i * _BINS : (i + 1) * _BINS] for i, name in enumerate(chosen)}

    def _is_wanted(self, name: str) -> bool:
        included = self.include is None or any(fnmatch.fnmatchcase(name, p) for p in self.include)
        return included and not any(fnmatch.fnmatchcase(name, p) for p in self.exclude or ())

    def _close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []
