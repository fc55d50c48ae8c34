"""Whether a number is infinite only because its format ends: the same is computed anew in a wider one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradguard.introspection.batch import is_finite, kind_of_values, tensors_of
from lightning_gradguard.introspection.operations import kind_of, operation_of
from lightning_gradguard.introspection.source_lines import current_line, line_of


def exact_size(func: Callable[..., Any], args: Any, kwargs: Any, bad: list[Tensor]) -> float:
    """Computes a function anew in float64.

    Args:
        func: What gave a result that is not finite.
        args: What it was called with.
        kwargs: The same.
        bad: The result's tensors that are not finite.

    Returns:
        Largest magnitude of the exact result, if that is finite and merely too large for the dtype; else 0.
    """
    dtype = bad[0].dtype
    if not dtype.is_floating_point:
        return 0.0
    try:
        with torch.autocast(bad[0].device.type, enabled=False):
            wide = func(*_widened(args), **_widened(kwargs))
        results = [t for _, t in tensors_of(wide) if t.is_floating_point()]
        if any(t.dtype != torch.float64 for t in results):  # a cast
            results = [_widened(t) for _, t in tensors_of([args, kwargs]) if t.is_floating_point()]
        largest = max(float(t.abs().max()) for t in results if t.numel())
    except Exception:  # not every function knows float64, nor every device
        return 0.0
    if not math.isfinite(largest):
        return 0.0
    # A result that fits: a sum on the way to it did not.
    return largest if largest > torch.finfo(dtype).max else math.inf


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _widened(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_widened(part) for part in value)
    return value


#: Functions whose result is memory as it was found, to be filled by what comes next.
_UNFILLED = frozenset(
    {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
)
#: Operators as one writes them.
_SIGNS = {
    "div": "/",
    "true_divide": "/",
    "truediv": "/",
    "rdiv": "/",
    "rtruediv": "/",
    "pow": "**",
    "rpow": "**",
}
_SIGNS |= {"mul": "*", "rmul": "*", "add": "+", "radd": "+", "sub": "-", "rsub": "-", "matmul": "@"}
_SIGNS |= {"setitem": "[...] =", "getitem": "[...]"}


@dataclass(frozen=True)
class NonFiniteSource:
    """Where a number that is not finite came into being.

    Attributes:
        operation: Function that made it; empty where only the module is known.
        module: Name of the innermost module that ran it; empty for the training step itself.
        layer: The module's class.
        line: Where in the user's code, such as ``model.py:42``; empty if unknown.
        values: What came out: "NaN", "Inf", or "NaN and Inf".
        call: How many functions had been called before.
        planted: Infinities that were asked for, such as a mask's.
        given: The operation was given infinities that were planted, and made NaN of them.
        outside: It was not made here: a tensor that nothing in this pass computed held it already.
        path: Where in the batch that tensor stands; empty if it is none of the batch's.
        dtype: The result's, such as "float16".
        overflow: Largest magnitude of the exact result, where that is merely too large for the dtype; else 0.
    """

    operation: str
    module: str
    layer: str
    line: str
    values: str
    call: int
    planted: bool = False
    given: bool = False
    outside: bool = False
    path: str = ""
    dtype: str = ""
    overflow: float = 0.0


class ForwardTrace(TorchFunctionMode):
    """A mode in which every function of torch is looked at; use it in a `sandbox`, for it puts hooks on the modules.

    Infinities that are healed, such as those of an attention mask after its softmax, lead nowhere: what counts is
    which birth the loss descends from.

    Args:
        module: Whose forward pass, or training step, is watched.
        batch: What it is run on.
    """

    def __init__(self, module: nn.Module, batch: Any) -> None:
        super().__init__()
        self.owners: dict[Any, tuple[str, str]] = {}  # node of the graph -> name and class of its module
        self.first_use = self.last_use = -1  # calls in which a parameter was used first and last
        self.last_sequence = -1  # number of the node which that made
        self._calls, self._looking = 0, False
        self._parameters = {id(p) for p in module.parameters()}
        self._running = [("", type(module).__name__)]
        # By storage, so that views are the same; the tensor is held so that its storage is not given anew.
        self._known: dict[int, tuple[Tensor, NonFiniteSource]] = {}
        for path, tensor in tensors_of(batch):
            if not is_finite(tensor):
                self._remember(
                    tensor,
                    NonFiniteSource("", "", "", "", kind_of_values(tensor), 0, outside=True, path=path),
                )
        for name, part in module.named_modules():
            if part is not module:
                part.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                part.register_forward_hook(self._leave, always_call=True)

    def birth_of(self, tensor: Tensor) -> NonFiniteSource | None:
        """What a tensor's values descend from, if they are not finite and it is known."""
        known = self._known.get(_storage(tensor))
        return known[1] if known is not None and not is_finite(tensor) else None

    def finish(self, loss: Tensor) -> None:
        """Takes what was computed outside of all modules for the training step's own."""
        self._own([loss], ("", self._running[0][1]))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls the function, and looks at what came out."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._looking:  # a hook of ours
            return result
        name = getattr(func, "__name__", "")
        changed = args[0] if args and _in_place(name) and isinstance(args[0], Tensor) else None
        outputs = [t for _, t in tensors_of(result if changed is None else changed)]
        if not outputs or name in _UNFILLED:
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
                sources = self._sources([t for t in inputs if t is not changed], changed, name)
                birth = self._judge(func, args, kwargs, bad, sources)
            for tensor in bad:
                self._remember(tensor, birth)
        return result

    def _sources(self, inputs: list[Tensor], changed: Tensor | None, name: str) -> list[NonFiniteSource]:
        """What the inputs that are not finite descend from."""
        sources = []
        for tensor in inputs:
            if not is_finite(tensor):
                if _storage(tensor) not in self._known:
                    values = kind_of_values(tensor)
                    # An infinity that nobody computed is a constant, and meant.
                    birth = replace(self._here(name, [tensor]), outside=True, planted=values == "Inf")
                    self._remember(tensor, birth)
                sources.append(self._known[_storage(tensor)][1])
        if changed is not None and _storage(changed) in self._known:
            sources.append(self._known[_storage(changed)][1])
        return sources

    def _judge(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        bad: list[Tensor],
        sources: list[NonFiniteSource],
    ) -> NonFiniteSource:
        """What a result that is not finite descends from: one of the inputs', or this very call."""
        name = getattr(func, "__name__", "")
        genuine = [birth for birth in sources if not birth.planted]
        if genuine:
            return min(genuine, key=lambda birth: birth.call)
        asked = [n for n in _numbers([args, kwargs]) if not math.isfinite(n)]
        here = self._here(name, bad)
        if not sources and not asked:
            return replace(here, overflow=exact_size(func, args, kwargs, bad))
        if "NaN" in here.values and not any(math.isnan(n) for n in asked):
            return replace(here, given=True)
        # NaN has no meaning that anything could heal.
        return sources[0] if sources else replace(here, planted="NaN" not in here.values)

    def _here(self, name: str, tensors: list[Tensor]) -> NonFiniteSource:
        module, layer = self._running[-1]
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        return NonFiniteSource(
            _sign(name), module, layer, current_line(), kind_of_values(*tensors), self._calls, dtype=dtype
        )

    def _remember(self, tensor: Tensor, birth: NonFiniteSource) -> None:
        self._known[_storage(tensor)] = (tensor.detach(), birth)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._looking = True
            self._own((t for _, t in tensors_of([args, kwargs])), self._running[-1])
            self._running.append((name, type(module).__name__))
            self._looking = False

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._looking = True
        name, layer = self._running.pop()
        tensors = [t for _, t in tensors_of(output)]
        for tensor in tensors:
            # What runs outside of Python (a scripted module) is known by its module alone.
            if not is_finite(tensor) and _storage(tensor) not in self._known:
                self._remember(
                    tensor, NonFiniteSource("", name, layer, "", kind_of_values(tensor), self._calls)
                )
        self._own(tensors, (name, layer))
        self._looking = False

    def _own(self, tensors: Iterable[Tensor], owner: tuple[str, str]) -> None:
        """Gives the nodes behind some tensors that nobody owns yet to a module."""
        pending = [t.grad_fn for t in tensors if t.grad_fn is not None]
        while pending:
            node = pending.pop()
            if node not in self.owners:
                self.owners[node] = owner
                pending += [child for child, _ in node.next_functions if child is not None]


def _in_place(name: str) -> bool:
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


def _sign(name: str) -> str:
    plain = name.strip("_")
    return _SIGNS.get(plain, plain)


def _numbers(value: Any) -> Iterator[float]:
    """Plain numbers among arguments."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(part)


#: Operations whose gradient is a sum, product or copy of what they are given, so that an Inf out of it is an overflow.
_ARITHMETIC = frozenset(
    {"Mul", "Add", "Sub", "Neg", "Sum", "Expand", "Repeat", "ToCopy", "Cat", "Index", "Gather"}
)


class BackwardTrace:
    """Hooks on every node of a graph.

    Args:
        loss: What will be differentiated, once.
        owners: Node to name and class of the module that made it.
        last_sequence: Number of the newest node that uses a parameter; what is newer belongs to the loss.
    """

    def __init__(self, loss: Tensor, owners: dict[Any, tuple[str, str]], last_sequence: int) -> None:
        self._owners, self._last = owners, last_sequence
        self._nodes: list[Any] = [loss.grad_fn]
        self._parents: dict[Any, list[tuple[int, int]]] = {}
        self._bad: dict[int, tuple[bool, ...]] = {}
        self._born: dict[int, NonFiniteSource] = {}  # in the order of the backward pass
        for index, node in enumerate(self._nodes):  # grows while it is walked
            for slot, (child, _) in enumerate(node.next_functions):
                if child is not None:
                    if child not in self._parents:
                        self._parents[child] = []
                        self._nodes.append(child)
                    self._parents[child].append((index, slot))
            if node.next_functions:
                node.register_hook(self._look(index))

    def birth(self) -> tuple[NonFiniteSource, bool] | None:
        """The first birth in backward order that reaches a leaf's gradient, and whether it lies in the loss."""
        leaves = [n for n in self._nodes if not n.next_functions]
        gradients = [(n, getattr(getattr(n, "variable", None), "grad", None)) for n in leaves]
        pending = [n for n, gradient in gradients if gradient is not None and not is_finite(gradient)]
        seen, reached = set(pending), set()
        while pending:
            for index, slot in self._parents.get(pending.pop(), ()):
                node = self._nodes[index]
                if self._bad.get(index, ())[slot : slot + 1] != (True,):
                    continue
                if index in self._born:
                    reached.add(index)
                elif node not in seen:
                    seen.add(node)
                    pending.append(node)
        first = next((index for index in self._born if index in reached), None)
        if first is None:
            return None
        return self._born[first], self._nodes[first]._sequence_nr() > self._last

    def _look(self, index: int) -> Callable[..., None]:
        def hook(produced: tuple[Tensor | None, ...], incoming: tuple[Tensor | None, ...]) -> None:
            bad = tuple(g is not None and not is_finite(g) for g in produced)
            if not any(bad):
                return
            self._bad[index] = bad
            if all(g is None or is_finite(g) for g in incoming):
                worst = [g for g, is_bad in zip(produced, bad, strict=True) if is_bad and g is not None]
                self._born[index] = self._describe(self._nodes[index], worst)

        return hook

    def _describe(self, node: Any, worst: list[Tensor]) -> NonFiniteSource:
        name, operation = node.name().rsplit("::", 1)[-1], operation_of(node.name())
        module, layer = self._owners.get(node, ("", ""))
        values = kind_of_values(*worst)
        sums = operation in _ARITHMETIC or kind_of(operation) == "product"
        line = line_of(node.metadata.get("traceback_", ()))
        dtype = str(worst[0].dtype).removeprefix("torch.")
        overflow = float("inf") if sums and values == "Inf" else 0.0
        return NonFiniteSource(
            name, module, layer, line, values, len(self._born), dtype=dtype, overflow=overflow
        )
