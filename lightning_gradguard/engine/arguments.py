"""The parts that a guard is put together from: what is there by default, and what is no part."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_gradguard.detectors import default_detectors as default_detectors
from lightning_gradguard.detectors.base import Detector
from lightning_gradguard.flight_recorder.recorder import Recorder
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import GradientWarning


def validate(detectors: object, clipper: object, policy: object) -> None:
    """Raises TypeError, with the mend, where one of a guard's parts is of the wrong kind."""
    if detectors is not None and not isinstance(detectors, Sequence):
        raise TypeError(f"detectors must be a sequence such as (NonFinite(), DepthTilt()), got {detectors!r}")
    parts = [("detectors", d, "NonFinite()") for d in detectors or ()]
    parts += [("clipper", clipper, "SpikeClip()")] if clipper is not None else []
    for name, part, example in parts:
        # Both have the same two methods; a detector says what fault it finds, too.
        of_its_kind = hasattr(part, "fault") == (name == "detectors")
        if isinstance(part, type) or not (hasattr(part, "init") and hasattr(part, "update") and of_its_kind):
            raise TypeError(
                f"{name} must be an instance with init and update, such as {example}, got {part!r}"
            )
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy, such as Policy.strict(), got {policy!r}")


def validate_options(monitor: object, recorder: object, **switches: object) -> None:
    """Raises ValueError for what `GradGuard` cannot make use of."""
    if monitor is not None and (not isinstance(monitor, str) or not monitor):
        raise ValueError(f"monitor must be the name of a logged metric such as 'val_acc', got {monitor!r}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if recorder is not None and not isinstance(recorder, Recorder):
        raise ValueError(f"recorder must be a Recorder, such as Recorder(), got {recorder!r}")


def as_scalar(loss: Tensor | float | None) -> Tensor | None:
    """The loss as a scalar tensor; ValueError, with the mend, if it is none."""
    if loss is None or (isinstance(loss, Tensor) and loss.numel() == 1):
        return loss
    if isinstance(loss, numbers.Real):
        return torch.tensor(float(loss), dtype=torch.float32)
    shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    raise ValueError(f"loss must be a scalar, such as losses.mean(), got {shape}")


def say_what_is_off(detectors: Sequence[Detector]) -> None:
    """Says which detectors can tell nothing without a loss."""
    silent = [type(d).__name__ for d in detectors if getattr(d, "needs_loss", False)]
    if silent:
        say(f"no loss was given to Guard.step, so {', '.join(silent)} cannot tell progress and are off")


def say(message: str) -> None:
    """Warns, on one rank."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        warnings.warn(f"GradGuard: {message}", GradientWarning, stacklevel=4)
