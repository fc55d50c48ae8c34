"""Judging one step late, so that the device is never waited for, and what then happens on the device alone."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import apply_
from lightning_gradguard.engine import judging
from lightning_gradguard.engine.arguments import say
from lightning_gradguard.engine.evaluate import Evaluation, States, choose_states
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import Fault, Report
from lightning_gradguard.stats.sharding import local

if TYPE_CHECKING:
    from lightning_gradguard.engine.readback import PendingStep
    from lightning_gradguard.guard import Guard

#: Optimizers whose fused form skips on the device when ``found_inf`` is set; others ignore or refuse it.
_HONOUR = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


#: Optimizers whose ``found_inf`` is taken away after each step.
_HOOKED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def choose(
    lag: int | None, optimizer: torch.optim.Optimizer | None, device: torch.device, policy: Policy
) -> int:
    """The lag to use.

    Raises:
        ValueError: If ``lag`` is not None, 0 or 1, or is 1 with a policy that skips finite steps, which takes
            a verdict before the step.
    """
    validate_lag(lag)
    late = [f.value for f in Fault if f != Fault.NONFINITE and policy.response(f) == "skip"]
    if lag is None:
        return int(device.type != "cpu" and honours_found_inf(optimizer) and not late)
    if lag and late:
        raise ValueError(f"lag must be 0 with a policy that skips on {', '.join(late)}, got 1")
    if lag and not honours_found_inf(optimizer):
        say(
            "lag=1 with an optimizer that does not honour found_inf: a non-finite gradient is set to zero, which is "
            "no exact skip, since moments decay and weight decay acts; use fused=True, or lag=0"
        )
    return lag


def validate_lag(lag: object) -> None:
    """Raises ValueError unless ``lag`` is None, 0 or 1."""
    if isinstance(lag, bool) or lag not in (None, 0, 1):
        raise ValueError(f"lag must be None, 0 or 1, got {lag!r}")


def honours_found_inf(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether the optimizer skips its step on the device when its ``found_inf`` is 1."""
    return (
        optimizer is not None
        and type(optimizer) in _HONOUR
        and all(group.get("fused") for group in optimizer.param_groups)
    )


def judge_late(
    guard: Guard,
    outcome: Evaluation,
    before: States,
    states: States,
    answer: tuple[list[float], PendingStep] | None,
) -> Report:
    """What must be done with a step is done on the device, and the report is of the step before.

    Args:
        guard: Whose step it is.
        outcome: What the device made of the step.
        before: The states before it.
        states: The states after it.
        answer: Numbers of the step before, if they have come.

    Raises:
        GradientHalt: If the step before was one to halt on.
    """
    defuse(outcome, guard.watch.optimizer)
    guard._states = choose_states(outcome.stats.finite, states, before)
    guard.watch.schedule.settle(True)
    if answer is not None:
        _deliver(guard, *answer)
    if guard.report is None or has_blank_momentum(guard.watch.optimizer):
        # It is awaited: a fused optimizer cannot skip on the device before it has a state.
        answer = guard._mailbox.take()
        if answer is not None and _deliver(guard, *answer).skip:
            guard.watch.drop()
    assert guard.report is not None
    guard._ask()
    return dataclasses.replace(guard.report, skip=False)


def _deliver(guard: Guard, numbers: list[float], posted: PendingStep) -> Report:
    """The report of a step that came late; raises where it was one to halt on."""
    report = judging.report(guard, numbers, posted)
    if guard._halt is not None:
        # The coming step is not taken, also where the halt is no error and the optimizer is called.
        guard.watch.drop()
        forget(guard.watch.optimizer)
    guard._raise_if_halted(posted.step)
    return report


def defuse(outcome: Evaluation, optimizer: torch.optim.Optimizer | None) -> None:
    """Clips, and makes a non-finite step harmless, without asking the device whether it is one."""
    stats, _, clip = outcome
    if clip is not None:
        apply_(stats.gradients, clip.multipliers)
    if optimizer is not None and honours_found_inf(optimizer):
        _skip_on_device(optimizer, stats.finite)
        return
    for gradient in stats.gradients:
        if gradient is not None:
            # Multiplying by zero would keep a NaN.
            values = gradient._values() if gradient.layout == torch.sparse_coo else local(gradient)
            values.masked_fill_(~stats.finite.to(values.device), 0.0)


def forget(optimizer: torch.optim.Optimizer | None, *_: Any) -> None:
    """Takes away what `defuse` has set, after the step or where it is not taken."""
    if optimizer is not None:
        optimizer.__dict__.pop("found_inf", None)


def has_blank_momentum(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether the coming step is the first with momentum for any parameter.

    Fused SGD that skips it on the device leaves the new momentum uninitialised.
    """
    if optimizer is None or not honours_found_inf(optimizer):
        return False
    groups = [group for group in optimizer.param_groups if group.get("momentum")]
    return any(p.grad is not None and p not in optimizer.state for group in groups for p in group["params"])


def _skip_on_device(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Sets ``found_inf`` for the coming step alone."""
    bad = (~finite).to(torch.float32)
    # Two guards may judge the same step, of which one has clipped it.
    other = optimizer.__dict__.get("found_inf")
    optimizer.found_inf = bad if other is None else torch.maximum(other, bad)  # type: ignore[attr-defined]
    if optimizer not in _HOOKED:
        _HOOKED.add(optimizer)
        # It stays: a hook that removes itself breaks torch's walk over the hooks where there is another one.
        optimizer.register_step_post_hook(forget)
