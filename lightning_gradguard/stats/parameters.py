"""Parameters of models and optimizers, with names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from itertools import chain, takewhile
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.")


def as_pairs(named_parameters: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return pairs of name and parameter.

    Raises:
        TypeError: If they are something else, such as a module or its ``parameters()``.
    """
    pairs: list[Any] = (
        list(named_parameters) if isinstance(named_parameters, Iterable) else [named_parameters]
    )
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                "named_parameters must be pairs of name and parameter, such as model.named_parameters(), "
                f"got {type(pair).__name__}"
            )
    return pairs


def members(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Return an optimizer's parameters, group after group."""
    return [*chain.from_iterable(_groups(optimizer))]


def are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether two lists hold the same tensors."""
    return len(some) == len(others) and all(map(is_, some, others))


def select(named: Sequence[tuple[str, Tensor]], optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Return name to parameter.

    The order is that of the model, then come parameters that only the optimizer has. Tied parameters count once, under
    their first name. Parameters of two models with the same name are numbered, so that all are tracked. Prefixes that
    torch.compile and FSDP add to names are removed.

    Args:
        named: Pairs of name and parameter.
        optimizer: Restricts the choice to its parameters; None takes all.

    Raises:
        ValueError: If there is no parameter.
    """
    known = {id(p): (_plain(name), p) for name, p in reversed(named)}
    own = {
        id(p): (f"group{g}.{i}", p) for g, group in enumerate(_groups(optimizer)) for i, p in enumerate(group)
    }
    chosen = [pair for key, pair in reversed(known.items()) if optimizer is None or key in own]
    chosen += [pair for key, pair in own.items() if key not in known]
    if not chosen:
        raise ValueError("named_parameters must hold a parameter, got none; pass model.named_parameters()")
    unique: dict[str, Tensor] = {}
    for name, parameter in chosen:
        count = 1
        while (numbered := name if count == 1 else f"{name}#{count}") in unique:
            count += 1
        unique[numbered] = parameter
    return unique


def is_compiled(named: Sequence[tuple[str, Tensor]]) -> bool:
    """Return True if a compiled module has these names.

    A compiled module calls no hooks.
    """
    return any("_orig_mod." in name for name, _ in named)


def has_compiled_part(module: nn.Module) -> bool:
    """Return True if a part was compiled in place, or holds a compiled function.

    ``module.compile()`` and ``self.body = torch.compile(self.body)`` do that, and no name shows it. Such code calls
    hooks, but is compiled again for each one that is added or removed.
    """
    return any(map(was_compiled, module.modules()))


def was_compiled(part: nn.Module) -> bool:
    """Return True if this very module was compiled in place, or holds a compiled function."""
    # Not `hasattr`: attributes may be objects of any kind, which answer to every name, or raise.
    return getattr(part, "_compiled_call_impl", None) is not None or any(
        inspect.getattr_static(held, "_torchdynamo_orig_callable", None) is not None
        for held in (*vars(part).values(), part.forward)
        if callable(held)
    )


def _groups(optimizer: torch.optim.Optimizer | None) -> list[list[Tensor]]:
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"optimizer must be an optimizer with param_groups, got {type(optimizer).__name__}")
    return [] if optimizer is None else [group["params"] for group in optimizer.param_groups]


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def optimizer_title(index: int | str, modules: Iterable[str]) -> str:
    """Return what an optimizer is called among several.

    >>> optimizer_title(0, ["generator.0", "generator.2.out"])
    'optimizer 0 (generator)'
    >>> optimizer_title(1, ["generator.0", "critic"])
    'optimizer 1'

    Args:
        index: Its index.
        modules: Dotted names of the modules that its parameters belong to.
    """
    levels = zip(*(name.split(".") for name in modules), strict=False)
    shared = takewhile(lambda parts: len(set(parts)) == 1, levels)
    prefix = ".".join(parts[0] for parts in shared)
    return f"optimizer {index} ({prefix})" if prefix else f"optimizer {index}"
