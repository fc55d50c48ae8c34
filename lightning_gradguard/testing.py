"""Fault injection into gradients, for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_gradguard.injections import DeadRows as DeadRows
from lightning_gradguard.injections import Inf as Inf
from lightning_gradguard.injections import Injection as Injection
from lightning_gradguard.injections import NaN as NaN
from lightning_gradguard.injections import Spike as Spike
from lightning_gradguard.injections import Vanishing as Vanishing
from lightning_gradguard.injections import inject as inject

if TYPE_CHECKING:
    from lightning_gradguard.callbacks.fault_injector import FaultInjector as FaultInjector

__all__ = ["DeadRows", "FaultInjector", "Inf", "Injection", "NaN", "Spike", "Vanishing", "inject"]


def __getattr__(name: str) -> Any:
    # The callback needs Lightning, which a loop of your own does not.
    if name == "FaultInjector":
        from lightning_gradguard.callbacks.fault_injector import FaultInjector

        return FaultInjector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
