"""Skip a bad step on the device, for ``lag=1``."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import apply_
from lightning_gradguard.engine.evaluate import Evaluation
from lightning_gradguard.engine.warn import warn
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import Fault
from lightning_gradguard.stats.sharding import local

#: Optimizers whose fused form skips its step on the device when ``found_inf`` is set; others ignore or refuse it.
_HONOUR_FOUND_INF = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)

#: Optimizers that have the hook which removes ``found_inf`` after each step.
_HOOKED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def choose_lag(
    lag: int | None, optimizer: torch.optim.Optimizer | None, device: torch.device, policy: Policy
) -> int:
    """Return the lag to use, 0 or 1.

    Args:
        lag: The user's choice; None for the cheapest that still skips exactly.
        optimizer: The optimizer, or None.
        device: Device of the gradients.
        policy: The policy. Skipping finite steps takes a verdict before the step, so it needs lag 0.

    Raises:
        ValueError: If ``lag`` is not None, 0 or 1, or is 1 with a policy that skips finite steps.
    """
    validate_lag(lag)
    skipping = [f.value for f in Fault.known() if f != Fault.NONFINITE and policy.response(f) == "skip"]
    if lag is None:
        # A spike is over with its step: one step late there is nothing left to clip.
        clips_spikes = policy.response(Fault.SPIKE) == "clip"
        able = device.type != "cpu" and honours_found_inf(optimizer)
        return int(able and not skipping and not clips_spikes)
    if lag and skipping:
        raise ValueError(f"lag must be 0 with a policy that skips on {', '.join(skipping)}, got 1")
    if lag and not honours_found_inf(optimizer):
        warn(
            "lag=1 with an optimizer that ignores found_inf cannot skip exactly: a non-finite gradient is set to zero, "
            "but moments and weight decay still update. Use fused=True, or lag=0."
        )
    return lag


def validate_lag(lag: object) -> None:
    """Raise ValueError unless ``lag`` is None, 0 or 1."""
    if isinstance(lag, bool) or lag not in (None, 0, 1):
        raise ValueError(f"lag must be None, 0 or 1, got {lag!r}")


def honours_found_inf(optimizer: torch.optim.Optimizer | None) -> bool:
    """Return True if the optimizer honours ``found_inf``.

    It then skips its step on the device when that is 1.
    """
    return (
        optimizer is not None
        and type(optimizer) in _HONOUR_FOUND_INF
        and all(group.get("fused") for group in optimizer.param_groups)
    )


def apply_on_device(
    evaluation: Evaluation, optimizer: torch.optim.Optimizer | None, *, clipping: bool = True
) -> None:
    """Clip, and make a non-finite step harmless.

    Nothing is read on the host.

    Args:
        evaluation: Results on the device.
        optimizer: The optimizer, or None.
        clipping: False if the clipper is not in force.
    """
    stats, _, clip = evaluation
    if clip is not None and clipping:
        apply_(stats.gradients, clip.multipliers)
    if optimizer is not None and honours_found_inf(optimizer):
        _set_found_inf(optimizer, stats.finite)
        return
    for gradient in stats.gradients:
        if gradient is not None:
            # Multiplying by zero would keep a NaN.
            values = gradient._values() if gradient.layout == torch.sparse_coo else local(gradient)
            values.masked_fill_(~stats.finite.to(values.device), 0.0)


def clear_found_inf(optimizer: torch.optim.Optimizer | None, *_: Any) -> None:
    """Remove what `apply_on_device` set."""
    if optimizer is not None:
        optimizer.__dict__.pop("found_inf", None)


def has_new_momentum(optimizer: torch.optim.Optimizer | None) -> bool:
    """Return True if momentum begins with this step.

    Fused SGD that skips such a step on the device leaves the new momentum uninitialised.
    """
    if optimizer is None or not honours_found_inf(optimizer):
        return False
    groups = [group for group in optimizer.param_groups if group.get("momentum")]
    return any(p.grad is not None and p not in optimizer.state for group in groups for p in group["params"])


def _set_found_inf(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Set ``found_inf`` for the coming step alone."""
    bad = (~finite).to(torch.float32)
    # Two guards may judge the same step, and one of them may have clipped it.
    other = optimizer.__dict__.get("found_inf")
    optimizer.found_inf = bad if other is None else torch.maximum(other, bad)  # type: ignore[attr-defined]
    if optimizer not in _HOOKED:
        _HOOKED.add(optimizer)
        # The hook stays: one that removes itself breaks torch's loop over the hooks if there is another.
        optimizer.register_step_post_hook(clear_found_inf)
