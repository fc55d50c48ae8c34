"""Faults to inject into gradients in tests."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lightning_gradguard.stats.parameters import select
from lightning_gradguard.validation import check_fraction, check_positive


@dataclass(frozen=True, kw_only=True)
class Injection(ABC):
    """Fault in gradients, the same at each step.

    Args:
        at: Step, or steps such as ``range(50, 100)``.
        parameters: Shell-style pattern of parameter names, such as ``"encoder.*"``.
        rank: Process in which the fault is injected; None for all of them.

    Raises:
        ValueError: If a step or the rank is not a whole number, 0 or more, or if there is no step.
        TypeError: If the pattern is not a string.
    """

    at: int | Sequence[int]
    parameters: str = "*"
    rank: int | None = None

    def __post_init__(self) -> None:
        steps = (self.at,) if isinstance(self.at, int) else self.at
        if not isinstance(steps, Sequence) or not steps or not all(map(_is_count, steps)):
            raise ValueError(
                f"at must be a step, 0 or more, or a sequence of steps such as range(50, 100), got {self.at!r}"
            )
        if not isinstance(self.parameters, str):
            raise TypeError(
                f'parameters must be a pattern of names such as "encoder.*", got {self.parameters!r}'
            )
        if self.rank is not None and not _is_count(self.rank):
            raise ValueError(
                f"rank must be a whole number, 0 or more, or None for all processes, got {self.rank!r}"
            )
        object.__setattr__(self, "at", steps if isinstance(steps, range) else tuple(steps))

    @abstractmethod
    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """Return the faulty gradient, in a new tensor.

        Args:
            gradient: Gradient of one parameter, as backward has just computed it.
            depth: Place of the parameter among those that match, in the order of the model: 0 the first, 1 the last.
        """

    def is_due(self, step: int, rank: int) -> bool:
        """Return True at the injection's steps and rank.

        Args:
            step: Number of the current step.
            rank: Rank of this process.
        """
        assert isinstance(self.at, Sequence)
        return step in self.at and self.rank in (None, rank)

    def targets(self, named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return the trainable parameters that match, by name.

        Args:
            named_parameters: Pairs of name and parameter, from ``model.named_parameters()``.

        Raises:
            ValueError: If the pattern matches no name, or only those of frozen parameters.
        """
        named = select(list(named_parameters), None)
        matching = {name: p for name, p in named.items() if fnmatchcase(name, self.parameters)}
        if not matching:
            near = difflib.get_close_matches(self.parameters, named, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"parameters must match a name, got {self.parameters!r}; the nearest name is {near!r}"
            )
        trained = {name: p for name, p in matching.items() if p.requires_grad}
        if not trained:
            raise ValueError(
                f"parameters must match a trainable parameter, got {self.parameters!r}: it matches frozen ones only"
            )
        return trained


@dataclass(frozen=True, kw_only=True)
class NaN(Injection):
    """One NaN in each gradient, as its first entry.

    Example:
        >>> import torch
        >>> print(NaN(at=7).change(torch.ones(2, 2), depth=0.0))
        tensor([[nan, 1.],
                [1., 1.]])
    """

    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """Return the gradient with a NaN."""
        return _with_first(gradient, math.nan)


@dataclass(frozen=True, kw_only=True)
class Inf(Injection):
    """One infinity in each gradient, as its first entry.

    Example:
        >>> import torch
        >>> print(Inf(at=7).change(torch.ones(2), depth=0.0))
        tensor([inf, 1.])
    """

    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """Return the gradient with an infinity."""
        return _with_first(gradient, math.inf)


@dataclass(frozen=True, kw_only=True)
class Spike(Injection):
    """Gradients that are ``factor`` times too large.

    Example:
        >>> import torch
        >>> print(Spike(at=7, factor=100.0).change(torch.ones(2), depth=0.0))
        tensor([100., 100.])

    Args:
        factor: Positive and finite, dimensionless.

    Raises:
        ValueError: If the factor is not positive and finite.
        TypeError: If it is not a number.
    """

    factor: float = 1e3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("factor", self.factor)

    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """Return the gradient times the factor."""
        return gradient * self.factor


@dataclass(frozen=True, kw_only=True)
class Vanishing(Injection):
    """Gradients that fall towards the input.

    The first falls by ``decades`` factors of ten, the last not at all:

    gradient · 10^(-decades · (1 - depth)), evenly over the parameters that match.

    Example:
        >>> import torch
        >>> vanishing = Vanishing(at=range(50, 200), decades=4.0)
        >>> [f"{vanishing.change(torch.ones(1), depth).item():g}" for depth in (0.0, 0.5, 1.0)]
        ['0.0001', '0.01', '1']

    Args:
        decades: Factors of ten, positive and finite.

    Raises:
        ValueError: If ``decades`` is not positive and finite.
        TypeError: If it is not a number.
    """

    decades: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("decades", self.decades)

    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """Return the gradient scaled by depth."""
        return gradient * 10 ** (-self.decades * (1 - depth))


@dataclass(frozen=True, kw_only=True)
class DeadRows(Injection):
    """Units without gradients: first rows are zero.

    Example:
        >>> import torch
        >>> print(DeadRows(at=range(99), share=0.5).change(torch.ones(3), depth=0.0))
        tensor([0., 0., 1.])

    Args:
        share: Share of the rows, above 0 and at most 1; rounded up to whole rows.

    Raises:
        ValueError: If the share is out of range.
        TypeError: If it is not a number.
    """

    share: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("share", self.share)

    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """Return the gradient with rows of zeros."""
        dense = gradient.to_dense() if gradient.is_sparse else gradient.clone()
        rows = dense if dense.ndim else dense.reshape(1)  # a scalar is one row
        rows[: math.ceil(self.share * rows.shape[0])] = 0
        return dense


@contextmanager
def inject(
    named_parameters: Iterable[tuple[str, Tensor]],
    injection: Injection,
    *,
    step: int,
    rank: int | None = None,
) -> Iterator[None]:
    """Inject a fault into the block's backward passes.

    It acts at its steps only.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> with inject(model.named_parameters(), NaN(at=7, parameters="weight"), step=7):
        ...     model(torch.ones(4, 2)).sum().backward()
        >>> print(model.weight.grad, model.bias.grad)
        tensor([[nan, 4.]]) tensor([4.])

    Args:
        named_parameters: Pairs of name and parameter, from ``model.named_parameters()``.
        injection: The fault, with its steps and parameters.
        step: Number of the current step.
        rank: Rank of this process; when None, that of ``torch.distributed``, or 0 without it.

    Raises:
        ValueError: If the injection's pattern matches no trainable parameter, also at other steps.
    """
    targets = list(injection.targets(named_parameters).values())
    if rank is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
    hooked = targets if injection.is_due(step, rank) else []
    # The hook of a leaf gets its whole gradient, before it is accumulated and reduced.
    changes = [_change_at(injection, place, len(hooked)) for place in range(len(hooked))]
    handles = [p.register_hook(change) for p, change in zip(hooked, changes, strict=True)]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _change_at(injection: Injection, place: int, count: int) -> Callable[[Tensor], Tensor]:
    depth = place / (count - 1) if count > 1 else 0.0
    return lambda gradient: injection.change(gradient, depth)


def _with_first(gradient: Tensor, value: float) -> Tensor:
    changed = gradient.clone().coalesce() if gradient.is_sparse else gradient.clone()
    entries = changed._values() if changed.is_sparse else changed
    if entries.numel():
        entries[(0,) * entries.ndim] = value
    return changed


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
