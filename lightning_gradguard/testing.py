"""What can go wrong with gradients in a test: a `NaN`, an `Inf`, a `Spike`, `Vanishing`, `DeadRows`."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.stats.parameters import select

if TYPE_CHECKING:
    from lightning_gradguard.callbacks.fault_injector import FaultInjector as FaultInjector


@dataclass(frozen=True, kw_only=True)
class Injection(ABC):
    """Something that goes wrong with gradients: configuration only, the same at each of its steps.

    Args:
        at: Step, or steps such as ``range(50, 100)``.
        parameters: Shell-style pattern of the names concerned, such as ``"encoder.*"``.
        rank: Process in which it goes wrong; None for all of them.

    Raises:
        ValueError: For a step or a rank that is not a whole number from 0, or no step at all.
        TypeError: For a pattern that is no string.
    """

    at: int | Sequence[int]
    parameters: str = "*"
    rank: int | None = None

    def __post_init__(self) -> None:
        steps = (self.at,) if isinstance(self.at, int) else self.at
        if not isinstance(steps, Sequence) or not steps or not all(map(_is_count, steps)):
            raise ValueError(f"at must be a step from 0, or steps such as range(50, 100), got {self.at!r}")
        if not isinstance(self.parameters, str):
            raise TypeError(
                f'parameters must be a pattern of names such as "encoder.*", got {self.parameters!r}'
            )
        if self.rank is not None and not _is_count(self.rank):
            raise ValueError(f"rank must be a whole number from 0, or None for all, got {self.rank!r}")
        object.__setattr__(self, "at", steps if isinstance(steps, range) else tuple(steps))

    @abstractmethod
    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """What a gradient becomes, in a tensor of its own.

        Args:
            gradient: Of one parameter, as backward has just computed it.
            depth: Place of the parameter among those concerned, in the order of the model: 0 the first, 1 the last.
        """

    def is_due(self, step: int, rank: int) -> bool:
        """Whether it goes wrong now and here.

        Args:
            step: The step under way.
            rank: Of this process.
        """
        assert isinstance(self.at, Sequence)
        return step in self.at and self.rank in (None, rank)

    def targets(self, named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Name to parameter, of those concerned.

        Args:
            named_parameters: Pairs of name and parameter, as ``model.named_parameters()`` gives them.

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
                f"parameters must match one that is trained, got {self.parameters!r}: all are frozen"
            )
        return trained


@dataclass(frozen=True, kw_only=True)
class NaN(Injection):
    """One NaN in each gradient concerned, its first entry.

    Example:
        >>> import torch
        >>> print(NaN(at=7).change(torch.ones(2, 2), depth=0.0))
        tensor([[nan, 1.],
                [1., 1.]])
    """

    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """Writes the NaN."""
        return _with_first(gradient, math.nan)


@dataclass(frozen=True, kw_only=True)
class Inf(Injection):
    """One infinity in each gradient concerned, its first entry.

    Example:
        >>> import torch
        >>> print(Inf(at=7).change(torch.ones(2), depth=0.0))
        tensor([inf, 1.])
    """

    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """Writes the infinity."""
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
        ValueError: If it is not.
    """

    factor: float = 1e3

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("factor", self.factor)

    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """Multiplies."""
        return gradient * self.factor


@dataclass(frozen=True, kw_only=True)
class Vanishing(Injection):
    """Gradients that fall towards the input: the first by ``decades`` powers of ten, the last by none.

    gradient · 10^(-decades · (1 - depth)), evenly over the parameters concerned.

    Example:
        >>> import torch
        >>> vanishing = Vanishing(at=range(50, 200), decades=4.0)
        >>> [f"{vanishing.change(torch.ones(1), depth).item():g}" for depth in (0.0, 0.5, 1.0)]
        ['0.0001', '0.01', '1']

    Args:
        decades: Positive and finite.

    Raises:
        ValueError: If it is not.
    """

    decades: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("decades", self.decades)

    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """Scales by depth."""
        return gradient * 10 ** (-self.decades * (1 - depth))


@dataclass(frozen=True, kw_only=True)
class DeadRows(Injection):
    """Units that get no gradient: the first rows of each tensor are zero.

    Example:
        >>> import torch
        >>> print(DeadRows(at=range(99), share=0.5).change(torch.ones(3), depth=0.0))
        tensor([0., 0., 1.])

    Args:
        share: Part of the rows, above 0 and up to 1; rounded up to whole rows.

    Raises:
        ValueError: If it is not.
    """

    share: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.share, bool)
            or not isinstance(self.share, (int, float))
            or not 0 < self.share <= 1
        ):
            raise ValueError(f"share must be above 0 and at most 1, got {self.share!r}")

    def change(self, gradient: Tensor, depth: float) -> Tensor:
        """Zeroes rows; a number alone counts as one."""
        dense = gradient.to_dense() if gradient.is_sparse else gradient.clone()
        rows = dense if dense.ndim else dense.reshape(1)
        rows[: math.ceil(self.share * rows.shape[0])] = 0
        return dense


def _with_first(gradient: Tensor, value: float) -> Tensor:
    changed = gradient.clone().coalesce() if gradient.is_sparse else gradient.clone()
    entries = changed._values() if changed.is_sparse else changed
    if entries.numel():
        entries[(0,) * entries.ndim] = value
    return changed


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


__all__ = ["DeadRows", "FaultInjector", "Inf", "Injection", "NaN", "Spike", "Vanishing", "inject"]


@contextmanager
def inject(
    named_parameters: Iterable[tuple[str, Tensor]],
    injection: Injection,
    *,
    step: int,
    rank: int | None = None,
) -> Iterator[None]:
    """Lets backward passes inside it go wrong, if the step is one of the injection's.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> with inject(model.named_parameters(), NaN(at=7, parameters="weight"), step=7):
        ...     model(torch.ones(4, 2)).sum().backward()
        >>> print(model.weight.grad, model.bias.grad)
        tensor([[nan, 4.]]) tensor([4.])

    Args:
        named_parameters: Pairs of name and parameter, as ``model.named_parameters()`` gives them.
        injection: What goes wrong, where and when.
        step: The step under way.
        rank: This process; asked of ``torch.distributed`` when None, and 0 where there is only one.

    Raises:
        ValueError: If the injection's pattern matches no parameter that is trained, also at other steps.
    """
    targets = list(injection.targets(named_parameters).values())
    if rank is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
    hooked = targets if injection.is_due(step, rank) else []
    # The hook of a leaf sees its whole gradient, before it is accumulated and reduced.
    changes = [_changing(injection, place, len(hooked)) for place in range(len(hooked))]
    handles = [p.register_hook(change) for p, change in zip(hooked, changes, strict=True)]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _changing(injection: Injection, place: int, count: int) -> Callable[[Tensor], Tensor]:
    depth = place / (count - 1) if count > 1 else 0.0
    return lambda gradient: injection.change(gradient, depth)


def __getattr__(name: str) -> Any:
    # Loops need no Lightning, which the callback does.
    if name == "FaultInjector":
        from lightning_gradguard.callbacks.fault_injector import FaultInjector

        return FaultInjector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
