"""Trace the operation that made the first NaN.

`ForwardTrace` observes every function of torch in a forward pass, `BackwardTrace` every node of an autograd graph.
`exact_size` tells a number that is merely too large for its dtype from one that has no finite value.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradguard.introspection.batch import is_finite, map_tensors, nonfinite_kind, tensors_of
from lightning_gradguard.introspection.operations import kind_of, operation_of

#: Functions that return uninitialized memory, to be filled by what comes next.
_UNINITIALIZED = frozenset(
    {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
)
#: Operators as one writes them, by the name of their function.
_SIGNS = {
    **dict.fromkeys(("div", "true_divide", "truediv", "rdiv", "rtruediv"), "/"),
    **dict.fromkeys(("pow", "rpow"), "**"),
    **dict.fromkeys(("mul", "rmul"), "*"),
    **dict.fromkeys(("add", "radd"), "+"),
    **dict.fromkeys(("sub", "rsub"), "-"),
    **{"matmul": "@", "setitem": "[...] =", "getitem": "[...]"},
}
#: Operations whose gradient is a sum, product or copy of what they are given, so that an Inf out of it is an overflow.
_ARITHMETIC = frozenset(
    {"Mul", "Add", "Sub", "Neg", "Sum", "Expand", "Repeat", "ToCopy", "Cat", "Index", "Gather"}
)
#: Packages whose lines are skipped.
_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_gradguard")
_FRAME = re.compile(r'File "(.+?)", line (\d+)')
_CONTEXTLIB = importlib.util.find_spec("contextlib").origin  # type: ignore[union-attr]


@dataclass(frozen=True)
class NonFiniteSource:
    """Place of the first NaN or Inf.

    Attributes:
        operation: Function that computed it; empty where only the module is known.
        module: Name of the innermost module that ran it; empty for the training step itself.
        layer: Class of the module.
        line: Line of the user's code, such as ``model.py:42``; empty if unknown.
        values: What came out: "NaN", "Inf", or "NaN and Inf".
        call: How many functions had been called before.
        intended: The infinities were asked for, such as those of a mask.
        given: The operation was given infinities that were intended, and made NaN of them.
        outside: It was not computed in this pass: a tensor from elsewhere held it already.
        path: Place of that tensor in the batch; empty if it is none of the batch's.
        dtype: The result's, such as "float16".
        overflow: Largest magnitude of the exact result, where that is merely too large for the dtype; else 0.
    """

    operation: str
    module: str
    layer: str
    line: str
    values: str
    call: int
    intended: bool = False
    given: bool = False
    outside: bool = False
    path: str = ""
    dtype: str = ""
    overflow: float = 0.0


class ForwardTrace(TorchFunctionMode):
    """Mode that observes every function of a pass.

    Use it in a `sandbox`, for it puts hooks on the modules.

    A NaN or Inf that disappears again does not count, such as the infinities of an attention mask after its softmax:
    `source_of` follows the loss back to the source that it descends from.

    Args:
        module: The module whose forward pass, or training step, is observed.
        batch: The batch that it runs on.

    Attributes:
        owners: Node of the autograd graph to name and class of the module that made it.
        first_use: Call in which a parameter was used first; -1 if none was.
        last_use: Call in which a parameter was used last; -1 if none was.
        last_sequence: Sequence number of the node which that call made.
    """

    def __init__(self, module: nn.Module, batch: Any) -> None:
        super().__init__()
        self.owners: dict[Any, tuple[str, str]] = {}
        self.first_use = self.last_use = self.last_sequence = -1
        self._calls, self._in_hook = 0, False
        self._parameters = {id(p) for p in module.parameters()}
        self._running = [("", type(module).__name__)]
        # By storage, so that views are the same; the tensor is held so that its storage is not reused.
        self._known: dict[int, tuple[Tensor, NonFiniteSource]] = {}
        for path, tensor in tensors_of(batch):
            if not is_finite(tensor):
                source = NonFiniteSource("", "", "", "", nonfinite_kind(tensor), 0, outside=True, path=path)
                self._remember(tensor, source)
        for name, part in module.named_modules():
            if part is not module:
                part.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                part.register_forward_hook(self._leave, always_call=True)

    def source_of(self, tensor: Tensor) -> NonFiniteSource | None:
        """Return a non-finite tensor's source, or None."""
        known = self._known.get(_storage(tensor))
        return known[1] if known is not None and not is_finite(tensor) else None

    def finish(self, loss: Tensor) -> None:
        """Assign unowned nodes to the training step itself."""
        self._own([loss], ("", self._running[0][1]))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._in_hook:
            return result
        name = getattr(func, "__name__", "")
        changed = args[0] if args and _is_in_place(name) and isinstance(args[0], Tensor) else None
        outputs = [t for _, t in tensors_of(result if changed is None else changed)]
        if not outputs or name in _UNINITIALIZED:
            return result
        self._calls += 1
        inputs = [t for _, t in tensors_of([args, kwargs])]
        if any(id(t) in self._parameters for t in inputs):
            self.last_use = self._calls
            self.first_use = self.first_use if self.first_use >= 0 else self._calls
            numbers = [t.grad_fn._sequence_nr() for t in outputs if t.grad_fn is not None]
            self.last_sequence = max([self.last_sequence, *numbers])
        bad = [t for t in outputs if not is_finite(t)]
        if bad:
            with torch.no_grad():
                earlier = self._sources([t for t in inputs if t is not changed], changed, name)
                source = self._source(func, args, kwargs, bad, earlier)
            for tensor in bad:
                self._remember(tensor, source)
        return result

    def _sources(self, inputs: list[Tensor], changed: Tensor | None, name: str) -> list[NonFiniteSource]:
        """Return the sources of non-finite inputs."""
        sources = []
        for tensor in inputs:
            if not is_finite(tensor):
                if _storage(tensor) not in self._known:
                    values = nonfinite_kind(tensor)
                    # An infinity that nothing computed is a constant, and intended.
                    source = replace(self._here(name, [tensor]), outside=True, intended=values == "Inf")
                    self._remember(tensor, source)
                sources.append(self._known[_storage(tensor)][1])
        if changed is not None and _storage(changed) in self._known:
            sources.append(self._known[_storage(changed)][1])
        return sources

    def _source(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        bad: list[Tensor],
        earlier: list[NonFiniteSource],
    ) -> NonFiniteSource:
        """Return an input's source, or this call."""
        name = getattr(func, "__name__", "")
        genuine = [source for source in earlier if not source.intended]
        if genuine:
            return min(genuine, key=lambda source: source.call)
        asked = [n for n in _numbers([args, kwargs]) if not math.isfinite(n)]
        here = self._here(name, bad)
        if not earlier and not asked:
            return replace(here, overflow=exact_size(func, args, kwargs, bad))
        if "NaN" in here.values and not any(math.isnan(n) for n in asked):
            return replace(here, given=True)
        # A NaN is never intended: no later operation can make it disappear on purpose.
        return earlier[0] if earlier else replace(here, intended="NaN" not in here.values)

    def _here(self, name: str, tensors: list[Tensor]) -> NonFiniteSource:
        module, layer = self._running[-1]
        plain, dtype = name.strip("_"), str(tensors[0].dtype).removeprefix("torch.")
        operation = _SIGNS.get(plain, plain)
        return NonFiniteSource(
            operation, module, layer, current_line(), nonfinite_kind(*tensors), self._calls, dtype=dtype
        )

    def _remember(self, tensor: Tensor, source: NonFiniteSource) -> None:
        self._known[_storage(tensor)] = (tensor.detach(), source)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._in_hook = True
            self._own((t for _, t in tensors_of([args, kwargs])), self._running[-1])
            self._running.append((name, type(module).__name__))
            self._in_hook = False

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._in_hook = True
        name, layer = self._running.pop()
        tensors = [t for _, t in tensors_of(output)]
        for tensor in tensors:
            # What runs outside of Python (a scripted module) is known by its module alone.
            if not is_finite(tensor) and _storage(tensor) not in self._known:
                source = NonFiniteSource("", name, layer, "", nonfinite_kind(tensor), self._calls)
                self._remember(tensor, source)
        self._own(tensors, (name, layer))
        self._in_hook = False

    def _own(self, tensors: Iterable[Tensor], owner: tuple[str, str]) -> None:
        """Assign unowned nodes behind tensors to a module."""
        pending = [t.grad_fn for t in tensors if t.grad_fn is not None]
        while pending:
            node = pending.pop()
            if node not in self.owners:
                self.owners[node] = owner
                pending += [child for child, _ in node.next_functions if child is not None]


class BackwardTrace:
    """Hooks that observe one backward pass.

    Args:
        loss: The tensor that will be differentiated, once.
        owners: Node to name and class of the module that made it; see `ForwardTrace`.
        last_sequence: Sequence number of the newest node that uses a parameter; newer ones belong to the loss.
    """

    def __init__(self, loss: Tensor, owners: dict[Any, tuple[str, str]], last_sequence: int) -> None:
        self._owners, self._last = owners, last_sequence
        self._nodes: list[Any] = [loss.grad_fn]
        self._parents: dict[Any, list[tuple[int, int]]] = {}
        self._bad: dict[int, tuple[bool, ...]] = {}
        self._sources: dict[int, NonFiniteSource] = {}  # in the order of the backward pass
        for index, node in enumerate(self._nodes):  # grows during the loop
            for slot, (child, _) in enumerate(node.next_functions):
                if child is not None:
                    if child not in self._parents:
                        self._parents[child] = []
                        self._nodes.append(child)
                    self._parents[child].append((index, slot))
            if node.next_functions:
                node.register_hook(self._inspect(index))

    def first_source(self) -> tuple[NonFiniteSource, bool] | None:
        """Return the first source that reaches a gradient.

        The flag is True if it lies in the loss. None without a source.
        """
        leaves = [n for n in self._nodes if not n.next_functions]
        gradients = [(n, getattr(getattr(n, "variable", None), "grad", None)) for n in leaves]
        pending = [n for n, gradient in gradients if gradient is not None and not is_finite(gradient)]
        seen, reached = set(pending), set()
        while pending:
            for index, slot in self._parents.get(pending.pop(), ()):
                node = self._nodes[index]
                if self._bad.get(index, ())[slot : slot + 1] != (True,):
                    continue
                if index in self._sources:
                    reached.add(index)
                elif node not in seen:
                    seen.add(node)
                    pending.append(node)
        first = next((index for index in self._sources if index in reached), None)
        if first is None:
            return None
        return self._sources[first], self._nodes[first]._sequence_nr() > self._last

    def _inspect(self, index: int) -> Callable[..., None]:
        def hook(produced: tuple[Tensor | None, ...], incoming: tuple[Tensor | None, ...]) -> None:
            bad = tuple(g is not None and not is_finite(g) for g in produced)
            if not any(bad):
                return
            self._bad[index] = bad
            if all(g is None or is_finite(g) for g in incoming):
                worst = [g for g, is_bad in zip(produced, bad, strict=True) if is_bad and g is not None]
                self._sources[index] = self._describe(self._nodes[index], worst)

        return hook

    def _describe(self, node: Any, worst: list[Tensor]) -> NonFiniteSource:
        name, operation = node.name().rsplit("::", 1)[-1], operation_of(node.name())
        module, layer = self._owners.get(node, ("", ""))
        values = nonfinite_kind(*worst)
        is_sum = operation in _ARITHMETIC or kind_of(operation) == "product"
        line = line_of(node.metadata.get("traceback_", ()))
        dtype = str(worst[0].dtype).removeprefix("torch.")
        overflow = math.inf if is_sum and values == "Inf" else 0.0
        return NonFiniteSource(
            name, module, layer, line, values, len(self._sources), dtype=dtype, overflow=overflow
        )


def exact_size(func: Callable[..., Any], args: Any, kwargs: Any, bad: list[Tensor]) -> float:
    """Compute a non-finite result's size in float64.

    Args:
        func: The function whose result is not finite.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        bad: The result's tensors that are not finite.

    Returns:
        Largest magnitude of the exact result, if that is finite and merely too large for the dtype; infinity if it
        would fit, so that a sum on the way to it did not; else 0.
    """
    dtype = bad[0].dtype
    if not dtype.is_floating_point:
        return 0.0
    try:
        with torch.autocast(bad[0].device.type, enabled=False):
            wide = func(*map_tensors(args, _widen), **map_tensors(kwargs, _widen))
        results = [t for _, t in tensors_of(wide) if t.is_floating_point()]
        if any(t.dtype != torch.float64 for t in results):  # a cast
            results = [_widen(t) for _, t in tensors_of([args, kwargs]) if t.is_floating_point()]
        largest = max(float(t.abs().max()) for t in results if t.numel())
    except Exception:  # not every function supports float64, nor every device
        return 0.0
    if not math.isfinite(largest):
        return 0.0
    return largest if largest > torch.finfo(dtype).max else math.inf


def _widen(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def _is_in_place(name: str) -> bool:
    if name.startswith("__"):
        return name == "__setitem__" or (
            name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
        )
    return name.endswith("_")


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # a subclass that has none
        return id(tensor)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(part)


def current_line() -> str:
    """Return the user's innermost line, such as ``model.py:42``."""
    frame = sys._getframe(1)
    while frame is not None:
        if _is_users(frame.f_code.co_filename):
            return _shown(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def line_of(traceback: Iterable[str]) -> str:
    """Return the user's innermost line in a traceback."""
    for entry in reversed(list(traceback)):
        match = _FRAME.search(entry)
        if match and _is_users(match[1]):
            return _shown(match[1], int(match[2]))
    return ""


def _is_users(file: str) -> bool:
    return not (file.startswith(_folders()) or file.startswith("<frozen") or file == _CONTEXTLIB)


def _shown(file: str, line: int) -> str:
    inside = os.path.abspath(file).startswith(os.getcwd() + os.sep)
    name = os.path.relpath(file) if inside else Path(file).name
    return f"{name}:{line}"


@cache
def _folders() -> tuple[str, ...]:
    specs = [importlib.util.find_spec(name) for name in _FRAMEWORKS]
    places = [place for spec in specs if spec is not None for place in spec.submodule_search_locations or ()]
    return tuple(place + os.sep for place in places)
