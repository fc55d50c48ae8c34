"""Mistakes that the arguments of a loss function show.

Autograd keeps these arguments until the backward pass frees them. They are on the device, and are read from there, so
this is done once in a training.

To add a mistake: see `lightning_gradguard.introspection.graph_problems`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.introspection.graph_problems import (
    GraphProblem,
    LossGraph,
    Problem,
    find_problems_of_signs,
    is_masked,
)
from lightning_gradguard.introspection.operations import VIEWS, kind_of

#: Range of the outputs of activations that bound them.
_RANGES = {
    "Sigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "SafeSoftmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Relu": (0.0, math.inf),
}
#: Part of the spread of the targets that outputs of a bounded range leave, from which the range is a mistake: a tanh
#: and standard normal targets leave 0.15, a ReLU 0.5, a sigmoid 0.57.
_OUT_OF_REACH = 0.25
#: Nodes between a comparison and its mean.
_STEPS = 8
#: Operations with constants, which move a range and stretch it.
_AFFINE = frozenset({"Mul", "Div", "Add", "Sub", "Rsub", "Neg"})
#: Largest error of what is called a scaled copy, and the least spread from which the scale is taken.
_SAME, _LEAST_SPREAD = 1e-3, 1e-3
#: Losses that keep output and target, and operations of a loss that is written out and keep their difference.
_FUNCTIONS, _WRITTEN_OUT = frozenset({"MseLoss", "SmoothL1Loss", "HuberLoss"}), frozenset({"Pow", "Abs"})
_LABELS, _BINARY = frozenset({"NllLoss", "NllLoss2D"}), frozenset({"BinaryCrossEntropyWithLogits"})
#: How far targets may lie outside of 0 to 1, such as those of an image that was resized.
_BEYOND = 0.05
#: Norm of a row of the first layer's input from which it hardly tells one row from another, and from which no training
#: changes that soon; healthy at least 0.31.
_TINY, _VANISHING = 0.06, 0.02
#: Loss of the first batch over that of equal odds, from which the outputs are too large; healthy at most 3.9.
TIMES_CHANCE = 10.0


class Compared(NamedTuple):
    """Output and target of a loss.

    Attributes:
        child: Node of the output.
        output: The output; None where the loss keeps only the difference.
        target: The target; None if it is to be found from ``difference``.
        difference: Output minus target, or None.
    """

    child: int
    output: Tensor | None
    target: Tensor | None
    difference: Tensor | None = None


@torch.no_grad()
def find_problems_of_values(loss: Tensor) -> tuple[GraphProblem, ...]:
    """Find mistakes that constants, outputs and targets show.

    Reads from the device. Nothing is found in what cannot be read.

    Args:
        loss: The loss, before its backward pass.
    """
    return tuple(problem for finder in _FINDERS for problem in _found(loss, finder))


@torch.no_grad()
def find_large_start(loss: Tensor) -> tuple[GraphProblem, ...]:
    """Find outputs that are far too large before anything was learned.

    Reads from the device. Nothing is found in what cannot be read.

    Args:
        loss: Loss of the first batch, before its backward pass.
    """
    return _found(loss, _large_start)[:1]


class FirstLoss(NamedTuple):
    """Facts about one of the first losses.

    Attributes:
        problems: Mistakes that `find_problems_of_values` and `find_large_start` find.
        is_masked: True if log-probabilities are multiplied with a mask; False if that cannot be read.
    """

    problems: tuple[GraphProblem, ...] = ()
    is_masked: bool = False


@torch.no_grad()
def read_first_loss(loss: Tensor) -> FirstLoss:
    """Find all that the arguments of one of the first losses show, in one walk through its graph.

    Reads from the device. Nothing is found in what cannot be read.

    Args:
        loss: The loss, before its backward pass.
    """
    if (graph := _graph_of(loss)) is None:
        return FirstLoss()
    found: list[GraphProblem] = []
    for finder in _FINDERS:
        found += _attempt(graph, finder)
    found += _attempt(graph, _large_start)[:1]
    try:
        masked = is_masked(graph)
    except Exception:  # freed, changed in place, or of another form
        masked = False
    return FirstLoss(tuple(found), masked)


def _found(loss: Tensor, finder: Callable[[LossGraph], Iterator[GraphProblem]]) -> tuple[GraphProblem, ...]:
    graph = _graph_of(loss)
    return () if graph is None else _attempt(graph, finder)


def _graph_of(loss: Tensor) -> LossGraph | None:
    """Return the graph of a loss, or None if it cannot be read."""
    try:
        return None if loss.grad_fn is None else LossGraph(loss.grad_fn)
    except Exception:  # of another form
        return None


def _attempt(
    graph: LossGraph, finder: Callable[[LossGraph], Iterator[GraphProblem]]
) -> tuple[GraphProblem, ...]:
    """Return what is found, nothing if the graph cannot be read."""
    try:
        return tuple(finder(graph))
    except Exception:  # freed, changed in place, or of another form
        return ()


def find_tiny_input(norm: Tensor | None) -> GraphProblem | None:
    """Find inputs that the first layer's biases dwarf.

    A layer of n inputs begins with weights and biases of about n**-0.5, so that the norm of its n inputs counts.
    Reads from the device.

    Args:
        norm: float32 [], norm of a row of what the first layer was given; None if it is not known.
    """
    try:
        size = math.nan if norm is None else float(norm)
    except RuntimeError:  # of an unusual kind
        return None
    if not 0 < size < _TINY:
        return None
    text = (
        f"The inputs of the first layer are tiny: a row has a norm of {size:.2g}, where 1 or more is typical. Beside "
        "the layer's biases all rows look the same, as when images are divided by 255 twice."
    )
    return GraphProblem(Problem.TINY_INPUT, text, certain=size < _VANISHING)


def _unreachable_targets(loss: LossGraph) -> Iterator[GraphProblem]:
    """Find targets that an activation at the output cannot reach."""
    for index in loss.where(_FUNCTIONS | _WRITTEN_OUT):
        compared = _compared(loss, index) if _is_reduced(loss, index) else None
        found = None if compared is None else _range_of(loss, compared.child, compared.output)
        if compared is None or found is None:
            continue
        (low, high), activation, values = found
        target = compared.target
        if target is None and values is not None and compared.difference is not None:
            target = values.reshape(compared.difference.shape) - compared.difference
        if target is None or target.numel() < 2 or not target.is_floating_point():
            continue
        target = target.float()
        beyond, spread = target - target.clamp(low, high), target - target.mean()
        left = float(beyond.square().mean())
        if left > _OUT_OF_REACH * float(spread.square().mean()) and left > 0:
            share = float((beyond != 0).float().mean())
            reach = f"below {low:.3g}" if high == math.inf else f"outside {low:.3g} to {high:.3g}"
            text = (
                f"The outputs come from a {activation}, but {100 * share:.0f} % of the targets are {reach}, where it "
                "cannot reach them."
            )
            yield GraphProblem(Problem.OUT_OF_RANGE, text)
            return


def _targets_out_of_domain(loss: LossGraph) -> Iterator[GraphProblem]:
    """Find targets of a binary cross-entropy that are no probabilities, so that it has no lower bound."""
    for index in loss.where(_BINARY):  # binary_cross_entropy refuses them itself
        target = loss.saved(index, "target")
        # Without a reduction of its own, what is marked by other numbers may be left out later.
        weighted = loss.saved(index, "weight") is not None or loss.saved(index, "reduction") == 0
        if target is None or not target.numel() or weighted:
            continue
        low, high = (float(end) for end in target.detach().float().aminmax())
        if low < -_BEYOND or high > 1 + _BEYOND:
            text = (
                f"binary_cross_entropy_with_logits gets targets from {low:.3g} to {high:.3g}, and takes 0 to 1: with "
                "other targets it has no lower bound."
            )
            yield GraphProblem(Problem.TARGETS_OUT_OF_DOMAIN, text)
            return


def _is_reduced(loss: LossGraph, index: int) -> bool:
    """Return True if nothing is left out of what a node compares, before its mean or sum is taken."""
    if loss.saved(index, "reduction") in (1, 2):
        return True
    for _ in range(_STEPS):
        parents = set(loss.parents[index])
        if len(parents) != 1:
            return False
        index = parents.pop()
        if loss.ops[index] in ("Mean", "Sum"):
            return True
        if loss.ops[index] not in VIEWS and loss.ops[index] not in ("Sqrt", "Pow"):
            return False
    return False


def _compared(loss: LossGraph, index: int) -> Compared | None:
    """Return what a node compares; None if it is no comparison of an output with a target."""
    if loss.ops[index] in _FUNCTIONS:
        edges = loss.edges[index]
        if len(edges) != 2 or (edges[0] is None) == (edges[1] is None):
            return None
        output, target = loss.saved(index, "self"), loss.saved(index, "target")
        if edges[0] is None:  # the loss is symmetric, and the target came first
            output, target = target, output
        child = edges[1] if edges[0] is None else edges[0]
        return None if child is None or output is None else Compared(child, output.detach(), target.detach())
    inputs, difference = loss.inputs(index), loss.saved(index, "self")
    minus = loss.skip(inputs[0]) if len(inputs) == 1 else index
    edges = loss.edges[minus]
    if loss.ops[minus] != "Sub" or len(edges) != 2 or (edges[0] is None) == (edges[1] is None):
        return None
    child = edges[1] if edges[0] is None else edges[0]
    if difference is None or child is None or loss.size(child) != difference.numel():
        return None
    return Compared(child, None, None, difference.detach() if edges[1] is None else -difference.detach())


def _range_of(
    loss: LossGraph, index: int, output: Tensor | None
) -> tuple[tuple[float, float], str, Tensor | None] | None:
    """Return the range of an output, the activation that bounds it, and its result if that is the output itself."""
    plain = True
    while loss.ops[index] in VIEWS or loss.ops[index] in _AFFINE:
        inputs = loss.inputs(index)
        if len(inputs) != 1 or loss.size(inputs[0]) != loss.size(index):
            return None
        plain &= loss.ops[index] in VIEWS
        index = inputs[0]
    if loss.ops[index] not in _RANGES:
        return None
    bounds, activation = _RANGES[loss.ops[index]], loss.ops[index].lower().replace("safe", "")
    values = loss.saved(index, "result")
    if plain:
        return bounds, activation, None if values is None else values.detach()
    if values is None or output is None:
        return None
    line = _line(values.detach().float(), output.float())
    if line is None:
        return None
    scale, shift = line
    shift = scale * round(shift / scale, 3)  # else an end at 0 would be a number by rounding
    ends = sorted(scale * end + shift for end in bounds)
    return (ends[0], ends[1]), activation, None


def _line(x: Tensor, y: Tensor) -> tuple[float, float] | None:
    """Return a and b of y = a x + b; None if y is no such copy of x.

    The elements may stand in another order.
    """
    low, high, middle = (float(v) for v in (x.min(), x.max(), x.mean()))
    y_low, y_high, y_middle = (float(v) for v in (y.min(), y.max(), y.mean()))
    if not (high - low > _LEAST_SPREAD and y_high > y_low and math.isfinite(y_low) and math.isfinite(y_high)):
        return None
    scale = (y_high - y_low) / (high - low)
    for a, b in ((scale, y_low - scale * low), (-scale, y_high + scale * low)):
        if abs(a * middle + b - y_middle) <= _SAME * max(y_high - y_low, 1e-30):
            return a, b
    return None


def _is_unscaled(loss: LossGraph, index: int) -> bool:
    """Return True if logits are those of a layer, and were not scaled up on purpose, such as cosines are."""
    inputs = loss.inputs(index)
    source = loss.skip(inputs[0]) if inputs else index
    return kind_of(loss.ops[source]) == "product" or loss.ops[source] in ("Add", "AccumulateGrad")


def _large_start(loss: LossGraph) -> Iterator[GraphProblem]:
    """Find a first loss of labels far above that of equal odds."""
    for index in loss.where(_LABELS | _BINARY):
        output, target = loss.saved(index, "self"), loss.saved(index, "target")
        if output is None or target is None or not output.numel():
            continue
        if loss.saved(index, "weight") is not None or loss.saved(index, "pos_weight") is not None:
            continue
        output = output.detach().float()
        if loss.ops[index] in _BINARY and not _is_unscaled(loss, index):
            continue
        if loss.ops[index] in _BINARY:
            classes = 2
            value = torch.nn.functional.binary_cross_entropy_with_logits(output, target.detach().float())
        else:
            source = loss.skip(loss.inputs(index)[0])
            if loss.ops[source] != "LogSoftmax" or not _is_unscaled(loss, source):
                continue
            dim = 1 if output.ndim > 1 else 0
            classes = output.shape[dim]
            ignored = loss.saved(index, "ignore_index")
            ignored -= 2**64 if ignored >= 2**63 else 0
            value = torch.nn.functional.nll_loss(output, target.detach(), ignore_index=ignored)
        first, chance = float(value), math.log(max(classes, 2))
        if TIMES_CHANCE * chance < first < math.inf:
            text = (
                f"The loss of the first batch is {first:.3g}, {first / chance:.3g} times that of equal odds for "
                f"{classes} classes: the outputs are far too large before anything was learned."
            )
            yield GraphProblem(Problem.LARGE_START, text)


_FINDERS: tuple[Callable[[LossGraph], Iterator[GraphProblem]], ...] = (
    *(find_problems_of_signs, _unreachable_targets, _targets_out_of_domain),
)
