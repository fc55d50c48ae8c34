"""The batch of a trial: standardized inputs or targets, and half of its examples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.introspection.batch import inputs_and_targets, map_tensors, tensors_of

#: Fewest examples of a batch that is halved, or whose features are standardized one by one.
MIN_EXAMPLES = 8


class Scale(NamedTuple):
    """Mean and standard deviation of a tensor, of all elements or of each feature."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of_targets(cls, batch: Any) -> Scale | None:
        """Return the scale of a batch's targets; None without floating-point targets."""
        target = inputs_and_targets(batch)[1]
        return None if target is None else cls.of_tensor(target)

    @classmethod
    def of_tensor(cls, x: Tensor) -> Scale:
        """Return the scale of all finite elements of a tensor."""
        x = x.detach().float()
        x = x[x.isfinite()]
        return cls(x.mean(), x.std(unbiased=False).clamp(min=torch.finfo(torch.float32).tiny))

    @classmethod
    def of_features(cls, x: Tensor) -> Scale:
        """Return the scale of each column of a table; of all elements if it is no table, or short."""
        if x.ndim != 2 or len(x) < MIN_EXAMPLES or not bool(x.isfinite().all()):
            return cls.of_tensor(x)
        x = x.detach().float()
        deviation = x.std(0, unbiased=False)
        # A feature that never changes is only shifted.
        return cls(x.mean(0), torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    def apply(self, x: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation."""
        return ((x - self.mean) / self.deviation).to(x.dtype)


def prepare_batch(batch: Any, change: Change, target_scale: Scale | None = None) -> Any:
    """Return the batch with standardized inputs or targets, where the change asks for it.

    Args:
        batch: Nested containers of tensors; see `inputs_and_targets` for which are the inputs and the targets.
        change: The change of the trial.
        target_scale: Mean and standard deviation of the targets, if these are standardized.
    """
    inputs, target = inputs_and_targets(batch)
    replaced: dict[int, Tensor] = {}
    if change.input and inputs is not None:
        replaced[id(inputs)] = Scale.of_features(inputs).apply(inputs)
    if change.target and target_scale is not None and target is not None:
        replaced[id(target)] = target_scale.apply(target)
    return map_tensors(batch, lambda tensor: replaced.get(id(tensor), tensor)) if replaced else batch


def has_targets(batch: Any) -> bool:
    """Return True if the batch has floating-point targets."""
    return inputs_and_targets(batch)[1] is not None


def half(batch: Any) -> Any:
    """Return every other example of a batch.

    A small batch, and one whose tensors differ in length, is returned whole.

    Args:
        batch: Nested containers of tensors, examples along the first dimension.
    """
    lengths = {len(tensor) for _, tensor in tensors_of(batch) if tensor.ndim}
    if len(lengths) != 1 or min(lengths) < MIN_EXAMPLES:
        return batch
    return map_tensors(batch, lambda tensor: tensor[::2] if tensor.ndim else tensor)
