"""One attempt: a change made to a copy of the training, and what the gradients and the loss do with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.diagnosis.trials.batches import Scale, half, prepared
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.diagnosis.trials.profile import TimeProfile, dead_share, depth_tilt, whole_profile
from lightning_gradguard.diagnosis.trials.swaps import Swaps
from lightning_gradguard.diagnosis.trials.weights import add_gates_, initialise_, rewind_
from lightning_gradguard.introspection.layer_calls import Plan, Recorder
from lightning_gradguard.introspection.sandbox import sandbox

#: Of a velocity, for the rate that stands in for it: one that is damped less never comes to an end.
_LEAST_DAMPING = 1e-3
#: Share of a layer's units without a gradient from which it is dead: the limit of `DeadUnits`.
_DEAD = 0.9
_CHECKPOINTS = "the model computes its activations again in the backward pass (checkpointing)"


@dataclass(frozen=True)
class SandboxedStep:
    """What remedies are tried on.

    Attributes:
        module: The model; its parameters are the optimizer's.
        loss_of: Batch to scalar loss with its graph: the training step without its host. It is called while the
            module is in a `sandbox`, so it may change what the module holds.
        batch: What was trained on last.
        optimizer: Whose settings the virtual steps take.
        number: The batch's number, if known.
        norms: L2 norms that parameters are brought to beforehand, by name: of weights that have run away or shrunk,
            those they began with; see `weights.rewind_`.
        divisible: Whether half of the batch is a batch.
    """

    module: nn.Module
    loss_of: Callable[[Any], Tensor]
    batch: Any
    optimizer: torch.optim.Optimizer
    number: int | None = None
    norms: Mapping[str, float] = field(default_factory=dict)
    divisible: bool = True


@dataclass(frozen=True)
class TrialResult:
    """What an attempt gave.

    Attributes:
        loss: On the whole batch after the virtual steps, which saw half of it; inf if any was not finite or a layer is
            dead then, NaN if no step was taken.
        tilt: Depth tilt of the first pass, decades; None with too few layers that get a gradient.
        time_tilt: Gradient at the last tenth of a sequence over that at the first, decades; None without one.
        dead: Largest share of a layer's rows without any gradient.
        live: Layers that get a gradient.
        plan: What the pass showed, of an attempt that swaps nothing.
        passes: Forward passes that it took.
        start: Loss of the first pass, before any step.
        profile: log10(‖g‖/‖w‖) of each layer in the first pass, as `whole_profile` gives it.
    """

    loss: float
    tilt: float | None
    time_tilt: float | None
    dead: float
    live: int
    plan: Plan
    passes: int
    profile: tuple[float, ...] = ()
    start: float = math.nan


def attempt(
    subject: SandboxedStep, change: Change, *, layers: Sequence[str], passes: int, plan: Plan | None = None
) -> TrialResult:
    """Makes a change in a sandbox and takes virtual steps; the training is left as it was.

    In memory there is one copy of the parameters, buffers and batch, their gradients, and an optimizer's state.

    Args:
        subject: What it is tried on.
        change: What is changed.
        layers: Names of the layers' weights, input first.
        passes: Forward and backward passes, all but the last with a virtual step; or a single one with that.
        plan: Of an attempt with an empty change; not needed for that one.

    Raises:
        Exception: Whatever the model raises when it is so changed.
    """
    module, plan = subject.module, plan or Plan()
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise ValueError("a scripted module cannot be copied")
    names = {id(p): name for name, p in module.named_parameters()}
    scale = Scale.of(subject.batch) if change.target else None
    with gradients_kept(subject), sandbox(module) as copy, torch.enable_grad():
        rewind_(module, subject.norms)
        apply_(module, change, plan)
        recorder = Recorder(module)
        mode = Swaps(module, change, plan) if change.swaps else recorder
        parameters = dict(module.named_parameters())
        optimizer = _virtual_optimizer(subject.optimizer, names, parameters, change)
        times = TimeProfile(module)
        loss, first = math.nan, None
        learn, taken = half(subject.batch) if subject.divisible else subject.batch, 0
        for _ in range(max(1, passes - 1)):
            taken += 1
            optimizer.zero_grad()
            batch = prepared(copy(learn), change, scale)
            with mode, _without_checkpoints(change):
                scalar = subject.loss_of(batch)
            if change.swaps:
                _refuse_checkpoints(scalar)
            scalar.backward()  # type: ignore[no-untyped-call]
            if first is None:
                profile = whole_profile(parameters, layers)
                live = [decades for decades in profile if math.isfinite(decades)]
                start = float(scalar.detach())
                first = depth_tilt(live), times.tilt(), dead_share(parameters, layers), len(live)
            if not math.isfinite(float(scalar.detach())):
                loss = math.inf
                break
            optimizer.step()
        plan = recorder.plan
        if passes > 1 and loss != math.inf:
            taken += 1
            optimizer.zero_grad()
            with mode:
                scalar = subject.loss_of(prepared(copy(subject.batch), change, scale))
            scalar.backward()  # type: ignore[no-untyped-call]
            # A net that the steps have killed says the same of everything, which is a low loss after wild steps.
            died = dead_share(parameters, layers) > _DEAD
            loss = float(scalar.detach())
            loss = loss if math.isfinite(loss) and not died else math.inf
    assert first is not None
    return TrialResult(loss, *first, plan=plan, passes=taken, profile=tuple(profile), start=start)


@contextmanager
def gradients_kept(subject: SandboxedStep) -> Iterator[None]:
    """Takes the gradients aside: what holds the parameters themselves, such as a closure, would add to them."""
    own = [p for group in subject.optimizer.param_groups for p in group["params"]]
    held = [(p, p.grad) for p in {id(p): p for p in (*own, *subject.module.parameters())}.values()]
    groups = [dict(group) for group in subject.optimizer.param_groups]
    for parameter, _ in held:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in held:
            parameter.grad = gradient
        for group, before in zip(subject.optimizer.param_groups, groups, strict=True):
            group.update(before)


def _without_checkpoints(change: Change) -> AbstractContextManager[object]:
    """Refuses activation checkpointing where functions are swapped: what is computed again later is not."""
    return torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINTS) if change.swaps else nullcontext()


def _refuse_checkpoints(loss: Tensor) -> None:
    """The same for the reentrant kind, which is one node of the graph."""
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            raise ValueError(_CHECKPOINTS)
        pending += [upper for upper, _ in node.next_functions]


def apply_(module: nn.Module, change: Change, plan: Plan) -> None:
    """Makes that part of a change which is one of the module's weights and layers, in place."""
    if change.gates is not None:
        add_gates_(module, change.gates)
    if change.initialise is not None:
        initialise_(module, change.initialise, plan)


def _virtual_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    parameters: Mapping[str, Tensor],
    change: Change,
) -> torch.optim.Optimizer:
    """One of the same kind and settings over the copies, without a past; plain descent where it cannot be made.

    A velocity takes 1 / (1 - momentum) steps to build up, so few steps would show nothing of it: plain descent, at
    the rate that a steady gradient comes to.
    """
    known = set(names.values())
    new = [p for name, p in parameters.items() if name not in known]  # of layers that were put in
    groups, plain = [], []
    for group in optimizer.param_groups:
        own = [
            parameters[name] for p in group["params"] if (name := names.get(id(p), "")) in parameters
        ] + new
        if own:
            lr, new = change.rate * float(group.get("lr", 0.0)), []
            momentum = group.get("momentum", 0.0) if change.momentum is None else change.momentum
            decay = {"weight_decay": change.decay * group["weight_decay"]} if "weight_decay" in group else {}
            groups.append({**group, **decay, "lr": lr, "params": own})
            plain.append({**decay, "lr": lr / max(1 - momentum, _LEAST_DAMPING), "params": own})
    try:
        if any(group.get("momentum") for group in groups) or isinstance(optimizer, torch.optim.LBFGS):
            return torch.optim.SGD(plain)
        return type(optimizer)(groups)  # type: ignore[call-arg]
    except Exception:
        return torch.optim.SGD(plain)
