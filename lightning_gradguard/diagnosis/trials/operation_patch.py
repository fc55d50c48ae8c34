"""Replace one operation of the user's code for a trial."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_gradguard.introspection.batch import map_tensors
from lightning_gradguard.introspection.operation_facts import (
    MASKS,
    SWAPPED,
    bound,
    canonical,
    counted_labels,
    first_tensor,
)
from lightning_gradguard.introspection.user_lines import Site, current_site

#: What stands in for an infinity.
_LARGE = 1e9


@dataclass(frozen=True)
class OperationPatch:
    """Replacement for the calls of a function at one place in the user's code.

    Attributes:
        way: Name of the replacement, a key of `WAYS` or `TENSOR_WAYS`.
        function: The function; see `operation_facts.canonical`.
        site: Place of the call; None where a tensor of the module is changed instead.
        argument: Name or place of the argument that is changed.
        low: Least value of the argument.
        high: Largest value of the argument.
        fill: Value for what is outside of these, where it is masked.
        settings: Other arguments to set, by name.
        tensor: Place of the tensor in the module, such as ``loss.weight``.
    """

    way: str
    function: str = ""
    site: Site | None = None
    argument: str = "0"
    low: float | None = None
    high: float | None = None
    fill: float = 1.0
    settings: tuple[tuple[str, Any], ...] = ()
    tensor: str = ""


class PatchedOperation(TorchFunctionMode):
    """Mode that replaces the calls which a patch is for.

    Args:
        patch: The patch.

    Attributes:
        used: Number of calls that were replaced.
    """

    def __init__(self, patch: OperationPatch) -> None:
        super().__init__()
        self._patch, self.used = patch, 0
        self._softmaxes: dict[int, tuple[Tensor, Callable[..., Any], Any, Mapping[str, Any]]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        function = canonical(name)
        if function == self._patch.function and current_site() == self._patch.site:
            self.used += 1
            if self._patch.way == "logits" and id(args[0]) in self._softmaxes:
                _, inner, own, options = self._softmaxes[id(args[0])]
                given = bound(inner, "softmax", own, options)
                dim = given.get("dim", given.get("1"))
                return torch.log_softmax(first_tensor(given), -1 if dim is None else dim)
            return _in_place(self._patch, func, name, args, kwargs)
        result = func(*args, **kwargs)
        if function == "softmax" and self._patch.way == "logits" and isinstance(result, Tensor):
            self._softmaxes[id(result)] = (result, func, args, kwargs)
        return result


def change_tensor_(module: nn.Module, patch: OperationPatch) -> None:
    """Change the module's tensor that a patch names, in place.

    Args:
        module: A module in a `sandbox`.
        patch: The patch; one without a tensor changes nothing.

    Raises:
        ValueError: If there is no such tensor.
    """
    if not patch.tensor:
        return
    path, _, name = patch.tensor.rpartition(".")
    try:
        tensor = getattr(module.get_submodule(path), name)
    except AttributeError:
        raise ValueError(f"the module has no tensor {patch.tensor!r}") from None
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{patch.tensor!r} is no tensor")
    with torch.no_grad():
        tensor.copy_(TENSOR_WAYS[patch.way](tensor, patch))


def _in_place(
    patch: OperationPatch,
    func: Callable[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Replace a call, also one that writes into its first argument."""
    way = WAYS.get(patch.way, WAYS["keep"])
    if not name.endswith("_") or name.endswith("__"):
        return way(patch, func, name, args, kwargs)

    def written(*changed: Any, **options: Any) -> Tensor:
        target: Tensor = args[0]
        if changed[0] is not target:
            target.copy_(changed[0])
        return func(target, *changed[1:], **options)  # type: ignore[no-any-return]

    return way(patch, written, name, args, kwargs)


def _replaced(
    func: Callable[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> Any:
    """Call a function with some arguments changed; see `operation_facts.bound` for their names."""
    if all(role.isdigit() for role in changes):
        own = list(args)
        for role, value in changes.items():
            index = len(own) - 1 - int(role) if name.strip("_") in SWAPPED else int(role)
            own[index] = value
        return func(*own, **kwargs)
    try:
        given = inspect.signature(func).bind(*args, **kwargs)
    except ValueError:  # written in C
        return func(*args, **{**kwargs, **changes})
    given.arguments.update(changes)
    return func(*given.args, **given.kwargs)


def _clamp(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    x = bound(func, name, args, kwargs)[patch.argument]
    new = x.clamp(patch.low, patch.high) if isinstance(x, Tensor) else max(x, patch.low or 0.0)
    return _replaced(func, name, args, kwargs, {patch.argument: new})


def _mask(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    x = bound(func, name, args, kwargs)[patch.argument]
    outside = torch.zeros_like(x, dtype=torch.bool)
    if patch.low is not None:
        outside |= x < patch.low
    if patch.high is not None:
        outside |= x > patch.high
    return _replaced(func, name, args, kwargs, {patch.argument: x.masked_fill(outside, patch.fill)})


def _away(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Move an argument away from zero; all of them if none is named."""
    given, eps = bound(func, name, args, kwargs), patch.low or 1e-8
    roles = [patch.argument] if patch.argument else list(given)
    tensors = {role: given[role] for role in roles if isinstance(given[role], Tensor)}
    new = {r: x.masked_fill(x.abs() < eps, eps) for r, x in tensors.items() if x.is_floating_point()}
    return _replaced(func, name, args, kwargs, new)


def _leave_out(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Return 0 where an argument is zero."""
    x = bound(func, name, args, kwargs)[patch.argument]
    result = _replaced(func, name, args, kwargs, {patch.argument: x.masked_fill(x == 0, 1)})
    return torch.where(x == 0, 0.0, result)


def _shift(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Shift an argument so that all of it is positive."""
    x = bound(func, name, args, kwargs)[patch.argument]
    return _replaced(func, name, args, kwargs, {patch.argument: x - x.detach().amin() + (patch.low or 1e-3)})


def _soft(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Bound an argument with a tanh."""
    x, high = bound(func, name, args, kwargs)[patch.argument], patch.high or 1.0
    return _replaced(func, name, args, kwargs, {patch.argument: high * torch.tanh(x / high)})


def _size(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Take the absolute value of an argument, clamped above zero."""
    x = bound(func, name, args, kwargs)[patch.argument]
    return _replaced(func, name, args, kwargs, {patch.argument: x.abs().clamp(min=patch.low)})


def _unit(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Scale the square in 1 minus a square down to at most 1."""
    x = bound(func, name, args, kwargs)[patch.argument]
    square = 1 - x
    new = (1 - square / square.detach().amax().clamp(min=1)).clamp(min=patch.low)
    return _replaced(func, name, args, kwargs, {patch.argument: new})


def _set(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    return _replaced(func, name, args, kwargs, dict(patch.settings))


def _finite(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Replace infinities by large numbers, also among plain numbers."""

    def bounded(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        large = min(_LARGE, torch.finfo(x.dtype).max / 4)
        return x.masked_fill(x == math.inf, large).masked_fill(x == -math.inf, -large)

    def plain(value: Any) -> Any:
        is_infinite = isinstance(value, float) and math.isinf(value)
        return math.copysign(_LARGE, value) if is_infinite else map_tensors(value, bounded)

    return func(*map(plain, args), **{key: plain(value) for key, value in kwargs.items()})


def _distinct(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Add distinct numbers to the diagonal of a matrix."""
    given = bound(func, name, args, kwargs)
    role = next(role for role, value in given.items() if isinstance(value, Tensor))
    x = given[role]
    return _replaced(
        func, name, args, kwargs, {role: x + _diagonal(x, torch.linspace(1.2, 0.8, min(x.shape[-2:])))}
    )


def _ridge(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Add a small number to the diagonal of a matrix."""
    given = bound(func, name, args, kwargs)
    role = next(role for role, value in given.items() if isinstance(value, Tensor))
    x = given[role]
    size = float(x.detach().abs().amax()) or 1.0
    ones = torch.full((min(x.shape[-2:]),), (patch.low or 1e-3) * size)
    return _replaced(func, name, args, kwargs, {role: x + _diagonal(x, ones)})


def _diagonal(x: Tensor, values: Tensor) -> Tensor:
    rows, columns = x.shape[-2:]
    square = torch.diag(values.to(x))
    return F.pad(square, (0, columns - len(values), 0, rows - len(values)))


def _no_spread(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Return the biased spread of a single element, which is zero."""
    x = first_tensor(bound(func, name, args, kwargs))
    result = func(*args, **kwargs)
    if isinstance(result, Tensor):
        return torch.zeros_like(result) + 0 * x.sum()
    return type(result)((torch.zeros_like(result[0]) + 0 * x.sum(), result[1]))


def _over_counted(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Divide a loss's sum by the count or weight of its labels, but never by zero."""
    given = bound(func, name, args, kwargs)
    target, weight = given["target"], given.get("weight")
    total = _replaced(func, name, args, kwargs, {"reduction": "sum"})
    if target.is_floating_point():
        return total / max(target.shape[0], 1)
    counted = counted_labels(given)
    if weight is None:
        return total / counted.sum().clamp(min=1)
    return total / weight[target[counted]].sum().clamp(min=1e-8)


def _over_none(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Return zero for a mean over nothing."""
    return first_tensor(bound(func, name, args, kwargs)).sum()


def _show_rows(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Hide no row entirely."""
    given = bound(func, name, args, kwargs)
    masks = {role: given[role] for role in MASKS if given.get(role) is not None}
    if masks:
        # A boolean mask is True for what is hidden in a module, and for what is seen in the function itself.
        seen = canonical(name) == "scaled_dot_product_attention"
        return _replaced(func, name, args, kwargs, {r: _finite_mask(m, seen=seen) for r, m in masks.items()})
    x, dim = first_tensor(given), given.get("dim", given.get("1", -1))
    hidden = (x == -math.inf).all(-1 if dim is None else dim, keepdim=True)
    role = next(role for role, value in given.items() if value is x)
    return _replaced(func, name, args, kwargs, {role: x.masked_fill(hidden, 0.0)})


def _finite_mask(mask: Tensor, *, seen: bool) -> Tensor:
    """Return a mask whose rows keep some weight, also where several masks hide all of a row."""
    hidden = mask == -math.inf if mask.dtype != torch.bool else ~mask if seen else mask
    values = torch.zeros(mask.shape, device=mask.device) if mask.dtype == torch.bool else mask
    return values.masked_fill(hidden, -1e4)


def _keep(patch: OperationPatch, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


#: Name of each replacement of a call to the function that makes it.
WAYS: dict[str, Callable[..., Any]] = {
    "clamp": _clamp,
    "mask": _mask,
    "away": _away,
    "size": _size,
    "leave out": _leave_out,
    "shift": _shift,
    "soft": _soft,
    "unit": _unit,
    "set": _set,
    "finite": _finite,
    "distinct": _distinct,
    "ridge": _ridge,
    "no spread": _no_spread,
    "over counted": _over_counted,
    "over none": _over_none,
    "show rows": _show_rows,
    "keep": _keep,
}


def _drawn(tensor: Tensor, patch: OperationPatch) -> Tensor:
    return torch.randn_like(tensor) * 1e-3


def _bounded(tensor: Tensor, patch: OperationPatch) -> Tensor:
    finite = tensor.nan_to_num(patch.fill, patch.fill, patch.fill)
    return finite if patch.low is None else finite.clamp(min=patch.low)


#: Name of each change of a module's tensor to the function that makes it.
TENSOR_WAYS: dict[str, Callable[[Tensor, OperationPatch], Tensor]] = {
    "draw": _drawn,
    "ones": lambda tensor, patch: torch.ones_like(tensor),
    "bound": _bounded,
}
