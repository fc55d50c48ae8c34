"""Try fixes of a NaN or Inf: with the fix, forward and backward pass must be finite, and stay so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Diagnosis, Remedy
from lightning_gradguard.diagnosis.nan_origin import Origin, Place, find_origin
from lightning_gradguard.diagnosis.operation_fixes import find_operation_fixes
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.diagnosis.trials.operation_patch import PatchedOperation, change_tensor_
from lightning_gradguard.diagnosis.trials.trial import virtual_optimizer
from lightning_gradguard.diagnosis.wording import count
from lightning_gradguard.introspection.batch import is_finite, map_tensors, tensors_of
from lightning_gradguard.introspection.sandbox import SandboxedStep

#: Forward passes of all trials together, each with a backward pass.
MAX_PASSES = 30
#: Virtual steps of a trial; one more pass measures the loss.
_STEPS = 3
#: Operations in a row that are mended together: what one of them hides, the next shows.
_TOGETHER = 3
_UNTRIED = "not tried: it cannot be made on a copy of the model"


class CureResult(NamedTuple):
    """Result of a trial.

    Attributes:
        loss: Loss after the virtual steps; NaN or Inf if a pass was not finite.
        passes: Forward passes that it took.
        used: False if the operation did not run, so that nothing was changed.
    """

    loss: float
    passes: int
    used: bool = True

    @property
    def cured(self) -> bool:
        """True if every pass was finite."""
        return self.used and math.isfinite(self.loss)


def is_cure(fix: Remedy) -> bool:
    """Return True for a fix of NaN or Inf that can be tried."""
    return fix.change is not None and bool(fix.change.fields & {"operation", "batch"})


def try_cures(
    diagnosis: Diagnosis, context: DiagnosticContext, sandboxed_step_of: Callable[[], SandboxedStep]
) -> Diagnosis:
    """Return the diagnosis with the fixes that cure first.

    The operation that made the first NaN or Inf is replaced in the sandbox, as the fix says. A fix cures if the loss
    and all gradients are finite then, and stay finite over some virtual steps. Where the replay of the fixed step
    finds another operation, both are fixed together. All trials together take at most `MAX_PASSES` passes.

    Args:
        diagnosis: The diagnosis, with the fixes that its evidence suggests.
        context: The facts that it rests on.
        sandboxed_step_of: Function that returns the step to try them on; raises ValueError with the reason if the step
            cannot be run by itself.
    """
    try:
        step = sandboxed_step_of()
    except ValueError as error:
        return dataclasses.replace(diagnosis, trials=(f"No fix was tried: {str(error).rstrip('.')}.",))
    cured: list[Remedy] = []
    untried: list[Remedy] = []
    failed: list[Remedy] = []
    passes = 0
    for fix in diagnosis.remedies:
        if not is_cure(fix) or passes + _STEPS + 1 > MAX_PASSES:
            untried.append(dataclasses.replace(fix, note=fix.note or _UNTRIED))
            continue
        tried, taken = _try(fix, step, MAX_PASSES - passes)
        passes += taken
        is_finite_loss = tried.loss is not None and math.isfinite(tried.loss)
        (untried if not tried.tried else cured if is_finite_loss else failed).append(tried)
    cured.sort(key=lambda fix: len(fix.how.splitlines()))  # one operation before several
    number = len(cured) + len(failed)
    if not number:
        sentences = ["No fix was tried: none of them can be made on a copy of the model."]
    else:
        sentences = [
            f"{count(number, 'fix was', 'fixes were')} tried on copies of the weights and the batch, in "
            f"{count(passes, 'pass', 'passes')}; the training itself is unchanged.",
            f"A fix cures if loss and gradients are finite with it, and stay finite over {_STEPS} trial steps.",
        ]
    if failed and not cured:
        sentences.insert(0, "None of the fixes that were tried cures this step by itself.")
    return dataclasses.replace(diagnosis, remedies=(*cured, *untried, *failed), trials=tuple(sentences))


def run_cure(step: SandboxedStep, changes: tuple[Change, ...], steps: int = _STEPS) -> CureResult:
    """Make changes, and take virtual steps.

    The training is unchanged afterwards.

    Args:
        step: The training step.
        changes: The changes, made together.
        steps: Number of virtual steps.

    Raises:
        ValueError: If the step has no optimizer, or the module cannot be copied.
        Exception: Any error that the changed step raises.
    """
    module, taken, used, now = step.module, 0, True, math.nan
    if step.optimizer is None:
        raise ValueError("a trial needs the optimizer of the training, and the step has none")
    names = {id(p): name for name, p in module.named_parameters()}
    with step.sandbox() as copy:
        for change in changes:
            if change.operation is not None:
                change_tensor_(module, change.operation)
        parameters = dict(module.named_parameters())
        optimizer = virtual_optimizer(step.optimizer, names, parameters, Change())
        for number in range(steps + 1):
            optimizer.zero_grad()
            with _patched(changes) as modes:
                loss = step.loss_of(_batch(copy(step.batch), changes))
                taken, now = taken + 1, float(loss.detach())
                used = all(mode.used for mode in modes)
                if not (used and math.isfinite(now)):
                    break
                # With the change too, where activations are recomputed. `Tensor.backward` would leave the mode.
                torch.autograd.backward(loss)
            gradients = [p.grad for p in parameters.values() if p.grad is not None]
            if not all(is_finite(gradient) for gradient in gradients):
                now = math.nan
                break
            if number < steps:
                optimizer.step()
    return CureResult(now, taken, used)


def _try(fix: Remedy, step: SandboxedStep, budget: int) -> tuple[Remedy, int]:
    """Return the fix with what a trial of it showed, and the passes that it took."""
    assert fix.change is not None
    changes: tuple[Change, ...] = (fix.change,)
    names, hows, passes = [fix.name], [fix.how], 0
    while True:
        try:
            result = run_cure(step, changes)
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".")[:120]
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return dataclasses.replace(fix, note=f"could not be tried: {kind}{reason}"), passes + 1
        passes += result.passes
        if result.cured:
            note = f"forward and backward pass are finite over {_STEPS} trial steps"
            name, how = " + ".join(dict.fromkeys(names)), "\n".join(dict.fromkeys(hows))
            made = dataclasses.replace(fix, name=name, how=how, tried=True)
            return dataclasses.replace(made, loss=result.loss, note=note), passes
        if not result.used:
            return dataclasses.replace(
                fix, note="could not be tried: the operation did not run again"
            ), passes
        # What is left may be another operation, with a fix of its own.
        following = _following(step, changes) if budget - passes > 2 * (_STEPS + 2) else None
        passes += following is not None
        if following is None or following[1] is None or len(changes) >= _TOGETHER:
            where = f"; the next comes {following[0]}" if following is not None and following[0] else ""
            return dataclasses.replace(
                fix, tried=True, loss=math.inf, note=f"NaN or Inf stays{where}"
            ), passes
        further = following[1]
        assert further.change is not None
        changes = (*changes, further.change)
        names.append(further.name)
        hows.append(further.how)


def _following(step: SandboxedStep, changes: tuple[Change, ...]) -> tuple[str, Remedy | None] | None:
    """Return where the next NaN comes from once the changes are made, and a fix of it."""
    first = [True]

    def loss_of(batch: Any) -> Tensor:
        if first:
            first.clear()
            for change in changes:
                if change.operation is not None:
                    change_tensor_(step.module, change.operation)
        with _patched(changes):
            return step.loss_of(_batch(batch, changes))

    try:
        origin: Origin = find_origin(dataclasses.replace(step, loss_of=loss_of))
    except Exception:
        return None
    if not origin.located or origin.facts is None:
        return (f"from {origin.place}" if origin.place in (Place.BATCH, Place.OUTSIDE) else ""), None
    node = origin.operation if origin.place == Place.BACKWARD else ""
    # Another fix of the same operation stands for itself.
    known = {
        (change.operation.function, change.operation.site)
        for change in changes
        if change.operation is not None
    }
    fixes = find_operation_fixes(origin.facts, node, given=origin.given)
    own = [(fix, fix.change.operation) for fix in fixes if fix.change is not None]
    further = [fix for fix, patch in own if patch is not None and (patch.function, patch.site) not in known]
    where = f"from `{origin.operation}`" + (f" at {origin.line}" if origin.line else "")
    return where, next(iter(further), None)


@contextmanager
def _patched(changes: tuple[Change, ...]) -> Iterator[list[PatchedOperation]]:
    """Replace the operations of the changes."""
    patches = [change.operation for change in changes if change.operation is not None]
    modes = [PatchedOperation(patch) for patch in patches if patch.site is not None]
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield modes


def _batch(batch: Any, changes: tuple[Change, ...]) -> Any:
    """Return the batch without NaN or Inf, as the changes say."""
    ways = {change.batch for change in changes}
    if "drop" in ways:
        rows = {len(t) for _, t in tensors_of(batch) if t.ndim}
        if len(rows) != 1:
            raise ValueError("the tensors of the batch differ in length, so no rows can be left out")
        bad = [
            ~t.isfinite().reshape(len(t), -1).all(1)
            for _, t in tensors_of(batch)
            if t.ndim and not is_finite(t)
        ]
        keep = ~torch.stack(bad).any(0) if bad else slice(None)
        if bad and not bool(keep.any()):  # type: ignore[union-attr]
            raise ValueError("every row of the batch holds NaN or Inf")
        return map_tensors(batch, lambda t: t[keep] if t.ndim else t)
    if "fill" in ways:
        return map_tensors(batch, lambda t: t.nan_to_num(0.0, 0.0, 0.0) if t.is_floating_point() else t)
    return batch
