"""Checks of a guard's arguments."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.detectors import default_detectors as default_detectors
from lightning_gradguard.detectors.base import Detector, traits_of
from lightning_gradguard.engine.step_context import StepContext
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import Fault


def validate_parts(detectors: object, clipper: object, policy: object) -> None:
    """Check the types of a guard's parts.

    Raises:
        TypeError: If a detector or the clipper lacks ``init`` or ``update``, or the policy is not a `Policy`.
    """
    if detectors is not None and not isinstance(detectors, Sequence):
        raise TypeError(f"detectors must be a sequence such as (NonFinite(), DepthTilt()), got {detectors!r}")
    parts = [("detectors", d, "NonFinite()") for d in detectors or ()]
    parts += [("clipper", clipper, "SteadyClip()")] if clipper is not None else []
    for name, part, example in parts:
        # Both have the same two methods; only a detector names a fault.
        of_its_kind = hasattr(part, "fault") == (name == "detectors")
        if name == "detectors" and hasattr(part, "fault") and not isinstance(part.fault, Fault):
            raise TypeError(
                f"fault of {type(part).__name__} must be a Fault, such as Fault.custom('quantized'), got {part.fault!r}"
            )
        if isinstance(part, type) or not (hasattr(part, "init") and hasattr(part, "update") and of_its_kind):
            raise TypeError(
                f"{name} must be an instance with init and update, such as {example}, got {part!r}"
            )
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy, such as Policy.strict(), got {policy!r}")


def as_scalar(loss: Tensor | float | None) -> Tensor | None:
    """Return the loss as a scalar tensor, or None.

    Raises:
        ValueError: If it is not a scalar.
    """
    if loss is None or (isinstance(loss, Tensor) and loss.numel() == 1):
        return loss
    if isinstance(loss, numbers.Real):
        return torch.tensor(float(loss), dtype=torch.float32, device="cpu")
    shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    raise ValueError(f"loss must be a scalar, such as losses.mean(), got {shape}")


def as_context(context: StepContext | None, batch: object) -> StepContext:
    """Return the context of a step, with its batch.

    Raises:
        TypeError: If it is not a `StepContext`.
    """
    if context is None:
        return StepContext(batch=batch)
    if not isinstance(context, StepContext):
        raise TypeError(f"context must be a StepContext, such as StepContext(batch=batch), got {context!r}")
    return context if batch is None else dataclasses.replace(context, batch=batch)


def message_without_loss(detectors: Iterable[Detector]) -> str:
    """Return the warning for steps without a loss.

    It is empty if no detector needs one.
    """
    silent = [type(d).__name__ for d in detectors if traits_of(d).needs_loss]
    if not silent:
        return ""
    return (
        f"no loss was given to Guard.step, so {', '.join(silent)} cannot measure progress and are off. "
        "Call guard.step(loss=loss)."
    )


def short_repr(instance: object, **arguments: tuple[Any, Any]) -> str:
    """Return a ``repr`` with the arguments that are not default.

    >>> short_repr(3, lag=(1, None), clipper=(None, None), policy=(Policy(patience=9), None))
    'int(lag=1, policy=Policy(patience=9))'

    Args:
        instance: The object that is shown.
        **arguments: Value and default of each argument, in the order of the signature.
    """
    shown = [
        f"{name}={_short(value)}"
        for name, (value, default) in arguments.items()
        # By their text: arrays and tensors have no truth value.
        if value is not default and repr(value) != repr(default)
    ]
    return f"{type(instance).__name__}({', '.join(shown)})"


def _short(value: Any) -> str:
    """Return a ``repr``, of dataclasses a short one."""
    if isinstance(value, (tuple, list)):
        parts = ", ".join(map(_short, value))
        return f"[{parts}]"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    fields = {f.name: f for f in dataclasses.fields(value) if f.repr}
    defaults = {
        name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for name, f in fields.items()
    }
    return short_repr(value, **{name: (getattr(value, name), defaults[name]) for name in fields})
