"""Snapshot of one step, in the numbers that the rivals' rules use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """Measurements of one optimizer step, before it is taken.

    Lists run over the tensors that have a gradient, in the model's order.

    Attributes:
        step: Optimizer steps taken so far.
        score: Accuracy on the batch, or R squared for regression.
        names: Names of all tensors.
        is_weight: True where a tensor has two dimensions or more.
        mean_abs: Mean magnitude of each gradient.
        norms: L2 norm of each gradient.
        zeros: Share of each gradient's elements that are zero.
        zero_rows: Share of each gradient's rows that are all zero.
        sizes: Number of elements.
        updates: Mean magnitude of the last applied update over that of the weight before it; NaN at the first
            step.
        update_norms: The same with L2 norms.
    """

    step: int
    score: float
    names: tuple[str, ...]
    is_weight: tuple[bool, ...]
    mean_abs: tuple[float, ...]
    norms: tuple[float, ...]
    zeros: tuple[float, ...]
    zero_rows: tuple[float, ...]
    sizes: tuple[int, ...]
    updates: tuple[float, ...]
    update_norms: tuple[float, ...]

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Names of the tensors whose gradient holds NaN or Inf."""
        return tuple(n for n, v in zip(self.names, self.norms, strict=True) if not math.isfinite(v))

    @property
    def weights(self) -> tuple[int, ...]:
        """Indices of the tensors with two dimensions or more."""
        return tuple(i for i, w in enumerate(self.is_weight) if w)


@torch.no_grad()
def take(
    step: int, score: float, named: Sequence[tuple[str, Tensor]], before: Mapping[str, Tensor]
) -> Snapshot:
    """Measure the gradients of the parameters.

    Args:
        step: Optimizer steps taken so far.
        score: Accuracy on the batch.
        named: Names and parameters; those without a gradient are left out.
        before: Copies of the parameters before the last step; may be empty.
    """
    present = [(name, p) for name, p in named if p.grad is not None]
    numbers: list[Tensor] = []
    for name, parameter in present:
        gradient = parameter.grad.float()
        magnitude = gradient.abs()
        rows = magnitude.flatten(1).amax(1) if gradient.ndim >= 2 else magnitude.reshape(-1)
        old = before.get(name)
        if old is None:
            update = update_norm = magnitude.new_tensor(math.nan)
        else:
            moved = parameter.float() - old.float()
            update = moved.abs().mean() / old.float().abs().mean()
            update_norm = moved.norm() / old.float().norm()
        numbers.append(
            torch.stack(
                [
                    magnitude.mean(),
                    gradient.norm(),
                    (magnitude == 0).float().mean(),
                    (rows == 0).float().mean(),
                    update,
                    update_norm,
                ]
            )
        )
    table = torch.stack(numbers, 1).tolist() if numbers else [[]] * 6
    return Snapshot(
        step=step,
        score=score,
        names=tuple(name for name, _ in present),
        is_weight=tuple(p.ndim >= 2 for _, p in present),
        mean_abs=tuple(table[0]),
        norms=tuple(table[1]),
        zeros=tuple(table[2]),
        zero_rows=tuple(table[3]),
        sizes=tuple(p.numel() for _, p in present),
        updates=tuple(table[4]),
        update_norms=tuple(table[5]),
    )
