"""The whole parameters that sharded modules compute with (FSDP2): the autograd graph knows these alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

#: By module and attribute: the module, and the parameter it was called with.
_Seen = dict[tuple[int, str], tuple[nn.Module, Tensor]]


class WholeParameters:
    """Looks at a forward pass: a module holds its whole parameters while it is called, and its shards afterwards.

    The hook is called when a module is done, but before the module's own hooks, which take its whole parameters away.
    It is removed by `close`, or when the object is forgotten.

    Args:
        idle: Sees nothing, and hooks nothing: for compiled modules, which a hook would have compiled anew.
    """

    def __init__(self, *, idle: bool = False) -> None:
        self._seen: _Seen = {}
        hook = None if idle else register_module_forward_hook(_recorder(self._seen))
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


def _recorder(seen: _Seen) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that keeps only the table alive, so that the object can be forgotten."""

    def record(module: nn.Module, args: Any, output: Any) -> None:
        # A pass without gradients may compute with other parameters.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    seen[id(module), name] = module, parameter

    return record
