"""Inputs and targets of a batch brought to zero mean and unit variance."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.introspection.batch import inputs_and_targets

#: Examples without which a batch is not divided.
LEAST_EXAMPLES = 8


class Scale(NamedTuple):
    """Mean and standard deviation of numbers, or of each feature."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, batch: Any) -> Scale | None:
        """Of a batch's targets: its second floating-point tensor; None if there is none."""
        target = inputs_and_targets(batch)[1]
        return None if target is None else cls.of_tensor(target)

    @classmethod
    def of_tensor(cls, x: Tensor) -> Scale:
        """Of all elements of a tensor."""
        x = x.detach().float()
        x = x[x.isfinite()]
        return cls(x.mean(), x.std(unbiased=False).clamp(min=torch.finfo(torch.float32).tiny))

    def apply(self, x: Tensor) -> Tensor:
        """Subtracts the one and divides by the other."""
        return ((x - self.mean) / self.deviation).to(x.dtype)


def prepared(batch: Any, change: Change, scale: Scale | None = None) -> Any:
    """The batch with standardised inputs or targets, where the change asks for it.

    Args:
        batch: Nested lists, tuples and dicts of tensors. Its first floating-point tensor counts as the inputs, its
            second as the targets.
        change: What is asked for.
        scale: Of the targets.
    """
    inputs, target = inputs_and_targets(batch)
    exchange: dict[int, Tensor] = {}
    if change.input and inputs is not None:
        exchange[id(inputs)] = _input_scale(inputs).apply(inputs)
    if change.target and scale is not None and target is not None:
        exchange[id(target)] = scale.apply(target)
    return _exchanged(batch, exchange) if exchange else batch


def _input_scale(x: Tensor) -> Scale:
    """Of each feature of a table; of all elements of anything else, or of a table too short to tell."""
    if x.ndim != 2 or len(x) < LEAST_EXAMPLES or not bool(x.isfinite().all()):
        return Scale.of_tensor(x)
    x = x.detach().float()
    deviation = x.std(0, unbiased=False)
    # A feature that never changes is only shifted.
    return Scale(x.mean(0), torch.where(deviation > 0, deviation, torch.ones_like(deviation)))


def has_targets(batch: Any) -> bool:
    """Whether there are floating-point targets."""
    return inputs_and_targets(batch)[1] is not None


def half(batch: Any) -> Any:
    """Every other example; all of a batch that is small, or whose examples cannot be told apart.

    Args:
        batch: Nested lists, tuples and dicts of tensors, all of the same length.
    """
    tensors = [t for t in _tensors(batch) if t.ndim]
    lengths = {len(t) for t in tensors}
    if len(lengths) != 1 or min(lengths) < LEAST_EXAMPLES:
        return batch
    return _exchanged(batch, {id(t): t[::2] for t in tensors})


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _exchanged(batch: Any, exchange: dict[int, Tensor]) -> Any:
    if isinstance(batch, dict):
        return type(batch)({key: _exchanged(value, exchange) for key, value in batch.items()})
    if isinstance(batch, (list, tuple)):
        parts = [_exchanged(part, exchange) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return exchange.get(id(batch), batch)
