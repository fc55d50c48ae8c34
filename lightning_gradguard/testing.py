"""Faults for your tests: gradients that go wrong at the steps you choose, each time in the same way.

`FaultInjector` brings one into a Trainer, `inject` into any loop. What goes wrong is an `Injection`: `NaN`, `Inf`,
`Spike`, `Vanishing` or `DeadRows`. It is written while backward runs, so that a fault of one rank reaches the others as
a real one does: through the reduction of the gradients, after accumulation, and scaled where a `GradScaler` is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.injections import DeadRows, Inf, Injection, NaN, Spike, Vanishing

if TYPE_CHECKING:
    from lightning_gradguard.callbacks.injecting import FaultInjector as FaultInjector

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
        from lightning_gradguard.callbacks.injecting import FaultInjector

        return FaultInjector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
