"""Gathers what the doctor needs to know; read from the device at once, since it happens once in a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.diagnosis.causes import ranking as causes
from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause, Diagnosis, Timeline
from lightning_gradguard.diagnosis.nan_origin import Origin, Place, find_origin, origin_in_batch
from lightning_gradguard.diagnosis.trials import runner as trying
from lightning_gradguard.engine.arguments import say
from lightning_gradguard.engine.history import History
from lightning_gradguard.engine.parameter_tracker import ParameterTracker
from lightning_gradguard.engine.readback import read
from lightning_gradguard.introspection.batch import find_nonfinite, inputs_and_targets, tensors_of
from lightning_gradguard.results import Fault, Finding, Severity
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.norms import weight_means, weight_norms

if TYPE_CHECKING:
    from lightning_gradguard.engine.fault_tracker import Decision
    from lightning_gradguard.engine.readback import PendingStep
    from lightning_gradguard.guard import Guard
    from lightning_gradguard.stats.layout import Layout

#: Newest steps that a diagnosis keeps for its picture.
PICTURED = 128


def explain(guard: Guard, verdict: Decision, posted: PendingStep) -> Diagnosis | None:
    """Says what is new of a step, and gives the diagnosis of what is critical; None where nothing is."""
    for finding in verdict.messages:
        if finding is not verdict.halt:
            say(describe(guard, finding, posted.batch))
    grave = [f for f in verdict.report.findings if f.severity == Severity.CRITICAL]
    if not grave:
        return None
    return diagnose(guard, posted.outcome.stats, verdict.halt or grave[0], posted.batch)


def diagnose(guard: Guard, stats: GradStats, finding: Finding, batch: object) -> Diagnosis:
    """The diagnosis of a critical finding; a bare one where the doctor fails, for it must never end a training."""
    try:
        case = gather(guard, stats, finding, batch)
        if finding.fault == Fault.NONFINITE:
            guard.origin = trace(guard, batch)
            case = replace(case, origin=guard.origin)
        diagnosis = causes.diagnose(case)
        if guard.trials and guard.subject is not None:
            diagnosis = trying.try_fixes(diagnosis, case, guard.subject)
        diagnosis = replace(diagnosis, course=course_of(guard.history, stats.layout, finding))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        problem = f"the causes could not be examined ({type(error).__name__}: {reason})"
        say(problem)
        unknown = (Cause.UNKNOWN,)
        diagnosis = Diagnosis(
            finding.fault,
            finding.step,
            finding.parameters,
            (str(finding),),
            unknown,
            {Cause.UNKNOWN: problem},
        )
    return replace(diagnosis, signs=(*diagnosis.signs, *guard.notes))


def describe(guard: Guard, finding: Finding, batch: object) -> str:
    """What is said of a finding; of a step that is not finite also where that came from.

    The first one of a run is replayed for it; of others the batch is looked at.
    """
    if finding.fault != Fault.NONFINITE:
        return str(finding)
    try:
        origin = trace(guard, batch, replay=guard.origin is None)
    except Exception:  # nothing that is merely said may end a training
        return str(finding)
    guard.origin = origin or guard.origin
    return str(finding) if origin is None or origin.place == Place.UNKNOWN else f"{finding}. {origin}"


def trace(guard: Guard, batch: object, *, replay: bool = True) -> Origin | None:
    """Where the newest step's first number that is not finite came from; None if nothing is known of its batch."""
    try:
        subject = None if guard.subject is None else guard.subject()
    except ValueError:  # the training step does more than compute a loss
        subject = None
    if subject is None:
        return origin_in_batch(batch)
    scale = math.nan if guard.letter is None else guard.letter.loss_scale
    return find_origin(subject, scale=scale, replay=replay)


def course_of(history: History, layout: Layout, finding: Finding) -> Timeline:
    """The newest steps as a picture shows them: the layers' weights, and what the finding names of other modules.

    Args:
        history: The newest steps; its tensors are the layout's.
        layout: The order of the tensors, and which are layers.
        finding: What was found.
    """
    layers = layout.layer_indices or frozenset(layout.order)
    modules = {_module(layout.names[i]) for i in layers}
    named = {name for name in finding.parameters if _module(name) not in modules}
    rows = [i for i in layout.order if i in layers or layout.names[i] in named]
    table = {name: column[-PICTURED:] for name, column in history.table().items()}
    with np.errstate(divide="ignore"):
        rms = np.log10(table["norms"][:, rows] / np.sqrt(np.maximum(np.array(history.numel)[rows], 1)))
    # In a history NaN is no gradient, and infinity what is not finite.
    rms = np.where(np.isnan(rms), -np.inf, np.where(rms == np.inf, np.nan, rms))
    return Timeline(
        steps=tuple(table["step"].tolist()),
        layers=tuple(layout.names[i] for i in rows),
        rms_log10=tuple(map(tuple, rms.T.tolist())),
        skipped=tuple(table["skip"].tolist()),
        clipped=tuple(((table["scale"] < 1) & ~table["skip"]).tolist()),
        losses=tuple(table["loss"].tolist()),
    )


def gather(guard: Guard, stats: GradStats, finding: Finding, batch: object = None) -> DiagnosticContext:
    """The facts of the step of a critical finding, tensors from input to output.

    Args:
        guard: What judged it.
        stats: The step's statistics.
        finding: What is critical.
        batch: What the loss was computed from, if known.
    """
    watch, letter = guard.watch, guard.letter
    assert letter is not None
    calm = guard.calm or letter
    layout, order = watch.layout, watch.layout.order
    # Of sharded tensors all ranks have to take part, so this goes before what may fail on one of them.
    weights = weight_norms(layout)
    means = weight_means(layout) if finding.fault == Fault.DEAD else None
    (input_rms, target_rms), bad_rows = _look_at(batch)
    settings = _settings(watch)
    return DiagnosticContext(
        finding=finding,
        names=tuple(layout.names[i] for i in order),
        shapes=tuple(tuple(layout.parameters[i].shape) for i in order),
        gradients_log10=tuple(_log10(v) for v in _pick(stats.norms, order)),
        weight_norms=_pick(weights, order),
        update_ratios=_pick(stats.updates, order),
        findings=guard.findings,
        initial_weight_norms=_pick(watch.initial_weights, order),
        graph_summary=watch.graph_summary,
        tilt=_known(calm.tilt),
        time_tilt=_known(
            next((s.value for s in calm.sights if s.fault == Fault.VANISHING_IN_TIME), math.nan)
        ),
        has_loss=stats.has_loss,
        loss_start=calm.loss_first if calm.loss_first == calm.loss_first else calm.loss_start,
        loss_now=calm.loss_mean,
        loss_last=letter.loss,
        optimizer="" if watch.optimizer is None else type(watch.optimizer).__name__,
        learning_rates=tuple(
            float(rate) for group in settings if isinstance(rate := group.get("lr"), (int, float))
        ),
        defaults=settings[0] if settings else {},
        dtypes=_dtypes(stats, watch),
        steps=guard.counts["judged"],
        clipper="" if guard.clipper is None else repr(guard.clipper),
        policy=repr(guard.policy),
        input_rms=input_rms,
        target_rms=target_rms,
        weight_means=None if means is None else _pick(means, order),
        bad_rows=bad_rows,
    )


def _look_at(batch: object) -> tuple[tuple[float | None, float | None], tuple[int, ...] | None]:
    """Root mean square of the batch's first two floating-point tensors, and rows with a non-finite element in any.

    None for each that is not there; ``((None, None), None)`` where the batch is unknown or holds no such tensor.
    """
    tensors = [t for _, t in tensors_of(batch) if t.is_floating_point() and t.layout == torch.strided]
    if not any(t.ndim and t.numel() for t in tensors):
        return (None, None), None
    rows = tuple(sorted({row for entry in find_nonfinite(batch) for row in entry.rows}))
    inputs, targets = (_rms(t) for t in inputs_and_targets(batch))
    return (inputs, targets), rows


def _rms(x: Tensor | None) -> float | None:
    if x is None:
        return None
    squares = x.detach().float().square()
    return _known(read(squares[squares.isfinite()].mean().sqrt().reshape(1))[0])


def _dtypes(stats: GradStats, watch: ParameterTracker) -> tuple[str, ...]:
    """Of the gradients, and of what autocast computes on their way."""
    own = {str(g.dtype).removeprefix("torch.") for g in stats.gradients if g is not None}
    return tuple(
        sorted(own | (watch.graph_summary.dtypes if watch.graph_summary is not None else frozenset()))
    )


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _pick(vector: Tensor, order: Sequence[int]) -> tuple[float, ...]:
    numbers = read(vector)
    return tuple(numbers[i] for i in order)


def _settings(watch: ParameterTracker) -> list[dict[str, Any]]:
    """The optimizer's groups without their parameters, plain numbers only."""
    groups = watch.optimizer.param_groups if watch.optimizer is not None else []
    plain = []
    for group in groups:
        kept = {
            k: read(v.reshape(1))[0] if isinstance(v, Tensor) and v.numel() == 1 else v
            for k, v in group.items()
            if k != "params"
        }
        plain.append({k: v for k, v in kept.items() if isinstance(v, (int, float, str, tuple, type(None)))})
    return plain


def _log10(norm: float) -> float:
    return math.log10(norm) if 0 < norm < math.inf else (-math.inf if norm == 0 else norm)
