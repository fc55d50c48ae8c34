"""Trace the operation that made the first NaN.

`ForwardTrace` observes every function of torch in a forward pass; `backward_trace` does so for the backward pass.
`exact_size` tells a number that is merely too large for its dtype from one that has no finite value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradguard.introspection.batch import is_finite, map_tensors, nonfinite_kind, tensors_of
from lightning_gradguard.introspection.operation_facts import (
    HELD,
    WEIGHTED_LOSSES,
    Call,
    OperationFacts,
    bound,
    canonical,
    facts_of,
    storage_of,
)
from lightning_gradguard.introspection.user_lines import (
    current_line,
    current_site,
    running_distribution,
    variable_name,
)

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
#: Functions that make a tensor of numbers which torch has not computed.
_FROM_OUTSIDE = frozenset({"tensor", "as_tensor", "asarray", "from_numpy", "frombuffer"})
#: Functions whose results are known by them also where no gradient is computed.
_REMEMBERED = frozenset({"std", "var", "norm"})
#: Functions by which a value that comes from a tanh is still told as one.
_ARITHMETIC = frozenset({"mul", "div", "add", "sub", "pow", "square", "neg"})


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
        tensor: Place of that tensor in the module, such as ``loss.weight``, or the user's variable that holds it; empty
            if it is not known.
        role: Name of the argument that it was given as.
        dtype: The result's, such as "float16".
        overflow: Largest magnitude of the exact result, where that is merely too large for the dtype; else 0.
        saturated: True if the operation was given the largest number of a dtype.
        facts: What the operation was given; None where the call was not seen.
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
    tensor: str = ""
    role: str = ""
    dtype: str = ""
    overflow: float = 0.0
    saturated: bool = False
    facts: OperationFacts | None = None


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
        calls: Node to the call that made it; None for a node that no call was seen to make.
        names: Names of the module's tensors.
        first_use: Call in which a parameter was used first; -1 if none was.
        last_use: Call in which a parameter was used last; -1 if none was.
        last_sequence: Sequence number of the node which that call made.
    """

    def __init__(self, module: nn.Module, batch: Any) -> None:
        super().__init__()
        self.owners: dict[Any, tuple[str, str]] = {}
        self.calls: dict[Any, Call | None] = {}
        self.first_use = self.last_use = self.last_sequence = -1
        self._calls, self._in_hook = 0, False
        self._made: dict[int, tuple[Tensor, str]] = {}
        self._squashed: dict[int, Tensor] = {}
        self._parameters = {id(p) for p in module.parameters()}
        self._running = [("", type(module).__name__)]
        # Those of the module and of the batch, by storage.
        own = _names_of(module)
        self.names = frozenset(own.values())
        self._names = {storage_of(t): path for path, t in tensors_of(batch)} | own
        # By storage, so that views are the same; the tensor is held so that its storage is not reused.
        self._known: dict[int, tuple[Tensor, NonFiniteSource]] = {}
        for path, tensor in tensors_of(batch):
            if not is_finite(tensor):
                source = NonFiniteSource("", "", "", "", nonfinite_kind(tensor), 0, outside=True, path=path)
                self._remember(tensor, source)
        for name, part in module.named_modules():
            if part is not module:
                with suppress(RuntimeError):  # a scripted module takes no hooks
                    part.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                    part.register_forward_hook(self._leave, always_call=True)

    def source_of(self, tensor: Tensor) -> NonFiniteSource | None:
        """Return a non-finite tensor's source, or None."""
        known = self._known.get(storage_of(tensor))
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
        given = [t for t in inputs if t is not changed]
        call = self._record(func, args, kwargs, given, outputs)
        if bad:
            with torch.no_grad():
                earlier = self._sources(call, given, changed)
                source = self._source(call._replace(args=args, kwargs=kwargs), bad, earlier)
            for tensor in bad:
                self._remember(tensor, source)
        return result

    def provenance(self, tensor: Tensor) -> tuple[str, tuple[str, ...], str]:
        """Return a tensor's name, the parameters that alone made it, and the function that made it.

        The function is "tanh" too for what was computed from a tanh by arithmetic alone.
        """
        name = self._names.get(storage_of(tensor), "")
        if id(tensor) in self._parameters:
            return name, (name,), ""
        call = None if tensor.grad_fn is None else self.calls.get(tensor.grad_fn)
        squashed = "tanh" if storage_of(tensor) in self._squashed else ""
        if call is not None:
            return "", call.parameters, squashed or call.function
        if squashed:
            return name, (), squashed
        return name, (), self._made.get(storage_of(tensor), (tensor, ""))[1]

    def _is_buffer(self, tensor: Tensor) -> bool:
        is_own = self._names.get(storage_of(tensor)) in self.names
        return is_own and tensor.grad_fn is None and id(tensor) not in self._parameters

    def _record(
        self, func: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor], outputs: list[Tensor]
    ) -> Call:
        """Record the nodes that a call has made."""
        name = getattr(func, "__name__", "")
        # Buffers of the module change nothing about where a result comes from.
        sources = [self.provenance(t)[1] for t in given if not self._is_buffer(t)]
        parameters = tuple(dict.fromkeys(n for names in sources for n in names)) if all(sources) else ()
        own_args, own_kwargs = (args, kwargs) if canonical(name) in HELD else ((), {})
        known = tuple(self._known[storage_of(t)][1] for t in given if storage_of(t) in self._known)
        site, distribution, module = current_site(), running_distribution(), self._running[-1]
        call = Call(func, name, own_args, own_kwargs, site, distribution, module, parameters, known)
        if call.function in _REMEMBERED:
            self._made.update({storage_of(t): (t, call.function) for t in outputs if t.grad_fn is None})
        if call.function == "tanh" or (
            call.function in _ARITHMETIC and any(storage_of(t) in self._squashed for t in given)
        ):
            self._squashed.update({storage_of(t): t for t in outputs})
        for tensor in given:
            if tensor.grad_fn is not None:
                self.calls.setdefault(tensor.grad_fn, None)
        pending = [t.grad_fn for t in outputs if t.grad_fn is not None]
        while pending:
            node = pending.pop()
            if node not in self.calls:
                self.calls[node] = call
                pending += [c for c, _ in node.next_functions if c is not None and c.next_functions]
        return call

    def _sources(self, call: Call, given: list[Tensor], changed: Tensor | None) -> list[NonFiniteSource]:
        """Return the sources of non-finite inputs."""
        sources = []
        for tensor in given:
            if not is_finite(tensor):
                if storage_of(tensor) not in self._known:
                    self._remember(tensor, self._outside(call, tensor))
                sources.append(self._known[storage_of(tensor)][1])
        if changed is not None and storage_of(changed) in self._known:
            sources.append(self._known[storage_of(changed)][1])
        return sources

    def _outside(self, call: Call, tensor: Tensor) -> NonFiniteSource:
        """Return the source of a tensor that nothing in this pass computed."""
        given = bound(call.func, call.name, call.args, call.kwargs)
        role = next((r for r, value in given.items() if value is tensor), "")
        name = self._names.get(storage_of(tensor), "") or variable_name(tensor)
        if tensor.grad_fn is not None:  # it was computed where torch cannot be observed
            (module, layer), own = self._running[-1], own_class(tensor.grad_fn)
            facts = OperationFacts("", custom=own) if own else None
            values, operation = nonfinite_kind(tensor), tensor.grad_fn.name().rsplit("::", 1)[-1]
            return NonFiniteSource(operation, module, layer, current_line(), values, self._calls, facts=facts)
        # An infinity that nothing computed is a constant, and intended.
        intended = nonfinite_kind(tensor) == "Inf"
        here = self._here(call.name, [tensor])
        return replace(here, outside=True, intended=intended, tensor=name, role=role)

    def _source(self, call: Call, bad: list[Tensor], earlier: list[NonFiniteSource]) -> NonFiniteSource:
        """Return an input's source, or this call."""
        genuine = [source for source in earlier if not source.intended]
        if genuine:
            return min(genuine, key=lambda source: source.call)
        weights = [source for source in earlier if source.outside and source.role in ("weight", "pos_weight")]
        if weights and call.function in WEIGHTED_LOSSES:
            return replace(weights[0], intended=False)
        asked = [n for n in _numbers([call.args, call.kwargs]) if not math.isfinite(n)]
        here = self._here(call.name, bad)
        if call.name in _FROM_OUTSIDE:
            return replace(here, outside=True, intended=here.values == "Inf")
        if not earlier and not asked:
            overflow = exact_size(call.func, call.args, call.kwargs, bad)
            tensors = [
                t for _, t in tensors_of([call.args, call.kwargs]) if t.is_floating_point() and t.numel()
            ]
            saturated = any(float(t.abs().max()) == torch.finfo(t.dtype).max for t in tensors)
            facts = facts_of(call, self.provenance, bad[0])
            return replace(here, overflow=overflow, saturated=saturated, facts=facts)
        if "NaN" in here.values and not any(math.isnan(n) for n in asked):
            return replace(here, given=True, facts=facts_of(call, self.provenance, bad[0]))
        is_masked = bool(asked) and not any(math.isnan(n) for n in asked)
        has_facts = is_masked or _is_loss(call.function)
        masked = facts_of(call, self.provenance, bad[0]) if has_facts else None
        if masked is not None and _is_loss(call.function):
            return replace(here, given=True, facts=masked)
        # A NaN is never intended: no later operation can make it disappear on purpose.
        return earlier[0] if earlier else replace(here, intended="NaN" not in here.values, facts=masked)

    def _here(self, name: str, tensors: list[Tensor]) -> NonFiniteSource:
        module, layer = self._running[-1]
        plain, dtype = name.strip("_"), str(tensors[0].dtype).removeprefix("torch.")
        operation = _SIGNS.get(plain, plain)
        return NonFiniteSource(
            operation, module, layer, current_line(), nonfinite_kind(*tensors), self._calls, dtype=dtype
        )

    def _remember(self, tensor: Tensor, source: NonFiniteSource) -> None:
        self._known[storage_of(tensor)] = (tensor.detach(), source)

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
            if not is_finite(tensor) and storage_of(tensor) not in self._known:
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


def own_class(node: Any) -> str:
    """Return the class of a function with its own backward pass; empty for those of torch."""
    own = getattr(type(node), "_forward_cls", None)
    return "" if own is None or own.__module__.partition(".")[0] == "torch" else own.__name__


def _is_loss(function: str) -> bool:
    return function in ("cross_entropy", "kl_div") or function.endswith("_loss")


def _names_of(module: nn.Module) -> dict[int, str]:
    """Return the names of a module's tensors, by storage: parameters, buffers, plain attributes."""
    names: dict[int, str] = {}
    for prefix, part in module.named_modules():
        own = {**vars(part), **part._buffers, **part._parameters}
        for name, value in own.items():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(value, (Tensor, list, tuple, dict)) and not name.startswith("_"):
                for place, tensor in tensors_of(value, path) if _is_short(value) else ():
                    names.setdefault(storage_of(tensor), place)
    return names


def _is_short(value: Any) -> bool:
    return isinstance(value, Tensor) or len(value) <= 100


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


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(part)
