"""Whether a number is infinite only because its format ends: the same is computed anew in a wider one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.doctor.batch import tensors_of


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
