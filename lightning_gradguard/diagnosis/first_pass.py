"""One forward and backward pass over one batch, and what it shows of a model that has not been trained yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradguard.diagnosis.trials.profile import depth_tilt, layer_profile
from lightning_gradguard.introspection.autograd_graph import GraphSummary, summarize_graph
from lightning_gradguard.introspection.batch import tensors_of
from lightning_gradguard.introspection.sandbox import sandbox

#: Output of an activation, as a part of its range, beyond which its slope is below a twenty-fifth of the steepest.
_FLAT = 0.99
_NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})


@dataclass(frozen=True)
class FirstLook:
    """What was measured; plain numbers.

    Attributes:
        loss: Of the batch.
        chance: What a guess costs under the loss that was called: log of the number of classes under a cross-entropy,
            the mean square of the targets under a squared loss; NaN under any other.
        guessed: Value of that call.
        input_rms: Root mean square of the first floating-point tensor of the batch; NaN without one.
        target_rms: The same of the targets of a squared loss.
        normalised: Whether the first parameters that are used are a normalisation's.
        saturated: Share of the outputs of each sigmoid and tanh that lie where it is flat, by its turn.
        dead: Share of a layer's rows whose gradient is exactly zero, by the name of its weight.
        unreached: Trainable weights of layers that were used while gradients were on, and to which no path leads from
            the loss. A bias alone may well have none, such as that of an energy whose slope is what is learned.
        tilt: Depth tilt, decades; None with fewer than four layers.
        names: Parameters in depth order, input first; so are the next three.
        shapes: Their shapes.
        gradients_log10: log10 of the gradients' norms, -inf for none.
        weight_norms: Their norms.
        graph_summary: What the graph says.
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
    tilt: float | None = None
    names: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    gradients_log10: tuple[float, ...] = ()
    weight_norms: tuple[float, ...] = ()
    graph_summary: GraphSummary | None = None

    @property
    def finite(self) -> bool:
        """Whether the loss and all gradients are."""
        return math.isfinite(self.loss) and not any(
            g == math.inf or math.isnan(g) for g in self.gradients_log10
        )


def look(module: nn.Module, batch: Any, loss_of: Callable[[Any], Tensor], scale: float = 1.0) -> FirstLook:
    """Runs one forward and backward pass on copies; module, batch and random numbers are as they were afterwards.

    Args:
        module: What is looked at.
        batch: One batch of its training data.
        loss_of: Batch to scalar loss.
        scale: Of a gradient scaler: without it the gradients of half precision would be lost.

    Raises:
        Exception: Whatever the model raises.
    """
    with sandbox(module) as copy, torch.enable_grad():
        watcher = _Watcher(module)
        with watcher:
            loss = loss_of(copy(batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be a tensor with one element, got {got}")
        parameters = dict(module.named_parameters())
        graph_summary = summarize_graph(loss, parameters)
        if loss.grad_fn is not None:
            (loss * scale).backward()  # type: ignore[no-untyped-call]
        names = tuple(graph_summary.names[i] for i in graph_summary.order)
        layers = [n for n in names if parameters[n].ndim >= 2 and n not in graph_summary.embeddings]
        return FirstLook(
            loss=float(loss.detach()),
            chance=watcher.chance,
            guessed=watcher.guessed,
            input_rms=math.nan if watcher.given is None else _rms(watcher.given),
            target_rms=watcher.target_rms,
            normalised=watcher.first in _NORMS,
            saturated=tuple(watcher.saturated),
            dead=_dead_shares(parameters, layers),
            unreached=tuple(
                n for n in names if n in graph_summary.missing & watcher.used and parameters[n].ndim >= 2
            ),
            tilt=depth_tilt(layer_profile(parameters, layers)),
            names=names,
            shapes=tuple(tuple(parameters[n].shape) for n in names),
            gradients_log10=tuple(_log10(parameters[n].grad) for n in names),
            weight_norms=tuple(float(parameters[n].detach().float().norm()) for n in names),
            graph_summary=graph_summary,
        )


class _Watcher(TorchFunctionMode):
    """Sees which parameters are used, which activations are flat, and which loss is called."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.saturated: list[float] = []
        self.first = ""
        self.given: Tensor | None = None
        self.chance = self.guessed = self.target_rms = math.nan
        self._names = {id(p): name for name, p in module.named_parameters()}

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
        if not isinstance(result, (Tensor, tuple)) or name.startswith("__get"):
            return result
        used = {self._names[id(t)] for _, t in tensors_of([args, kwargs]) if id(t) in self._names}
        if used and not self.first:
            # What the first layer is given, not what the batch holds: it may be scaled on the way.
            floats = [
                t for _, t in tensors_of([args, kwargs]) if t.is_floating_point() and id(t) not in self._names
            ]
            self.given = next((t.detach().float() for t in floats if t.layout == torch.strided), None)
        self.first = self.first or (name if used else "")
        self.used |= used if torch.is_grad_enabled() else set()
        if isinstance(result, Tensor) and result.numel():
            if name in ("sigmoid", "tanh"):
                self._measure_activation(name, result.detach())
            elif name == "cross_entropy":
                self._compare(
                    result, math.log(max(args[0].shape[1 if args[0].ndim > 1 else 0], 2)), args, kwargs
                )
            elif name == "mse_loss":
                target = (args[1] if len(args) > 1 else kwargs["target"]).detach().float()
                self.target_rms = _rms(target)
                self._compare(result, self.target_rms**2, args, kwargs)
        return result

    def _measure_activation(self, name: str, output: Tensor) -> None:
        centred = output.float() if name == "tanh" else 2 * output.float() - 1
        self.saturated.append(float((centred.abs() > _FLAT).float().mean()))

    def _compare(self, result: Tensor, chance: float, args: Any, kwargs: Mapping[str, Any]) -> None:
        if kwargs.get("reduction", "mean") == "sum" or kwargs.get("weight") is not None:
            return
        self.chance, self.guessed = chance, float(result.detach().float().mean())


def _dead_shares(parameters: Mapping[str, Tensor], layers: list[str]) -> dict[str, float]:
    gradients = {name: parameters[name].grad for name in layers}
    return {
        name: float((gradient.flatten(1) == 0).all(1).float().mean())
        for name, gradient in gradients.items()
        if gradient is not None and len(gradient)
    }


def _rms(x: Tensor) -> float:
    x = x[x.isfinite()]
    return float(x.double().square().mean().sqrt()) if x.numel() else math.nan


def _log10(gradient: Tensor | None) -> float:
    norm = 0.0 if gradient is None else float(gradient.detach().double().norm())
    return math.log10(norm) if 0 < norm < math.inf else (-math.inf if norm == 0 else norm)
