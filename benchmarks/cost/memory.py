"""Memory of a guard: bytes by holder, found by following references."""

from __future__ import annotations

import gc
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Callable
from types import BuiltinFunctionType, CodeType, FrameType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradguard import Guard, SpikeClip
from lightning_gradguard.cli.cost import SyntheticTraining
from lightning_gradguard.engine.sampling_schedule import EAGER, REFRESH

#: Types that are not followed: they belong to the program, not to the guard.
_SHARED = (ModuleType, type, CodeType, FrameType, BuiltinFunctionType)

#: Types that hold numbers.
_KINDS = (Tensor, np.ndarray, array)


def after_steps(model: nn.Module, steps: int = EAGER + 2 * REFRESH) -> Guard:
    """Return a guard with SpikeClip after ordinary steps, with and without full evaluations."""
    training = SyntheticTraining(model)
    guard = Guard(model.named_parameters(), clipper=SpikeClip())
    for _ in range(steps):
        training.advance()
        training.restore()
        guard.step(loss=training.loss)
    return guard


def held(guard: Guard, kinds: tuple[type, ...] = _KINDS) -> Counter[str]:
    """Return bytes of tensors and arrays that a guard holds, by the attribute that reaches them first.

    Parameters, gradients and views into them belong to the model and are not counted.
    """
    parameters = guard.tracker.layout.parameters
    seen = {_memory(t) for p in parameters for t in (p, p.grad) if t is not None}
    # References back to the guard lead to nothing new.
    met: set[int] = {id(guard), *map(id, parameters)}
    found: Counter[str] = Counter()
    owners: dict[str, Any] = {f"tracker.{name}": value for name, value in vars(guard.tracker).items()}
    owners |= {name: value for name, value in vars(guard).items() if name != "tracker"}
    for owner, value in owners.items():
        for numbers in _reached(value, met):
            place = _memory(numbers)
            if place not in seen and isinstance(numbers, kinds):
                seen.add(place)
                found[owner] += _bytes(numbers)
    return +found


def python_bytes(make: Callable[[], object]) -> int:
    """Return bytes of Python objects that stay allocated while the result lives.

    Arrays of Python and NumPy are included, tensors are not.
    """
    gc.collect()
    tracemalloc.start()
    try:
        made = make()
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        del made
        gc.collect()
        return size - tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def _reached(root: object, met: set[int]) -> list[Any]:
    """Return the tensors and arrays newly reached from this object."""
    found, waiting = [], [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in met or isinstance(thing, _SHARED):
            continue
        met.add(id(thing))
        if isinstance(thing, _KINDS):
            found.append(thing)
        elif not (callable(thing) and hasattr(thing, "__globals__")):
            waiting += gc.get_referents(thing)
        else:
            waiting += [cell.cell_contents for cell in thing.__closure__ or ()]
    return found


def _memory(numbers: Any) -> int:
    if isinstance(numbers, Tensor):
        return numbers.untyped_storage().data_ptr() if numbers.layout == torch.strided else id(numbers)
    return id(numbers.base if isinstance(numbers, np.ndarray) and numbers.base is not None else numbers)


def _bytes(numbers: Any) -> int:
    if isinstance(numbers, Tensor):
        return numbers.untyped_storage().nbytes()
    return numbers.nbytes if isinstance(numbers, np.ndarray) else len(numbers) * numbers.itemsize
