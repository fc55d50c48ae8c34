"""Detectors of tensors that get no gradient: cut off from the loss, dead, or below their number format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.detectors.base import Held, Reading, above, reading, share
from lightning_gradguard.results import Fault, Quantity
from lightning_gradguard.stats.grad_stats import GradStats


def starved(stats: GradStats) -> Tensor:
    """Layers with a gradient of exactly zero before the first one that has any, bool [P]."""
    layout, live = stats.layout, stats.trends.live
    first = torch.where(layout.is_layer & live, layout.depth, torch.inf).amin()
    return layout.is_layer & stats.present & ~live & (layout.depth < first) & first.isfinite()


class Unreached(NamedTuple):
    """What is remembered of each tensor.

    Attributes:
        steps: float32 [P], steps without a gradient; -1 for what once had one.
        seen: float32 [P], steps with a gradient up to the last closer look.
    """

    steps: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Disconnected:
    """Flags tensors that take part in the forward pass but get no gradient, since no path leads there from the loss.

    Raised after ``steps`` steps; likewise where all layers from the input up to some place have a gradient of exactly
    zero, as behind ``round()`` or a unit that is dead for good. Trainable tensors that take no part in the forward
    pass are only mentioned (INFO), and so are biases alone: that of an energy has no gradient by its nature.
    Needs an autograd graph that can be read: silent under torch.compile and tensor parallel.

    Args:
        steps: Steps without a gradient. Default 40: a part that is used only now and then has its turn in them.
    """

    steps: int = 40
    fault: ClassVar[Fault] = Fault.DISCONNECTED
    measures: ClassVar[tuple[str, ...]] = (
        "tensors without a path from the loss",
        "trainable tensors that are not used",
    )
    slow: ClassVar[bool] = True

    def __post_init__(self) -> None:
        above("steps", self.steps, 0)

    def init(self, stats: GradStats) -> Any:
        """Nothing held yet."""
        zeros = torch.zeros_like(stats.norms)
        return Unreached(zeros, zeros)

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step."""
        # Steps with a gradient are counted at every step, so that none between two looks is missed.
        seen = stats.trends.state.seen
        reached = seen > state.seen
        cut = stats.cut | (stats.ran & starved(stats))
        # What has a gradient after it had none has a path, and its turn again: an expert that no token chooses.
        again = stats.cut & ((stats.norms > 0) | (reached & (state.steps > 0)))
        held = torch.where((cut | stats.unused) & ~reached, state.steps + stats.elapsed, 0.0)
        held = torch.where((state.steps < 0) | again, -1.0, held)
        found = held >= self.steps
        # Where nothing at all has a gradient, the optimizer holds the parameters of another model.
        cut = torch.where(stats.present.any(), found & cut, found)
        grave = (cut & stats.layout.is_layer).any()
        cut = cut & grave
        named = torch.where(grave, cut, found)
        # The cut itself lies behind the last tensor that gets nothing.
        score = torch.where(named, stats.layout.depth, -torch.inf)
        said = reading(
            stats,
            named.any(),
            named.sum(),
            1.0,
            score=score,
            ceiling=torch.where(grave, 2.0, 0.0),
            measure=torch.where(grave, 0.0, 1.0),
        )
        return said, Unreached(held, seen)


@dataclass(frozen=True)
class DeadUnits:
    """Flags layers of which nearly all output units have an exactly zero gradient, without progress of the loss.

    Where all layers from the input up to some place get nothing at all, a loss that falls is no excuse: it is the
    layers behind them that learn.

    Args:
        limit: Share of dead rows. Default 0.9: healthy layers stay below 0.52.
        steps: Steps for which it has to hold.
    """

    limit: float = 0.9
    steps: int = 20
    fault: ClassVar[Fault] = Fault.DEAD
    measures: ClassVar[tuple[str, ...]] = ("share of a layer's units without any gradient",)
    quantities: ClassVar[tuple[Quantity, ...]] = (Quantity.DEAD_UNITS,)
    slow: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        share("limit", self.limit)
        above("steps", self.steps, 0)

    def init(self, stats: GradStats) -> Any:
        """Nothing held yet."""
        return Held(torch.zeros_like(stats.norms))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step; the shares are those of the last sampled step."""
        dead = (stats.dead >= self.limit) & stats.present & stats.layout.is_layer
        layers = stats.layout.is_layer & stats.present
        depth = torch.where(layers, stats.layout.depth, -1.0)
        # Which outputs a loss asks for is its own affair, such as the actions that were taken.
        dead = dead & ((depth < depth.max()) | (stats.norms == 0))
        held = torch.where(dead, state.steps + stats.elapsed, 0.0)
        found = held >= self.steps
        trends = stats.trends
        # Of equally dead layers the one nearest to the output: behind it, what is dead follows from it.
        score = torch.where(
            found, stats.dead + 1e-3 * stats.layout.depth / stats.layout.depth.numel(), -torch.inf
        )
        value = torch.where(found, stats.dead, 0.0).max()
        raised = (found.any() & trends.no_progress) | (found & starved(stats)).any()
        return reading(stats, raised, value, self.limit, score=score), Held(held)


class Steps(NamedTuple):
    """For how many steps a condition has held, float32 []."""

    held: Tensor


@dataclass(frozen=True)
class Underflow:
    """Flags half-precision gradients that are lost to their own number format, although there is a loss.

    Raised when the share of the output layer's gradient that is zero or subnormal in float16 or bfloat16 is at or
    above ``limit`` for ``steps`` steps.

    Args:
        limit: Share of elements, by count.
        steps: Steps for which it has to hold.
    """

    limit: float = 0.98
    steps: int = 10
    fault: ClassVar[Fault] = Fault.UNDERFLOW
    measures: ClassVar[tuple[str, ...]] = ("share of the output layer's gradient below its number format",)
    slow: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        share("limit", self.limit)
        above("steps", self.steps, 0)

    def init(self, stats: GradStats) -> Any:
        """Nothing held yet."""
        return Steps(torch.zeros_like(stats.total))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Judges one step; the shares are those of the last sampled step."""
        layers = stats.layout.is_layer & stats.present
        depth = torch.where(layers, stats.layout.depth, -1.0)
        output = layers & (depth == depth.max())
        gone = torch.where(stats.norms == 0, 1.0, stats.lost) if stats.low_precision else stats.lost
        last = torch.where(output, gone, 0.0).max()
        lost = (last >= self.limit) & (stats.loss != 0)
        held = torch.where(lost, state.held + stats.elapsed, 0.0)
        lowest = (stats.lost >= self.limit) | (stats.norms == 0)
        score = torch.where(lowest & stats.present, stats.layout.depth, -torch.inf)
        return reading(stats, held >= self.steps, last, self.limit, score=score), Steps(held)
