"""Looks into a forward pass now and then, by hooks that are there for that pass alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

#: Calls of one module in one pass, or steps of a sequence, below which nothing is said of time.
MIN_TIMES = 10


class ForwardUsage:
    """Which parameters take part in the first forward passes: those of every module that is called.

    Distinguishes a module that the loss was cut off from, from one that is not used at all. The hook is removed
    by `close`, or when the object is forgotten.

    Args:
        idle: Sees nothing, and hooks nothing: for compiled modules, which a hook would have compiled anew.
    """

    def __init__(self, *, idle: bool = False) -> None:
        self.ids: set[int] = set()
        hook: RemovableHandle | None = None if idle else register_module_forward_pre_hook(_recorder(self.ids))
        self._finalizer = weakref.finalize(self, (lambda: None) if hook is None else hook.remove)

    def close(self) -> frozenset[int]:
        """Stops looking; ids of the parameters seen, empty if no module was called."""
        self._finalizer()
        return frozenset(self.ids)


class SequenceGradientProbe:
    """How gradients fall from the last to the first steps of a sequence, in one forward and backward pass.

    Of a fused recurrent layer it is the gradient with respect to its input, step by step; of a module that is called
    again and again, the gradient with respect to what each call returned. Nothing is changed in the training.

    Args:
        parameters: Ids of the parameters that are applied again and again.
    """

    def __init__(self, parameters: frozenset[int]) -> None:
        self._parameters = parameters
        self._profile: Tensor | None = None
        self._calls: dict[int, list[Tensor | None]] = {}
        self._over = False
        self._hooks = [
            register_module_forward_pre_hook(self._before),  # type: ignore[arg-type]
            register_module_forward_hook(self._after),
        ]

    def close(self) -> Tensor | None:
        """Stops looking; log10 of the mean gradient norm of the last tenth over the first tenth, [] or None."""
        for hook in self._hooks:
            hook.remove()
        profile = self._profile
        for calls in self._calls.values():
            norms = [n for n in calls if n is not None]
            if profile is None and len(norms) >= MIN_TIMES:
                profile = torch.stack(norms)
        if profile is None or len(profile) < MIN_TIMES:
            return None
        tenth = max(1, len(profile) // 10)
        tiny = torch.finfo(torch.float32).tiny
        first, last = profile[:tenth].mean().clamp(min=tiny), profile[-tenth:].mean().clamp(min=tiny)
        return torch.log10(last / first)

    def _is_watched(self, module: nn.Module) -> bool:
        return any(id(p) in self._parameters for p in module._parameters.values())

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if torch.compiler.is_compiling() or self._over:
            return None
        if not (
            isinstance(module, nn.RNNBase)
            and args
            and isinstance(args[0], Tensor)
            and torch.is_grad_enabled()
        ):
            return None
        sequence = args[0]
        if sequence.ndim != 3 or self._profile is not None or not self._is_watched(module):
            return None
        if not sequence.requires_grad:
            sequence = sequence.detach().requires_grad_(True)
        time = 1 if module.batch_first else 0

        def keep(gradient: Tensor) -> None:
            self._profile = torch.linalg.vector_norm(
                gradient.detach().float().transpose(0, time).flatten(1), dim=1
            )

        sequence.register_hook(keep)  # type: ignore[no-untyped-call]
        return (sequence, *args[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # After the first backward pass another micro-batch begins, which is another sequence.
        if torch.compiler.is_compiling() or self._over:
            return
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(module, nn.RNNBase) or not isinstance(result, Tensor) or not result.requires_grad:
            return
        if not self._is_watched(module):
            return
        calls = self._calls.setdefault(id(module), [])
        place = len(calls)
        calls.append(None)

        def keep(gradient: Tensor) -> None:
            self._over = True
            calls[place] = torch.linalg.vector_norm(gradient.detach().float())

        result.register_hook(keep)  # type: ignore[no-untyped-call]


def _recorder(ids: set[int]) -> Callable[[nn.Module, Any], None]:
    """A hook that keeps only the set alive, so that the object can be forgotten."""

    def record(module: nn.Module, args: Any) -> None:
        # Nothing of this is to be compiled into the model.
        if not torch.compiler.is_compiling():
            ids.update(id(p) for p in module._parameters.values() if p is not None)

    return record


#: By module and attribute: the module, and the parameter it was called with.
_Seen = dict[tuple[int, str], tuple[nn.Module, Tensor]]


class UnshardedParameterProbe:
    """Looks at a forward pass: a module holds its whole parameters while it is called, and its shards afterwards.

    The hook is called when a module is done, but before the module's own hooks, which take its whole parameters away.
    It is removed by `close`, or when the object is forgotten.

    Args:
        idle: Sees nothing, and hooks nothing: for compiled modules, which a hook would have compiled anew.
    """

    def __init__(self, *, idle: bool = False) -> None:
        self._seen: _Seen = {}
        hook = None if idle else register_module_forward_hook(_whole_recorder(self._seen))
        self._finalizer = weakref.finalize(self, (lambda: None) if hook is None else hook.remove)

    @property
    def seen(self) -> bool:
        """Whether a pass was seen."""
        return bool(self._seen)

    def close(self) -> dict[int, Tensor]:
        """Stops looking; what was computed with, by the id of the parameter that the module holds now.

        To be called after the backward pass, when modules have got their shards back.
        """
        self._finalizer()
        found = {}
        for (_, name), (module, whole) in self._seen.items():
            held = module._parameters.get(name)
            if held is not None:
                found[id(held)] = whole
        self._seen.clear()
        return found


def _whole_recorder(seen: _Seen) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that keeps only the table alive, so that the object can be forgotten."""

    def record(module: nn.Module, args: Any, output: Any) -> None:
        # A pass without gradients may compute with other parameters.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    seen[id(module), name] = module, parameter

    return record
