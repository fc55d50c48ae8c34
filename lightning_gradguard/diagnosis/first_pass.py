"""Measure the first pass of an untrained model."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradguard.diagnosis.wording import number
from lightning_gradguard.introspection.autograd_graph import GraphSummary, read_graph
from lightning_gradguard.introspection.batch import tensors_of
from lightning_gradguard.introspection.gradient_profile import dead_shares, whole_profile
from lightning_gradguard.introspection.graph_problems import GraphProblem, Problem
from lightning_gradguard.introspection.layer_calls import NORMALISATIONS
from lightning_gradguard.introspection.ownership import find_loose
from lightning_gradguard.introspection.probes import InputProbe
from lightning_gradguard.introspection.result_usage import ResultUsage
from lightning_gradguard.introspection.sandbox import SandboxedStep
from lightning_gradguard.introspection.value_problems import find_large_start, find_problems_of_values
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.trends import offsets_and_tilt

#: Part of its range beyond which an activation is saturated: its slope is below a twenty-fifth of the steepest.
_SATURATED = 0.99
#: Learning rate of the virtual steps of Adam, a usual one.
_VIRTUAL_RATE = 1e-3
#: Largest distance from 1 of what adds up to 1.
_SUMS_TO_ONE = 1e-3


@dataclass(frozen=True)
class FirstPass:
    """Measurements of one pass; plain numbers.

    Attributes:
        loss: Loss of the batch.
        chance: Loss of a constant guess under the loss function that was called: log of the number of classes under a
            cross-entropy, the mean square of the targets under a squared loss; NaN under any other.
        guessed: Value of that loss function.
        deliberate: True if a large value of a cross-entropy is no mistake, since its logits are scaled on purpose.
        input_rms: Root mean square of the tensor that the first layer is given; NaN if it is not floating point.
        target_rms: Root mean square of the targets of a squared loss; NaN under any other, and where the targets are
            results of the model, such as codes or the values of a target network.
        normalised: True if the first parameters that are used are those of a normalization.
        saturated: Share of saturated outputs of each sigmoid and tanh, in the order of the pass.
        dead: Share of a layer's output rows whose gradient is exactly zero, by the name of its weight. Without layers
            whose input is zero, and without those that choose among one.
        unreached: Trainable weights of layers that were used while gradients were on, and to which no path leads from
            the loss. A bias alone may have no path, such as that of an energy whose slope is learned.
        idle: Weights that are computed with, and whose result the loss does not use, or takes as a target: not
            mistakes.
        loose: Weights that get gradients and that no module registers, such as those of layers in a plain list.
        holder: A clause on where they are kept; empty without any.
        tilt: Depth tilt of the worst column, decades; None if no column has four layers.
        names: Names of P parameters in depth order, input first.
        shapes: Shapes of the P parameters.
        gradients_log10: log10 of the L2 norms of their gradients, -inf for none.
        weight_norms: Their L2 norms.
        graph_summary: Summary of the autograd graph.
        problems: Mistakes that the graph shows, or the arguments of the loss function.
    """

    loss: float
    chance: float = math.nan
    guessed: float = math.nan
    input_rms: float = math.nan
    target_rms: float = math.nan
    normalised: bool = False
    saturated: tuple[float, ...] = ()
    dead: Mapping[str, float] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    holder: str = ""
    tilt: float | None = None
    names: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    gradients_log10: tuple[float, ...] = ()
    weight_norms: tuple[float, ...] = ()
    deliberate: bool = False
    graph_summary: GraphSummary | None = None
    problems: tuple[GraphProblem, ...] = ()

    @property
    def finite(self) -> bool:
        """True if loss and gradients are finite."""
        return math.isfinite(self.loss) and not any(
            g == math.inf or math.isnan(g) for g in self.gradients_log10
        )


def measure_first_pass(step: SandboxedStep, scale: float = 1.0, steps: int = 0) -> FirstPass:
    """Measure one forward and backward pass on copies.

    Module, batch and random numbers are unchanged afterwards.

    Args:
        step: The training step to measure.
        scale: Loss scale of a GradScaler: without it gradients in half precision would underflow.
        steps: Virtual steps of Adam on the same batch, before the pass that is measured. Behind a weight that starts at
            zero no layer gets a gradient in the first step, and all of them do from the second on.

    Raises:
        ValueError: If the loss is not a tensor with one element.
        Exception: Any error that the model raises.
    """
    with step.sandbox() as copy:
        _take_virtual_steps(step, copy, scale, steps)
        observer = _PassObserver(step.module)
        inputs = InputProbe(dict(step.module.named_parameters()), torch.device("cpu"))
        with observer:
            loss = step.loss_of(copy(step.batch))
        fed = inputs.close()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be a tensor with one element, got {got}")
        parameters = dict(step.module.named_parameters())
        graph, others = read_graph(loss, parameters)
        shown = find_problems_of_values(loss)
        deliberate = observer.is_label_loss and not find_large_start(loss)
        loose, holder = find_loose(step.module, others)
        if loss.grad_fn is not None:
            (loss * scale).backward()  # type: ignore[no-untyped-call]
        names = tuple(graph.names[i] for i in graph.order)
        scales = _scales_of_weights(parameters)
        layers = [n for n in names if parameters[n].ndim >= 2 and n not in graph.embeddings | scales]
        hungry = [n for n in layers if n not in graph.constant and bool(fed.get(n, True))]
        unreached = [n for n in names if n in graph.missing & observer.used and parameters[n].ndim >= 2]
        first = FirstPass(
            loss=float(loss.detach()),
            chance=observer.chance,
            guessed=observer.guessed,
            deliberate=deliberate,
            input_rms=math.nan if observer.given is None else _rms(observer.given),
            target_rms=observer.target_rms,
            normalised=observer.first in NORMALISATIONS,
            saturated=tuple(observer.saturated),
            dead=dead_shares(parameters, hungry),
            unreached=tuple(unreached),
            loose=loose,
            holder=holder,
            tilt=_tilt(parameters, graph, frozenset(layers)),
            names=names,
            shapes=tuple(tuple(parameters[n].shape) for n in names),
            gradients_log10=tuple(_log10(parameters[n].grad) for n in names),
            weight_norms=tuple(float(parameters[n].detach().float().norm()) for n in names),
            graph_summary=graph,
            problems=tuple({p.kind: p for p in (*observer.problems, *graph.problems, *shown)}.values()),
        )
    idle = _find_idle(step, unreached) if unreached else frozenset()
    return replace(first, unreached=tuple(n for n in unreached if n not in idle), idle=tuple(sorted(idle)))


def _tilt(parameters: Mapping[str, Tensor], graph: GraphSummary, layers: frozenset[str]) -> float | None:
    """Return the depth tilt as it is judged in training: of the worst column."""
    if not layers:
        return None
    layout = Layout.of(
        {name: parameters[name] for name in graph.names},
        order=graph.order,
        embeddings=frozenset(graph.names) - layers,
        columns=graph.columns,
    )
    known = {name: parameters[name] for name in layers if parameters[name].numel()}
    profile = torch.tensor(whole_profile(known, graph.names), device=layout.numel.device, dtype=torch.float32)
    live = profile.isfinite()
    tilt = float(offsets_and_tilt(torch.where(live, profile, 0.0), live, layout)[1])
    return None if math.isnan(tilt) else tilt


def _find_idle(step: SandboxedStep, names: Sequence[str]) -> frozenset[str]:
    """Return the parameters whose result the loss does not use, from another forward pass."""
    with step.sandbox() as copy:
        parameters = dict(step.module.named_parameters())
        trained = [p for name, p in parameters.items() if name not in names]
        usage = ResultUsage({name: parameters[name] for name in names}, trained)
        try:
            usage.begin()
            usage.end(step.loss_of(copy(step.batch)))
        finally:
            idle = usage.close()
    return idle


def ignores_parameters(step: SandboxedStep) -> bool:
    """Return True if the loss stays the same, to the bit, when all weights change.

    Args:
        step: The training step.
    """
    losses = []
    with step.sandbox() as copy, torch.no_grad():
        for changed in (False, True):
            for parameter in step.module.parameters() if changed else ():
                parameter.mul_(1.25).add_(0.1)
            torch.manual_seed(0)  # the sandbox restores the random numbers
            losses.append(float(step.loss_of(copy(step.batch)).detach()))
    return losses[0] == losses[1]


def _take_virtual_steps(step: SandboxedStep, copy: Callable[[Any], Any], scale: float, steps: int) -> None:
    trained = [p for p in step.module.parameters() if p.requires_grad] if steps else []
    if not trained:
        return
    optimizer = torch.optim.Adam(trained, _VIRTUAL_RATE)
    for _ in range(steps):
        loss = step.loss_of(copy(step.batch))
        if loss.grad_fn is None:
            return
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for parameter in step.module.parameters():
            parameter.grad = None


def _scales_of_weights(parameters: Mapping[str, Tensor]) -> set[str]:
    """Return what holds one number for each row of another weight.

    Such as the magnitudes of a weight normalization, which are no layers.
    """
    found = set()
    for name, scale in parameters.items():
        # The names that torch gives to magnitudes, in the new form and the old.
        named = name.endswith(("parametrizations.weight.original0", "weight_g"))
        if named and scale.ndim >= 2 and scale.numel() == max(scale.shape):
            beside = [
                other
                for own, other in parameters.items()
                if own != name and own.rpartition(".")[0] == name.rpartition(".")[0]
            ]
            if any(o.ndim == scale.ndim and o.numel() > scale.numel() and _fits(scale, o) for o in beside):
                found.add(name)
    return found


def _fits(scale: Tensor, weight: Tensor) -> bool:
    return all(a in (1, b) for a, b in zip(scale.shape, weight.shape, strict=True))


class _PassObserver(TorchFunctionMode):
    """Mode that records parameters, saturation and the loss.

    Attributes:
        used: Names of the parameters that were used while gradients were on.
        saturated: Share of saturated outputs of each sigmoid and tanh.
        first: Name of the first function that used a parameter.
        given: Floating-point tensor that this function was given.
        chance, guessed, target_rms: See `FirstPass`.
        is_label_loss: True if a cross-entropy was called.
        problems: Mistakes that the arguments of a loss function show.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.saturated: list[float] = []
        self.first = ""
        self.given: Tensor | None = None
        self.chance = self.guessed = self.target_rms = math.nan
        self.problems: list[GraphProblem] = []
        self.is_label_loss = False
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._made: dict[int, weakref.ref[Tensor]] = {}  # what was computed with parameters

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "").rstrip("_")
        if not isinstance(result, (Tensor, tuple)):
            return result
        tensors = [t for _, t in tensors_of([args, kwargs])]
        if any(self._is_made(t) for t in tensors):
            self._made |= {id(t): weakref.ref(t) for _, t in tensors_of([result])}
        if name.startswith("__get"):
            return result
        used = {self._names[id(t)] for t in tensors if id(t) in self._names}
        if used and not self.first:
            # What the first layer is given, not what the batch holds: it may be scaled on the way.
            inputs = [t for t in tensors if t.is_floating_point() and id(t) not in self._names]
            self.given = next((t.detach().float() for t in inputs if t.layout == torch.strided), None)
        self.first = self.first or (name if used else "")
        self.used |= used if torch.is_grad_enabled() else set()
        if isinstance(result, Tensor) and result.numel():
            if name in ("sigmoid", "tanh"):
                output = result.detach().float()
                centred = output if name == "tanh" else 2 * output - 1
                self.saturated.append(float((centred.abs() > _SATURATED).float().mean()))
            elif name in _LOSSES and len(args) + len(kwargs) >= 2 and torch.is_grad_enabled():
                given = {**dict(zip(("input", "target"), args, strict=False)), **kwargs}
                self.problems += _LOSSES[name](given) if {"input", "target"} <= given.keys() else ()
            self.is_label_loss |= name == "cross_entropy"
            if name == "cross_entropy":
                classes = args[0].shape[1 if args[0].ndim > 1 else 0]
                self._compare(result, math.log(max(classes, 2)), kwargs)
            elif name == "mse_loss":
                given = {**dict(zip(("input", "target"), args, strict=False)), **kwargs}
                # The loss is symmetric, and either may be the output.
                swapped = given["target"].requires_grad and not given["input"].requires_grad
                target = given["input" if swapped else "target"]
                # Without a reduction, what marks missing targets may be left out later.
                if not self._is_made(target) and kwargs.get("reduction") != "none":
                    self.target_rms = _rms(target.detach().float())
                    self._compare(result, self.target_rms**2, kwargs)
        return result

    def _is_made(self, tensor: Tensor) -> bool:
        """Return True for a tensor that was computed with parameters."""
        known = self._made.get(id(tensor))
        return tensor.requires_grad or id(tensor) in self._names or (known is not None and known() is tensor)

    def _compare(self, result: Tensor, chance: float, kwargs: Mapping[str, Any]) -> None:
        """Record an unweighted mean loss and its chance."""
        if kwargs.get("reduction", "mean") == "sum" or kwargs.get("weight") is not None:
            return
        self.chance, self.guessed = chance, float(result.detach().float().mean())


def _judge_cross_entropy(given: Mapping[str, Any]) -> Iterator[GraphProblem]:
    """Find a cross-entropy of probabilities, however they were made."""
    x = given["input"].detach()
    if x.ndim < 2 or x.shape[1] < 2 or not _is_distribution(x, 1):
        return
    text = (
        f"cross_entropy gets probabilities: its {x.shape[1]} inputs are between 0 and 1, and add up "
        "to 1 in each sample. It "
        "expects logits, and has a softmax of its own."
    )
    yield GraphProblem(Problem.PROBABILITIES, text)


def _judge_divergence(given: Mapping[str, Any]) -> Iterator[GraphProblem]:
    """Find a kl_div of what are not log-probabilities."""
    x, target = given["input"].detach(), given["target"].detach()
    if not x.ndim or not x.numel() or not x.isfinite().any():
        return
    largest = float(x[x.isfinite()].max())
    if any(_is_distribution(x, dim) for dim in {x.ndim - 1, min(1, x.ndim - 1)}):
        what = "probabilities (between 0 and 1, and they add up to 1)"
    elif largest > _SUMS_TO_ONE:
        what = f"values up to {number(largest)}"
    elif given.get("log_target", False) and any(
        _is_distribution(target, dim) for dim in {target.ndim - 1, min(1, target.ndim - 1)}
    ):
        yield GraphProblem(
            Problem.DIVERGENCE, "kl_div gets log_target=True, but its second argument holds probabilities."
        )
        return
    else:
        return
    text = f"kl_div expects log-probabilities as its first argument, which are at most 0, but it gets {what}."
    yield GraphProblem(Problem.DIVERGENCE, text)


#: Functions that judge the arguments of a loss function.
_LOSSES: dict[str, Callable[[Mapping[str, Any]], Iterator[GraphProblem]]] = {
    "cross_entropy": _judge_cross_entropy,
    "kl_div": _judge_divergence,
}


def _is_distribution(x: Tensor, dim: int) -> bool:
    """Return True if values are between 0 and 1 and add up to 1."""
    if not x.is_floating_point() or x.numel() <= x.shape[dim] or x.shape[dim] < 2:
        return False
    sums = x.float().sum(dim)
    return bool(((x >= 0) & (x <= 1 + _SUMS_TO_ONE)).all() and ((sums - 1).abs() < _SUMS_TO_ONE).all())


def _rms(x: Tensor) -> float:
    x = x[x.isfinite()]
    return float(x.double().square().mean().sqrt()) if x.numel() else math.nan


def _log10(gradient: Tensor | None) -> float:
    norm = 0.0 if gradient is None else float(gradient.detach().double().norm())
    return math.log10(norm) if 0 < norm < math.inf else (-math.inf if norm == 0 else norm)
