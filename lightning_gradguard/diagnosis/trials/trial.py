"""Run one trial: change, virtual steps, measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.diagnosis.trials.change import Change, Scale, SwappedForward, half, prepare_batch
from lightning_gradguard.diagnosis.trials.weights import add_gates_, initialise_, rewind_
from lightning_gradguard.introspection.gradient_profile import dead_share, depth_tilt, whole_profile
from lightning_gradguard.introspection.layer_calls import LayerStructure, StructureRecorder
from lightning_gradguard.introspection.probes import SandboxedSequenceProbe
from lightning_gradguard.introspection.sandbox import SandboxedStep

#: Share of a layer's units without a gradient from which the layer is dead: the limit of `DeadUnits`.
_DEAD = 0.9
#: Least 1 - momentum in the learning rate that stands for a velocity: a smaller one would take too large a step.
_MIN_DAMPING = 1e-3
_CHECKPOINTS = (
    "the model recomputes its activations in the backward pass (activation checkpointing), so its functions cannot be "
    "replaced for a trial"
)


@dataclass(frozen=True)
class TrialResult:
    """Measurements of one trial.

    Attributes:
        loss: Loss on the whole batch after the virtual steps; inf if a loss was not finite or a layer died on the way,
            NaN if no step was taken.
        tilt: Depth tilt of the first pass, decades; None with too few layers that get a gradient.
        time_tilt: Gradient at the last tenth of a sequence over that at the first, decades; None without a sequence.
        live: Number of layers that get a gradient.
        structure: Structure of the forward pass, of a trial that replaces no functions.
        passes: Forward passes that the trial took.
        profile: log10(‖g‖/‖w‖) of each layer in the first pass; see `whole_profile`.
        start: Loss of the first pass, before any step.
    """

    loss: float
    tilt: float | None
    time_tilt: float | None
    live: int
    structure: LayerStructure
    passes: int
    profile: tuple[float, ...] = ()
    start: float = math.nan


def run_trial(
    step: SandboxedStep,
    change: Change,
    *,
    layers: Sequence[str],
    passes: int,
    structure: LayerStructure | None = None,
    start_norms: Mapping[str, float] | None = None,
    halve: bool = True,
) -> TrialResult:
    """Make a change and take virtual steps.

    The training is unchanged afterwards. In memory there is one copy of the parameters, buffers and batch, their
    gradients, and an optimizer's state.

    Args:
        step: The training step that the change is tried on.
        change: The change.
        layers: Names of the layers' weights, input first.
        passes: Forward and backward passes: each but the last with a virtual step on half of the batch, the last on
            all of it. With 1 there is no step.
        structure: Structure of the unchanged forward pass; an empty change needs none.
        start_norms: L2 norms that parameters are brought to beforehand, by name; see `weights.rewind_`.
        halve: False where half of the batch is no batch, such as a graph with its adjacency matrix.

    Raises:
        ValueError: If the step has no optimizer, or the module cannot be copied.
        Exception: Any error that the changed model raises.
    """
    module, structure = step.module, structure or LayerStructure()
    if step.optimizer is None:
        raise ValueError("a trial needs the optimizer of the training, and the step has none")
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise ValueError("a scripted module cannot be copied")
    names = {id(p): name for name, p in module.named_parameters()}
    target_scale = Scale.of_targets(step.batch) if change.target else None
    with step.sandbox() as copy:
        rewind_(module, start_norms or {})
        apply_change_(module, change, structure)
        recorder = StructureRecorder(module)
        mode = SwappedForward(module, change, structure) if change.changes_forward else recorder
        parameters = dict(module.named_parameters())
        optimizer = virtual_optimizer(step.optimizer, names, parameters, change)
        sequence = SandboxedSequenceProbe(module)

        def backward(batch: Any) -> float:
            optimizer.zero_grad()
            batch = prepare_batch(copy(batch), change, target_scale)
            # Activations that are computed again in the backward pass would be computed without the change.
            swapped = change.changes_forward
            hooks = (
                torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINTS) if swapped else nullcontext()
            )
            with mode, hooks:
                loss = step.loss_of(batch)
            if swapped and _has_reentrant_checkpoint(loss):
                raise ValueError(_CHECKPOINTS)
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())

        some = half(step.batch) if halve else step.batch
        taken, loss = 1, math.nan
        now = start = backward(some)
        profile = whole_profile(parameters, layers)
        live = [decades for decades in profile if math.isfinite(decades)]
        time_tilt = sequence.take()
        for _ in range(passes - 2):
            if not math.isfinite(now):
                break
            optimizer.step()
            taken, now = taken + 1, backward(some)
        recorded = recorder.structure
        if not math.isfinite(now):
            loss = math.inf
        elif passes > 1:
            optimizer.step()
            taken, now = taken + 1, backward(step.batch)
            # A net that the steps have killed gives the same output for everything, which can be a low loss.
            died = dead_share(parameters, layers) > _DEAD
            loss = now if math.isfinite(now) and not died else math.inf
    return TrialResult(
        loss=loss,
        tilt=depth_tilt(live),
        time_tilt=time_tilt,
        live=len(live),
        structure=recorded,
        passes=taken,
        profile=tuple(profile),
        start=start,
    )


def apply_change_(module: nn.Module, change: Change, structure: LayerStructure) -> None:
    """Change the module's weights and layers in place."""
    if change.gates is not None:
        add_gates_(module, change.gates)
    if change.initialise is not None:
        initialise_(module, change.initialise, structure)


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            return True
        pending += [child for child, _ in node.next_functions]
    return False


def virtual_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    parameters: Mapping[str, Tensor],
    change: Change,
) -> torch.optim.Optimizer:
    """Return a fresh optimizer over the copies.

    A velocity takes 1 / (1 - momentum) steps to build up, so a few steps would show nothing of it. Plain descent stands
    for it, at the rate that a steady gradient comes to; and also for an optimizer that cannot be made again.
    """
    known = set(names.values())
    new = [p for name, p in parameters.items() if name not in known]  # of layers that the change added
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
            plain.append({**decay, "lr": lr / max(1 - momentum, _MIN_DAMPING), "params": own})
    try:
        if any(group.get("momentum") for group in groups) or isinstance(optimizer, torch.optim.LBFGS):
            return torch.optim.SGD(plain)
        return type(optimizer)(groups)  # type: ignore[call-arg]
    except Exception:
        return torch.optim.SGD(plain)
