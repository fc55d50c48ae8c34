"""Detectors of tensors that get no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.detectors.base import Reading, reading
from lightning_gradguard.results import Fault, Quantity
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.validation import check_fraction, check_positive


class Unreached(NamedTuple):
    """State of `Disconnected`.

    Attributes:
        steps: float32 [P], steps without a gradient; -1 for a tensor that has proved to have a path.
        seen: float32 [P], steps with a gradient up to the last full evaluation.
    """

    steps: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Disconnected:
    """Detect tensors without a path to the loss.

    They take part in the forward pass, but get no gradient. Raised after ``steps`` steps. Layers whose gradient is
    exactly zero, from the input up to the first that has one, count as well: they lie behind ``round()`` or a unit that
    is dead for good.

    INFO is what gets nothing and is no mistake in the graph: trainable tensors that take no part in the forward pass;
    tensors whose result the loss does not use, such as a head that this loss does not need, or takes as a target, such
    as a teacher in the optimizer; layers whose input is exactly zero; and biases alone, since the bias of an energy has
    no gradient by design. Nothing in the graph tells a head that is not needed from one whose loss was forgotten.

    Needs an autograd graph that can be read: silent under torch.compile and tensor parallel.

    Args:
        steps: Steps without a gradient. Default 40: a part that is used only now and then gets its turn within them.

    Raises:
        TypeError: If ``steps`` is no number.
        ValueError: If ``steps`` is not positive and finite.
    """

    steps: int = 40
    fault: ClassVar[Fault] = Fault.DISCONNECTED
    measures: ClassVar[tuple[str, ...]] = (
        "tensors without a path from the loss",
        "trainable tensors that are not used",
        "tensors whose gradient is exactly zero, although a path from the loss leads there",
        "tensors whose result the loss does not use, or takes as a target",
        "layers whose input is exactly zero",
        "tensors behind a softmax over one element, which is constant",
    )
    slow: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("steps", self.steps)

    def init(self, stats: GradStats) -> Any:
        """Return a state without a step so far."""
        zeros = torch.zeros_like(stats.norms)
        return Unreached(zeros, zeros)

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Evaluate one step."""
        # Counted at every step, so that no gradient between two full evaluations is missed.
        seen = stats.trends.state.seen
        reached = seen > state.seen
        zero = stats.ran & zero_up_to_first_live(stats)
        is_cut = stats.is_marked(stats.cut)
        wrong = zero | (stats.cut & ~stats.idle) if is_cut else zero
        # What is no mistake in the graph, kind by kind; the first that there is is named.
        kinds = [(4.0, stats.starved)]
        kinds += [(3.0, stats.idle)] if stats.is_marked(stats.idle) else []
        kinds += [(1.0, stats.unused)] if stats.is_marked(stats.unused) else []
        if stats.is_marked(stats.constant):
            kinds.append((5.0, stats.constant & stats.present & (stats.norms == 0)))
        lost = wrong
        for _, kind in kinds:
            lost = lost | kind
        held = torch.where(lost & ~reached, state.steps + stats.elapsed, 0.0)
        has_path = state.steps < 0
        if is_cut:
            # A tensor that gets a gradient after it had none has a path, such as an expert that no token chose.
            has_path = has_path | (stats.cut & ((stats.norms > 0) | (reached & (state.steps > 0))))
        held = torch.where(has_path, -1.0, held)
        found = held >= self.steps
        # If nothing at all has a gradient, the optimizer holds the parameters of another model.
        grave = found & wrong if any(stats.pattern) else found
        is_grave = (grave & stats.layout.is_layer).any()
        grave = grave & is_grave
        named, measure = found, stats.layout.constant(0.0)
        for number, kind in reversed(kinds):
            own = found & kind
            is_some = own.any()
            named = torch.where(is_some, own, named)
            measure = torch.where(is_some, number, measure)
        named = torch.where(is_grave, grave, named)
        # The cut itself lies behind the last tensor that gets nothing, so that one comes first.
        score = torch.where(named, stats.layout.depth, -torch.inf)
        result = reading(
            stats,
            named.any(),
            named.sum(),
            1.0,
            score=score,
            ceiling=torch.where(is_grave, 2.0, 0.0),
            measure=torch.where(
                is_grave, torch.where((grave & stats.cut).any(), 0.0, 2.0) if is_cut else 2.0, measure
            ),
            near=((held > 0) & ~found).any(),
        )
        return result, Unreached(held, seen)


class Held(NamedTuple):
    """State of `DeadUnits`: dead steps of each tensor, float32 [P]."""

    steps: Tensor


@dataclass(frozen=True)
class DeadUnits:
    """Detect layers whose units are nearly all dead.

    A dead unit has a gradient of exactly zero. Raised while the loss makes no progress. Where all layers from the input
    up to some layer get nothing at all, it is raised even if the loss falls: the layers behind them learn.

    Args:
        limit: Share of units without a gradient, above 0 and at most 1. Default 0.9: healthy layers stay below 0.52.
        steps: Steps for which the condition has to hold.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is out of range.
    """

    limit: float = 0.9
    steps: int = 20
    fault: ClassVar[Fault] = Fault.DEAD
    measures: ClassVar[tuple[str, ...]] = ("share of a layer's units without any gradient",)
    quantities: ClassVar[tuple[Quantity, ...]] = (Quantity.DEAD_UNITS,)
    slow: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction("limit", self.limit)
        check_positive("steps", self.steps)

    def init(self, stats: GradStats) -> Any:
        """Return a state without a step so far."""
        return Held(torch.zeros_like(stats.norms))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Evaluate one step by the last sampled shares."""
        layers = stats.layout.is_layer & stats.present
        # A batch without anything to learn was sampled, if the whole layer had no gradient and has one now.
        outdated = (stats.dead >= 1) & (stats.norms > 0)
        dead = (stats.dead >= self.limit) & ~outdated & layers & ~_is_idle(stats)
        if stats.is_marked(stats.selected):  # another batch chooses others
            dead = dead & ~(stats.selected & (stats.dead < 1))
        depth = torch.where(layers, stats.layout.depth, -1.0)
        # A loss may leave outputs unused, such as actions that were not taken: the last layer counts only at zero.
        dead = dead & ((depth < depth.max()) | (stats.norms == 0))
        held = torch.where(dead, state.steps + stats.elapsed, 0.0)
        found = held >= self.steps
        # Of equally dead layers the one nearest to the output comes first: the others may follow from it.
        depth_bonus = 1e-3 * stats.layout.depth / stats.layout.depth.numel()
        score = torch.where(found, stats.dead + depth_bonus, -torch.inf)
        value = torch.where(found, stats.dead, 0.0).max()
        raised = (found.any() & stats.trends.no_progress) | (found & zero_up_to_first_live(stats)).any()
        near = ((held > 0) & ~found).any()
        return reading(stats, raised, value, self.limit, score=score, near=near), Held(held)


class Steps(NamedTuple):
    """State of `Underflow`: steps held so far, float32 []."""

    held: Tensor


@dataclass(frozen=True)
class Underflow:
    """Detect half-precision gradients lost to their number format.

    Raised when the share of the output layer's gradient that is zero or subnormal in float16 or bfloat16 is at or above
    ``limit`` for ``steps`` steps, and the loss is not zero.

    Args:
        limit: Share of elements, by count, above 0 and at most 1.
        steps: Steps for which the condition has to hold.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If an argument is out of range.
    """

    limit: float = 0.98
    steps: int = 10
    fault: ClassVar[Fault] = Fault.UNDERFLOW
    measures: ClassVar[tuple[str, ...]] = ("share of the output layer's gradient below its number format",)
    slow: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction("limit", self.limit)
        check_positive("steps", self.steps)

    def init(self, stats: GradStats) -> Any:
        """Return a state without a step so far."""
        return Steps(torch.zeros_like(stats.total))

    def update(self, stats: GradStats, state: Any) -> tuple[Reading, Any]:
        """Evaluate one step by the last sampled shares."""
        if (
            stats.lost is stats.layout.zeros and not stats.low_precision
        ):  # all gradients are of higher precision
            zero = stats.layout.constant(0.0)
            return reading(stats, zero > zero, zero, self.limit), Steps(zero)
        layers = stats.layout.is_layer & stats.present
        depth = torch.where(layers, stats.layout.depth, -1.0)
        output = layers & (depth == depth.max())
        lost = torch.where(stats.norms == 0, 1.0, stats.lost) if stats.low_precision else stats.lost
        lost_of_output = torch.where(output, lost, 0.0).max()
        holds = (lost_of_output >= self.limit) & (stats.loss != 0)
        held = torch.where(holds, state.held + stats.elapsed, 0.0)
        affected = (stats.lost >= self.limit) | (stats.norms == 0)
        score = torch.where(affected & stats.present, stats.layout.depth, -torch.inf)
        raised, near = held >= self.steps, held > 0
        return reading(stats, raised, lost_of_output, self.limit, score=score, near=near), Steps(held)


def zero_up_to_first_live(stats: GradStats) -> Tensor:
    """Return zero layers below the first live, bool [P].

    Those with a gradient of exactly zero, from the input up to the first live layer. Layers that get nothing by design
    are passed over.
    """
    layout, live = stats.layout, stats.trends.live
    first = torch.where(layout.is_layer & live, layout.depth, torch.inf).amin()
    zero = layout.is_layer & stats.present & ~live & ~_is_idle(stats)
    return zero & (layout.depth < first) & first.isfinite()


def _is_idle(stats: GradStats) -> Tensor:
    """Return layers that get nothing although no unit is dead, bool [P].

    Their input is zero, they choose among one, or the loss does not use what they give.
    """
    idle = stats.starved
    for mask in (stats.constant, stats.idle):
        idle = idle | mask if stats.is_marked(mask) else idle
    return idle
