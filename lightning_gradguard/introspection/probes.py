"""Probe forward passes, and gradients over a sequence.

`ForwardUsage`, `UnshardedParameterProbe` and `SequenceGradientProbe` observe the training itself, by hooks on every
module of the program, and change nothing. `SandboxedSequenceProbe` observes a module in a `sandbox`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_gradguard.introspection.graph_problems import GraphProblem

#: Fewest steps of a sequence, or calls of one module in one pass, for which a tilt over time is measured.
MIN_TIMES = 10


class ForwardUsage:
    """Probe of the parameters used in forward passes, and of the size of what the first of them is given.

    They are those of every module that is called. This distinguishes a module that the loss was cut off from, from one
    that is not used at all.

    Args:
        idle: Install no hook and observe nothing: for compiled modules, which a hook would recompile.

    Attributes:
        observes: False if it is idle.
        is_loss_masked: True if the first loss multiplies log-probabilities with a mask; False until that is known.
        tiny_input: Mistake that the first layer's input shows, once that was looked at.
    """

    def __init__(self, *, idle: bool = False) -> None:
        self.is_loss_masked = False
        self.tiny_input: GraphProblem | None = None
        ids: set[int] = set()
        inputs: list[tuple[Tensor | None, list[int]]] = []
        self.ids, self.observes, self._inputs = ids, not idle, inputs

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.compiler.is_compiling():
                return
            own = [id(p) for p in module._parameters.values() if p is not None]
            if own and not inputs and torch.is_grad_enabled():
                inputs.append((_size_of(module, args), own))
            ids.update(own)

        # The hook holds the set and not the probe, so that the probe can be garbage-collected.
        self._close = weakref.finalize(
            self, _nothing if idle else register_module_forward_pre_hook(record).remove
        )

    @property
    def first_input(self) -> tuple[Tensor | None, frozenset[int]]:
        """Norm of a row of what the first layer was given, float32 [] or None, and ids of its parameters."""
        size, own = self._inputs[0] if self._inputs else (None, [])
        return size, frozenset(own)

    def close(self) -> frozenset[int]:
        """Remove the hook; return ids of used parameters."""
        self._close()
        return frozenset(self.ids)


@torch.no_grad()
def _size_of(module: nn.Module, args: tuple[Any, ...]) -> Tensor | None:
    """Return the usual norm of as many inputs as a layer weighs together, beside which its biases are seen.

    None for a layer without weight or bias, for whole numbers, and where the input is of an unusual kind.
    """
    own = [p for p in module._parameters.values() if p is not None]
    weight = next((p for p in own if p.ndim > 1), None)
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if weight is None or first is None or not any(p.ndim == 1 for p in own):
        return None
    if not first.is_floating_point() or not first.numel() or type(first) is not Tensor:
        return None
    return (
        None
        if not has_storage(first)
        else first.detach().float().square().mean().mul(weight.numel() / weight.shape[0]).sqrt()
    )


def has_storage(tensor: Tensor) -> bool:
    """Return True for a dense tensor with numbers, outside of the transforms of `torch.func`.

    Inside of them a tensor has no storage of its own, and does not outlive the transform.
    """
    if tensor.is_nested or tensor.is_meta:
        return False
    try:
        tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return False
    return tensor.layout == torch.strided


class UnshardedParameterProbe:
    """Probe of the whole parameters of sharded modules.

    A sharded module holds them while it is called. The hook runs when a module returns, but before the module's own
    hooks, which reshard its parameters.

    Args:
        idle: Install no hook and observe nothing: for compiled modules, which a hook would recompile.
    """

    def __init__(self, *, idle: bool = False) -> None:
        # By module and attribute: the module, and the parameter it was called with.
        seen: dict[tuple[int, str], tuple[nn.Module, Tensor]] = {}
        self._seen = seen

        def record(module: nn.Module, args: object, output: object) -> None:
            # A pass without gradients may compute with other parameters.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        seen[id(module), name] = module, parameter

        self._close = weakref.finalize(
            self, _nothing if idle else register_module_forward_hook(record).remove
        )

    @property
    def seen(self) -> bool:
        """True once a forward pass was observed."""
        return bool(self._seen)

    def close(self) -> dict[int, Tensor]:
        """Remove the hook; return parameters by shard id.

        Call it after the backward pass, when the modules hold their shards again.
        """
        self._close()
        found = {}
        for (_, name), (module, whole) in self._seen.items():
            held = dict(module._parameters.items()).get(name)  # a scripted module's mapping has no get
            if held is not None:
                found[id(held)] = whole
        self._seen.clear()
        return found


class InputProbe:
    """Probe of layers whose input is exactly zero.

    Nothing is read on the host.

    Args:
        parameters: Parameters of the layers by name.
        device: Device of the results.
        whole: Their whole parameters by name, where they are sharded.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        device: torch.device,
        whole: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._names = {id(p): name for own in (parameters, whole or {}) for name, p in own.items()}
        self._device = device
        fed: dict[str, Tensor] = {}
        self._fed, names = fed, self._names

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return
            own = [names[id(p)] for p in module._parameters.values() if id(p) in names]
            inputs = [x for x in args if isinstance(x, Tensor) and x.numel()] if own else []
            for name in own:
                for x in inputs:
                    if type(x) is Tensor and not has_storage(x):
                        # Not known: it counts as fed.
                        fed[name] = torch.ones((), dtype=torch.bool, device=device)
                        continue
                    held = x.to_local() if hasattr(x, "to_local") else x
                    live = (held.detach() != 0).any().to(device)
                    fed[name] = fed[name] | live if name in fed else live

        self._close = weakref.finalize(self, register_module_forward_pre_hook(record).remove)

    def close(self) -> dict[str, Tensor]:
        """Remove the hook; return by name if an input was not zero, bool [] each.

        Layers that were not called, or not with a tensor, are left out.
        """
        self._close()
        return self._fed


class SequenceGradientProbe:
    """Probe of gradients over a sequence, in training.

    Observes one forward and backward pass without a read on the host, and changes nothing in it. Measures a fused
    recurrent layer by the gradient of its input at each step, and a module that is called once a step by the gradient
    of what each call returned.

    Args:
        parameters: Ids of the parameters that are applied again and again.
    """

    def __init__(self, parameters: frozenset[int]) -> None:
        self._parameters = parameters
        self._norms: Tensor | None = None  # of a fused layer
        self._calls: dict[int, list[Tensor | None]] = {}  # id of a module -> norm for each call
        self._over = False
        self._hooks = [
            register_module_forward_pre_hook(self._before),  # type: ignore[arg-type]
            register_module_forward_hook(self._after),
        ]

    def close(self) -> Tensor | None:
        """Remove the hooks; return the time tilt, decades.

        Float32 []: log10 of the gradient at the last tenth of the sequence over that at the first. None without a
        sequence of ten steps.
        """
        for hook in self._hooks:
            hook.remove()
        norms = self._norms
        for calls in self._calls.values():
            known = [n for n in calls if n is not None]
            if norms is None and len(known) >= MIN_TIMES:
                norms = torch.stack(known)
        return None if norms is None or len(norms) < MIN_TIMES else _time_tilt(norms)

    def _is_observed(self, module: nn.Module) -> bool:
        return any(id(p) in self._parameters for p in module._parameters.values())

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if torch.compiler.is_compiling() or self._over or self._norms is not None:
            return None
        if not (isinstance(module, nn.RNNBase) and torch.is_grad_enabled() and self._is_observed(module)):
            return None

        def keep(norms: Tensor) -> None:
            self._norms = norms

        return _observe_input(module, args, keep)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # After the first backward pass another micro-batch begins, which is another sequence.
        if torch.compiler.is_compiling() or self._over:
            return
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(module, nn.RNNBase) or not isinstance(result, Tensor) or not result.requires_grad:
            return
        if not self._is_observed(module):
            return
        calls = self._calls.setdefault(id(module), [])
        place = len(calls)
        calls.append(None)

        def keep(gradient: Tensor) -> None:
            self._over = True
            calls[place] = torch.linalg.vector_norm(gradient.detach().float())

        result.register_hook(keep)  # type: ignore[no-untyped-call]


class SandboxedSequenceProbe:
    """Probe of gradients over a sandboxed sequence.

    It puts hooks on the module. It measures the gradient of a layer's input at each step, and of a cell's input at each
    call.

    Args:
        module: What is run.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms: list[Tensor] = []
        self._steps: dict[nn.Module, dict[int, Tensor]] = {}  # cell -> number of the call -> norm
        self._calls: Counter[nn.Module] = Counter()
        for layer in module.modules():
            if isinstance(layer, nn.RNNBase):
                layer.register_forward_pre_hook(self._before)
            elif isinstance(layer, nn.RNNCellBase):
                layer.register_forward_pre_hook(self._before_cell)

    def take(self) -> float | None:
        """Return the time tilt since last asked, decades.

        None without a sequence of ten steps.
        """
        calls = [torch.stack([own[i] for i in sorted(own)]) for own in self._steps.values()]
        norms = next((n for n in (*self._norms, *calls) if len(n) >= MIN_TIMES), None)
        self._norms, self._steps = [], {}
        self._calls.clear()
        return None if norms is None else float(_time_tilt(norms))

    def _before(self, layer: nn.RNNBase, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return _observe_input(layer, args, self._norms.append)

    def _before_cell(self, cell: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (args and isinstance(args[0], Tensor)):
            return None
        x = _differentiable(args[0]) * 1  # a tensor for each call, where all steps take the same input
        number = self._calls[cell]
        self._calls[cell] += 1

        def keep(gradient: Tensor) -> None:
            self._steps.setdefault(cell, {})[number] = gradient.detach().float().norm()

        x.register_hook(keep)  # type: ignore[no-untyped-call]
        return (x, *args[1:])


def _observe_input(
    layer: nn.RNNBase, args: tuple[Any, ...], keep: Callable[[Tensor], None]
) -> tuple[Any, ...] | None:
    """Pass norms of an input's gradient to ``keep``.

    There is one norm for each of T steps, float32 [T].

    Returns:
        Arguments to call the layer with; None if its input is no batch of sequences.
    """
    if not (args and isinstance(args[0], Tensor) and args[0].ndim == 3):
        return None
    x, time = _differentiable(args[0]), 1 if layer.batch_first else 0

    def hook(gradient: Tensor) -> None:
        keep(torch.linalg.vector_norm(gradient.detach().float().transpose(0, time).flatten(1), dim=1))

    x.register_hook(hook)  # type: ignore[no-untyped-call]
    return (x, *args[1:])


def _differentiable(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_(True)


def _time_tilt(norms: Tensor) -> Tensor:
    """Return log10 of last over first tenth, float32 [].

    Steps at the end that get nothing, such as padding, do not count.
    """
    tenth, tiny = max(1, len(norms) // 10), torch.finfo(torch.float32).tiny
    places = torch.arange(len(norms), device=norms.device)
    end = torch.where(norms > 0, places + 1, tenth).amax()
    last = torch.where((places < end) & (places >= end - tenth), norms, 0.0).sum() / tenth
    return torch.log10(last.clamp(min=tiny) / norms[:tenth].mean().clamp(min=tiny))


def _nothing() -> None:
    pass
