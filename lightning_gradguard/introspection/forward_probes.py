"""Probes of forward passes: which parameters take part, and what sharded parameters are when gathered.

Both put a hook on every module of the program. The hook is removed by `close`, or when the probe is garbage-collected.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class ForwardUsage:
    """Probe of the parameters that take part in forward passes.

    They are those of every module that is called. This distinguishes a module that the loss was cut off from, from one
    that is not used at all.

    Args:
        idle: Install no hook and observe nothing: for compiled modules, which a hook would recompile.
    """

    def __init__(self, *, idle: bool = False) -> None:
        ids: set[int] = set()
        self.ids = ids

        def record(module: nn.Module, args: object) -> None:
            if not torch.compiler.is_compiling():
                ids.update(id(p) for p in module._parameters.values() if p is not None)

        # The hook holds the set and not the probe, so that the probe can be garbage-collected.
        self._close = weakref.finalize(
            self, _nothing if idle else register_module_forward_pre_hook(record).remove
        )

    def close(self) -> frozenset[int]:
        """Remove the hook and return the ids of the parameters seen."""
        self._close()
        return frozenset(self.ids)


class UnshardedParameterProbe:
    """Probe of the whole parameters that a sharded module holds while it is called.

    The hook runs when a module returns, but before the module's own hooks, which reshard its parameters.

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
        """Remove the hook and return the whole parameters, by the id of their shards.

        Call it after the backward pass, when the modules hold their shards again.
        """
        self._close()
        found = {}
        for (_, name), (module, whole) in self._seen.items():
            held = module._parameters.get(name)
            if held is not None:
                found[id(held)] = whole
        self._seen.clear()
        return found


def _nothing() -> None:
    """Stand in for the removal of a hook that was not installed."""
