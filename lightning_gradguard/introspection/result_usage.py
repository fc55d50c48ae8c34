"""Follow what is computed with some parameters to the loss.

A parameter without a path from the loss is cut off if the loss was computed with its result (detached, rounded by
NumPy, reduced to an index), and idle if nothing that the loss depends on was.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode

#: Functions that carry numbers to the host, where they can no longer be followed.
_READS = frozenset({
    "item", "tolist", "numpy", "data_ptr", "is_nonzero", "equal", "allclose", "to_dlpack", "__dlpack__", "__array__",
    "__float__", "__int__", "__bool__", "__index__", "__complex__", "__len__", "__iter__",
})  # fmt: skip
#: Functions whose result tells only if the numbers are in order.
_VALIDITY = frozenset({"isnan", "isinf", "isfinite", "isposinf", "isneginf"})
#: Package whose branches on numbers only check its arguments.
_CHECKING = "torch.distributions"


class ResultUsage:
    """Probe of the use that a pass makes of some parameters' results.

    It follows them through functions of torch, in the outermost call of a module, and between `begin` and `end`
    everywhere. What leaves the outermost call is taken as used, unless it is followed up to a loss.

    Args:
        parameters: The parameters.
        trained: Parameters of the layers that are trained.
    """

    def __init__(self, parameters: Mapping[str, Tensor], trained: Iterable[Tensor] = ()) -> None:
        self._names = tuple(parameters)
        sources = {id(p): 1 << k for k, p in enumerate(parameters.values())}
        self._mode = _Follower(sources, frozenset(map(id, trained)) - sources.keys())
        self._calls = 0
        self._entered = self._followed_to_loss = False
        self._returned = 0
        before = register_module_forward_pre_hook(_method(self, "_enter"))
        after = register_module_forward_hook(_method(self, "_leave"), always_call=True)
        self._remove = weakref.finalize(self, _remove_all, [before, after])

    @property
    def has_observed(self) -> bool:
        """True once a pass was observed."""
        return self._followed_to_loss or self._mode.calls > 0

    def begin(self) -> None:
        """Follow everything from here on."""
        if not self._entered:
            self._mode.active = self._entered = True
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self, loss: Tensor) -> None:
        """Stop following, at a loss."""
        if self._entered:
            self._followed_to_loss = True
            self._mode.used |= self._mode.mask_of(loss)
            self._mode.active = False

    def leave(self) -> None:
        """Undo `begin`."""
        if self._entered and self._is_innermost():
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._entered = False
        self._mode.active = False
        if self._followed_to_loss:  # nothing more is computed from what this pass made
            self._mode.clear()

    def close(self) -> frozenset[str]:
        """Remove all hooks.

        Returns:
            The parameters whose result was not used, or only as a target: it was computed without gradients alone, and
            no layer that is trained was given it.
        """
        self.leave()
        self._remove()
        used = self._mode.used if self._followed_to_loss else self._mode.used | self._returned
        if self._followed_to_loss:
            used &= self._mode.graded | self._mode.fed
        self._mode.clear()
        return frozenset(name for k, name in enumerate(self._names) if not used >> k & 1)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self._calls += 1
        if self._calls == 1 and not self._entered:
            self._mode.active = True
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self._calls:
            return
        self._calls -= 1
        if self._calls:
            return
        if not self._entered and self._is_innermost():
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode.active = False
        self._mode.calls += 1
        # What is alive now was returned, or is kept somewhere.
        self._returned |= self._mode.alive()

    def _is_innermost(self) -> bool:
        """Return True if no mode of the user's was entered since, so that this one may be left."""
        return _get_current_function_mode() is self._mode  # type: ignore[no-untyped-call]


class _Follower(TorchFunctionMode):
    """Mode that marks what is computed with a parameter."""

    def __init__(self, sources: Mapping[int, int], trained: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.active = False
        self.used = self.calls = self.graded = self.fed = 0
        self._sources, self._trained = sources, trained
        self._marks: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._storages: dict[
            int, tuple[Any, int]
        ] = {}  # the storage is held so that its address is not reused

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.active and not torch.compiler.is_compiling():
            try:
                self._follow(getattr(func, "__name__", ""), args, kwargs, result)
            except Exception:  # a tensor of a kind that has no address or mark
                self.active, self.used, self.graded = (
                    False,
                    -1,
                    -1,
                )  # every result counts as used, so that nothing is accused
        return result

    def mask_of(self, tensor: Tensor) -> int:
        """Return the bits of the parameters that a tensor was computed with."""
        known = self._marks.get(id(tensor))
        mask = known[1] if known is not None and known[0]() is tensor else 0
        if id(tensor) in self._sources:
            return mask | self._sources[id(tensor)]
        address = _address(tensor)
        return mask | (self._storages[address][1] if address in self._storages else 0)

    def alive(self) -> int:
        """Return the bits of all marked tensors that are alive."""
        mask = 0
        for reference, own in list(self._marks.values()):
            mask |= own if reference() is not None else 0
        return mask

    def clear(self) -> None:
        """Forget all marks."""
        self._marks.clear()
        self._storages.clear()

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        mask, made_of, weights, is_hidden, feeds = 0, 0, 0, False, False
        for tensor in _tensors((args, kwargs)):
            own = self.mask_of(tensor)
            mask |= own
            made_of |= 0 if id(tensor) in self._sources else own
            weights |= self._sources.get(id(tensor), 0)
            feeds |= id(tensor) in self._trained
            is_hidden |= bool(own) and _address(tensor) is None
        if not mask or name in _VALIDITY:
            return
        # Not a weight itself, which an average of weights takes together with those that are trained.
        self.fed |= made_of if feeds else 0
        if (name in _READS and not (name == "__bool__" and _is_check())) or is_hidden:
            self.used |= mask
        made = list(_tensors(result))
        in_place = name.endswith("_") and not name.endswith("__")
        if args and isinstance(args[0], Tensor) and (in_place or name == "__setitem__"):
            made.append(args[0])
        made += _tensors(kwargs.get("out"))
        for tensor in made:
            if id(tensor) not in self._sources:
                self._mark(tensor, mask)
                self.graded |= weights if tensor.requires_grad else 0

    def _mark(self, tensor: Tensor, mask: int) -> None:
        mask |= self.mask_of(tensor)
        self._marks[id(tensor)] = weakref.ref(tensor), mask
        address = _address(tensor)
        if address:
            self._storages[address] = tensor.untyped_storage(), mask


def _is_check() -> bool:
    """Return True if a function that is followed was called to check the arguments of a distribution."""
    caller = sys._getframe(3)  # of `_follow`, of `__torch_function__`
    return str(caller.f_globals.get("__name__", "")).startswith(_CHECKING)


def _address(tensor: Tensor) -> int | None:
    """Return where a tensor's numbers lie, 0 if it has none; None if they cannot be followed."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or inside a function transform
        return None


def _tensors(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry, depth - 1)
    elif depth and isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry, depth - 1)


def _method(probe: ResultUsage, name: str) -> Callable[..., None]:
    """Return a method that does not keep its object alive."""
    held = weakref.ref(probe)

    def call(*args: Any) -> None:
        own = held()
        if own is not None:
            getattr(own, name)(*args)

    return call


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
