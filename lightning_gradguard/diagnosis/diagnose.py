"""Diagnose a critical finding.

Gather the facts, name the causes, try fixes. This happens once in a run, so it may read from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.diagnosis.causes import find_causes
from lightning_gradguard.diagnosis.causes.data import inputs_out_of_scale
from lightning_gradguard.diagnosis.context import LARGE_INPUTS, OUTLYING, DiagnosticContext, finite_median
from lightning_gradguard.diagnosis.diagnosis import Cause, Diagnosis, Remedy, Timeline
from lightning_gradguard.diagnosis.first_pass import measure_first_pass
from lightning_gradguard.diagnosis.fixes import (
    BIASED_VARIANCE,
    DROP_LAST,
    FINITE_STATISTIC,
    PROBLEMS,
    STANDARD_INPUT,
    find_fixes,
)
from lightning_gradguard.diagnosis.nan_origin import Origin, Place, find_origin, origin_in_batch
from lightning_gradguard.diagnosis.rendering import mistake_to_markdown, trial_result
from lightning_gradguard.diagnosis.symptoms import find_symptoms
from lightning_gradguard.diagnosis.trials import runner
from lightning_gradguard.diagnosis.wording import count, further_reading, headline
from lightning_gradguard.engine.history import History
from lightning_gradguard.engine.parameter_tracker import RateHistory
from lightning_gradguard.engine.readback import read
from lightning_gradguard.engine.step_context import StepContext
from lightning_gradguard.engine.step_record import StepRecord
from lightning_gradguard.introspection.autograd_graph import GraphSummary
from lightning_gradguard.introspection.batch import find_nonfinite, inputs_and_targets, tensors_of
from lightning_gradguard.introspection.graph_problems import GraphProblem, Problem
from lightning_gradguard.introspection.sandbox import SandboxedStep
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import Fault, Finding, Report, Severity
from lightning_gradguard.stats.grad_stats import GradStats
from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.norms import weight_means, weight_norms

#: Rows from which the median row tells what is usual.
_FEW_ROWS = 8
#: First and newest steps that are compared, and steps from which on a sequence is long enough to be padded.
_COMPARED, _LONG = 3, 10
#: Newest steps that a diagnosis keeps for its picture.
PICTURED = 128


@dataclass(frozen=True)
class GuardFacts:
    """Facts from the guard at a critical finding.

    Attributes:
        stats: Statistics of the step.
        record: Its numbers on the host.
        last_finite: Numbers of the newest step that was finite; ``record`` if there was none.
        findings: All findings so far, oldest first.
        history: The newest steps.
        layout: Names and order of the P tensors.
        initial_weights: float32 [P], weight norms at the start.
        graph_summary: Summary of the newest autograd graph, or None.
        optimizer: The optimizer, or None.
        judged: Steps judged so far.
        clipper: The clipper in words; empty without one.
        policy: The policy in words.
        rates: Course of the learning rate.
    """

    stats: GradStats
    record: StepRecord
    last_finite: StepRecord
    findings: tuple[Finding, ...]
    history: History
    layout: Layout
    initial_weights: Tensor
    graph_summary: GraphSummary | None
    optimizer: torch.optim.Optimizer | None
    judged: int
    clipper: str
    policy: str
    rates: RateHistory = field(default_factory=RateHistory)


def diagnose(
    facts: GuardFacts, finding: Finding, context: StepContext, origin: Origin | None = None
) -> Diagnosis:
    """Diagnose a finding.

    With sharded parameters every rank has to call it.

    Args:
        facts: What the guard knows.
        finding: The finding.
        context: What the caller knows of the step.
        origin: Source of a non-finite value, if it was traced.
    """
    # This comes first: sharded ranks take part in it together, and what follows may fail on one of them.
    known = replace(build_context(facts, finding, context.batch), origin=origin)
    if context.sandboxed_step is not None and any(inputs_out_of_scale(known)):
        known = replace(known, **_as_given(context.sandboxed_step))
    diagnosis = diagnose_context(known)
    if context.run_trials and context.sandboxed_step is not None:
        diagnosis = runner.try_fixes(diagnosis, known, context.sandboxed_step)
    return replace(
        diagnosis,
        course=timeline_of(facts.history, facts.stats.layout, finding),
        signs=(*diagnosis.signs, *context.notes),
    )


def _as_given(build_step: Callable[[], SandboxedStep]) -> dict[str, Any]:
    """Return the RMS of what the first layer is given, and of the loss's targets.

    A module may scale its batch before. Nothing is returned that cannot be measured.
    """
    try:
        measured = measure_first_pass(build_step())
    except Exception:  # the training step does more than compute a loss
        return {}
    sizes = {"input_rms": measured.input_rms, "target_rms": measured.target_rms}
    return {name: size for name, size in sizes.items() if math.isfinite(size)}


def diagnose_context(context: DiagnosticContext) -> Diagnosis:
    """Diagnose from the facts alone, without trials.

    Args:
        context: The facts at the step of the finding.
    """
    causes = find_causes(context)
    return Diagnosis(
        fault=context.finding.fault,
        step=context.finding.step,
        parameters=context.finding.parameters,
        signs=find_symptoms(context),
        causes=tuple(cause for cause, _ in causes),
        evidence=dict(causes),
        remedies=find_fixes(context, [cause for cause, _ in causes]),
        measure=context.finding.measure,
    )


def undiagnosed(finding: Finding, problem: str, notes: tuple[str, ...] = ()) -> Diagnosis:
    """Return a bare diagnosis after diagnosing failed.

    Args:
        finding: The critical finding.
        problem: Why its causes are not known.
        notes: Further symptoms.
    """
    return Diagnosis(
        finding.fault,
        finding.step,
        finding.parameters,
        (str(finding), *notes),
        (Cause.UNKNOWN,),
        {Cause.UNKNOWN: problem},
    )


def diagnose_ruined(finding: Finding, least_rows: float) -> tuple[Diagnosis, str]:
    """Diagnose running statistics that became NaN or Inf while loss and gradients were finite.

    Args:
        finding: The finding, which names them.
        least_rows: Samples in the smallest batch so far; infinite if it is not known.

    Returns:
        The diagnosis, and the text of a warning.
    """
    named = ", ".join(f"`{name}`" for name in finding.parameters[:3])
    became = f"{named} became NaN or Inf in a step whose loss and gradients were finite."
    seen = (
        became
        + " The guard has restored it; without it, the NaN stays, and shows as soon as the statistic is used."
    )
    evidence = f"{became} A pass of the model writes to it, and no gradient depends on that."
    fixes = [FINITE_STATISTIC]
    if least_rows == 1:
        evidence += " The smallest batch had one sample, and the unbiased variance of one sample is 0 / 0."
        fixes = [DROP_LAST, BIASED_VARIANCE, FINITE_STATISTIC]
    cause = Cause.NORMALIZATION
    diagnosis = Diagnosis(
        fault=finding.fault,
        step=finding.step,
        parameters=finding.parameters,
        signs=(seen,),
        causes=(cause,),
        evidence={cause: evidence},
        remedies=tuple(fixes),
    )
    return diagnosis, f"{evidence}\n  {seen.removeprefix(became).strip()} Fix to try first: {fixes[0].name}."


def trace_nonfinite(context: StepContext, loss_scale: float, *, replay: bool = True) -> Origin | None:
    """Find the source of the first non-finite value.

    None if nothing is known of its batch.

    Args:
        context: What the caller knows of the step.
        loss_scale: Scale of the gradient scaler; NaN without one.
        replay: Replay the training step. If False, only the batch is searched.
    """
    try:
        step = None if context.sandboxed_step is None else context.sandboxed_step()
    except ValueError:  # the training step does more than compute a loss
        step = None
    if step is None:
        return origin_in_batch(context.batch)
    return find_origin(step, scale=loss_scale, replay=replay)


def problem_as_markdown(problem: GraphProblem, batch: object = None) -> str:
    """Return a mistake that the graph shows as Markdown, as `Diagnosis.to_markdown` does a diagnosis.

    Args:
        problem: The mistake.
        batch: Input of the loss, if known.
    """
    return mistake_to_markdown(problem.text, *_cause_and_fix(problem, batch))


def describe_problem(problem: GraphProblem, batch: object = None) -> str:
    """Return the warning for a mistake that the graph shows.

    Args:
        problem: The mistake.
        batch: Input of the loss, if known.
    """
    cause, fix = _cause_and_fix(problem, batch)
    # No diagnosis holds the cause, so its name stands here as code compares it.
    return f"{problem.text}\n  Most likely cause: {cause}. Fix to try first: {fix.name}: {fix.how}"


def _cause_and_fix(problem: GraphProblem, batch: object) -> tuple[Cause, Remedy]:
    if problem.kind == Problem.LARGE_START:
        (inputs, _), _ = _measure_batch(batch)
        if inputs is not None and inputs > LARGE_INPUTS:
            return Cause.UNNORMALIZED_INPUT, STANDARD_INPUT
    return PROBLEMS[problem.kind]


def describe(
    finding: Finding,
    origin: Origin | None,
    policy: Policy,
    report: Report,
    diagnosis: Diagnosis | None = None,
    clipped_since: int | None = None,
) -> str:
    """Return the warning for a finding.

    It says what was found, where and since when; then the evidence, the most likely cause and the first fix with its
    code; then what happens now, and where to read more. A fault that was warned of before and is now critical gets a
    shorter one, which does not repeat that warning.

    Args:
        finding: The finding.
        origin: Source of a non-finite value, if it is known.
        policy: Policy of the guard.
        report: Report of the step.
        diagnosis: Its causes and fixes, if they are known.
        clipped_since: Step from which on the policy has gradients clipped; None before that.
    """
    measure = finding.measure or finding.detector
    if finding.limit == 0:  # the value is a count of things of which there should be none
        evidence = f"Number of {measure}: {finding.value:.3g}"
    else:
        evidence = f"{measure[:1].upper()}{measure[1:]}: {finding.value:.3g} (limit {finding.limit:.3g})"
    if finding.fault == Fault.NONFINITE and finding.parameters:
        tensors = count(int(finding.value), "tensor")
        what = f"{tensors} {'has' if finding.value == 1 else 'have'} NaN or Inf gradients"
    elif finding.fault == Fault.NONFINITE:
        what = "The loss is NaN or Inf"
    else:
        what = f"{headline(finding.fault, measure)}. {evidence}"
    is_critical = finding.severity == Severity.CRITICAL and finding.fault != Fault.NONFINITE
    # Without patience the first warning is critical already.
    is_escalation = is_critical and policy.patience > 0
    if is_escalation:
        where = finding.place.removeprefix(f"{finding.fault.value} ")
        lines = [
            f"{finding.fault.value}: now critical, after {count(report.step - finding.step, 'step')} ({where})."
        ]
        lines.append(f"{evidence}.")
    else:
        lines = [f"{finding.place}.", f"{what}."]
    if origin is not None and origin.place != Place.UNKNOWN:
        lines.append(f"{str(origin).removesuffix('.')}.")
    if diagnosis is not None:
        lines += _advice(diagnosis, brief=is_escalation)
    if is_critical and not is_escalation:
        lines.append("It is critical.")
    lines.append(_action(finding, policy, report, clipped_since))
    tags, page = further_reading(finding.fault)
    more = f"Read more: guard.diagnosis, {tags[0]} and gradguard/diagnosis (Text tab) in TensorBoard, and {page}."
    if policy.response(finding.fault) == "warn" and finding.fault != Fault.SPIKE:
        more += f' Policy(respond={{"{finding.fault}": "halt"}}) halts and explains.'
    lines.append(more)
    return "\n  ".join(lines)


def _advice(diagnosis: Diagnosis, *, brief: bool) -> list[str]:
    """Return lines with the most likely cause, the first fix, and a smaller one.

    Args:
        diagnosis: The causes and fixes.
        brief: Leave out the code of a fix that was not tried; an earlier warning has it.
    """
    cause, fixes = diagnosis.causes[0], diagnosis.remedies
    sentences = [f"Most likely cause: {cause.value.replace('_', ' ')}."] if cause != Cause.UNKNOWN else []
    if not fixes:
        return sentences
    first, smaller = fixes[0], _smaller_fix(fixes)
    lines = [" ".join([*sentences, f"Fix to try first: {first.name}."])]
    if brief and not first.tried:
        return lines
    lines += _code(first)
    if first.tried:
        lines.append(trial_result(first))
    elif smaller is not None:
        lines += [f"A smaller change, which may be enough: {smaller.name}.", *_code(smaller)]
    return lines


def _smaller_fix(fixes: Sequence[Remedy]) -> Remedy | None:
    """Return the smallest of the fixes, if it is smaller than the first; None where sizes are not known."""
    first, *others = fixes
    if first.change is None:
        return None
    known = [(fix.change.size, fix) for fix in others if fix.change is not None]
    size, fix = min(known, key=lambda pair: pair[0], default=((), first))
    return fix if size and size < first.change.size else None


def _code(fix: Remedy) -> list[str]:
    return [f"  {line}" for line in fix.how.splitlines()]


def _action(finding: Finding, policy: Policy, report: Report, clipped_since: int | None) -> str:
    """Return what happens now, and what will if the fault lasts."""
    response = policy.response(finding.fault)
    if report.skip:
        action = "The step is skipped: weights and optimizer state are unchanged."
    elif report.scale < 1:
        before, after = f"{report.total_norm:.3g}", f"{report.clipped_norm:.3g}"
        action = f"Gradients are clipped from norm {before} to {after}; training goes on."
    else:
        action = "Training goes on."
    if response == "skip":
        action += f" After {policy.max_consecutive_skips} such steps in a row, the next one halts."
    elif response == "clip":
        begin = "the next step" if clipped_since is None else f"step {clipped_since}"
        action += f" Gradients are clipped from {begin} on, until {_steps_without(policy.patience)}."
    elif response == "rollback" and finding.fault == Fault.NONFINITE:
        action += f" After {policy.max_consecutive_skips} such steps in a row, the next one rolls back."
    elif response in ("halt", "rollback") and finding.fault not in (Fault.NONFINITE, Fault.SPIKE):
        action += f" If this lasts {policy.patience} further steps, the policy responds with {response!r}."
    return action


def _steps_without(patience: int) -> str:
    """Return when the response "clip" ends, in words."""
    return f"{count(patience, 'step')} have passed without this fault" if patience else "this fault is over"


def timeline_of(history: History, layout: Layout, finding: Finding) -> Timeline:
    """Return the newest steps for a picture.

    Rows are the layers' weights, and tensors of other modules that the finding names.

    Args:
        history: The newest steps; its tensors are the layout's.
        layout: Order of the tensors, and which of them are layers.
        finding: The critical finding.
    """
    layers = layout.layer_indices or frozenset(layout.order)
    modules = {_module(layout.names[i]) for i in layers}
    named = {name for name in finding.parameters if _module(name) not in modules}
    rows = [i for i in layout.order if i in layers or layout.names[i] in named]
    table = {name: column[-PICTURED:] for name, column in history.tensors().items()}
    numel = torch.tensor(history.numel, dtype=torch.float64, device="cpu").clamp(min=1)
    rms = (table["norms"][:, rows] / numel[rows].sqrt()).log10()
    # In a history NaN means no gradient, and infinity one that is not finite.
    rms = torch.where(rms.isnan(), -math.inf, torch.where(rms == math.inf, math.nan, rms))
    return Timeline(
        steps=tuple(table["step"].tolist()),
        layers=tuple(layout.names[i] for i in rows),
        rms_log10=tuple(map(tuple, rms.T.tolist())),
        skipped=tuple(table["skip"].tolist()),
        clipped=tuple(((table["scale"] < 1) & ~table["skip"]).tolist()),
        losses=tuple(table["loss"].tolist()),
    )


def build_context(facts: GuardFacts, finding: Finding, batch: object = None) -> DiagnosticContext:
    """Build the context for causes and fixes.

    Tensors are in order from input to output.

    With sharded parameters every rank has to call it.

    Args:
        facts: What the guard knows.
        finding: The critical finding.
        batch: Input of the loss, if known.
    """
    layout, order = facts.layout, facts.layout.order
    stats, record, last = facts.stats, facts.record, facts.last_finite
    # All ranks take part in these, so they come before anything that may fail on one of them.
    weights = weight_norms(layout)
    means = weight_means(layout) if finding.fault == Fault.DEAD else None
    (input_rms, target_rms), bad_rows = _measure_batch(batch)
    outlying = _outlying_rows(batch) if input_rms else 0.0
    settings = _settings(facts.optimizer)
    norms, losses = _recent(facts.history)
    dtypes = {str(g.dtype).removeprefix("torch.") for g in stats.gradients if g is not None}
    if facts.graph_summary is not None:  # those that autocast computes in
        dtypes |= facts.graph_summary.dtypes
    time_tilt = next((r.value for r in last.results if r.fault == Fault.VANISHING_IN_TIME), math.nan)
    return DiagnosticContext(
        finding=finding,
        names=tuple(layout.names[i] for i in order),
        shapes=tuple(tuple(layout.parameters[i].shape) for i in order),
        gradients_log10=tuple(_log10(v) for v in _in_order(stats.norms, order)),
        weight_norms=_in_order(weights, order),
        update_ratios=_in_order(stats.updates, order),
        findings=facts.findings,
        initial_weight_norms=_in_order(facts.initial_weights, order),
        graph_summary=facts.graph_summary,
        tilt=_known(last.tilt),
        time_tilt=_known(time_tilt),
        has_loss=stats.has_loss,
        loss_start=last.loss_start if math.isnan(last.loss_first) else last.loss_first,
        loss_now=last.loss_mean,
        loss_last=record.loss,
        optimizer="" if facts.optimizer is None else type(facts.optimizer).__name__,
        learning_rates=tuple(
            float(rate) for group in settings if isinstance(rate := group.get("lr"), (int, float))
        ),
        defaults=settings[0] if settings else {},
        dtypes=tuple(sorted(dtypes)),
        steps=facts.judged,
        clipper=facts.clipper,
        policy=facts.policy,
        input_rms=input_rms / outlying if input_rms and outlying > OUTLYING else input_rms,
        outlying_rows=outlying,
        target_rms=target_rms,
        weight_means=None if means is None else _in_order(means, order),
        bad_rows=bad_rows,
        changed_shares=_in_order(stats.changed, order),
        peak_rate=facts.rates.peak,
        rate_fell_at=facts.rates.fell_at if facts.rates.rested else None,
        rate_stair=facts.rates.stair,
        recent_norms=norms,
        recent_losses=losses,
        loss_scale=record.loss_scale,
        lost_since_start=_lost_since_start(facts, finding),
        padding=_padding(batch) if finding.fault == Fault.VANISHING_IN_TIME else 0.0,
    )


def _lost_since_start(facts: GuardFacts, finding: Finding) -> float:
    """Return the decades that the concerned tensors have lost since the first steps, beside the last layer."""
    history, layout = facts.history, facts.layout
    concerned = [i for i, name in enumerate(layout.names) if name in finding.parameters]
    last = next((i for i in reversed(layout.order) if i in layout.layer_indices), None)
    if facts.judged > history.steps or len(history) < 2 * _COMPARED or last is None or not concerned:
        return 0.0
    levels = history.tensors()["norms"].log10()
    levels[~levels.isfinite()] = math.nan
    change = [
        finite_median(levels[-_COMPARED:, i].tolist()) - finite_median(levels[:_COMPARED, i].tolist())
        for i in (last, *concerned)
    ]
    lost = change[0] - finite_median(change[1:])
    return max(lost, 0.0) if math.isfinite(lost) else 0.0


def _padding(batch: object) -> float:
    """Return the share of a sequence, at its end, that is padding: all the same, in the median row."""
    shares = [0.0]
    for _, tensor in tensors_of(batch):
        is_sequence = tensor.ndim == 3 or (tensor.ndim == 2 and not tensor.is_floating_point())
        if not is_sequence or tensor.layout != torch.strided or not tensor.numel():
            continue
        for rows in (tensor, tensor.transpose(0, 1)):  # the batch comes first, or the sequence
            if rows.shape[1] >= _LONG:
                same = (rows == rows[:, -1:]).reshape(*rows.shape[:2], -1).all(-1)
                lengths = same.flip(1).long().cumprod(1).sum(1).float()
                shares.append(read(lengths.median().reshape(1))[0] / rows.shape[1])
    return max(shares)


def _measure_batch(batch: object) -> tuple[tuple[float | None, float | None], tuple[int, ...] | None]:
    """Return RMS of inputs and targets, and bad rows.

    A bad row has a NaN or Inf in any tensor. None for each that is not there; ``((None, None), None)`` if the batch is
    unknown or has no floating-point tensor.
    """
    tensors = [t for _, t in tensors_of(batch) if t.is_floating_point() and t.layout == torch.strided]
    if not any(t.ndim and t.numel() for t in tensors):
        return (None, None), None
    rows = tuple(sorted({row for entry in find_nonfinite(batch) for row in entry.rows}))
    inputs, targets = (_rms(t) for t in inputs_and_targets(batch))
    return (inputs, targets), rows


def _outlying_rows(batch: object) -> float:
    """Return the RMS of the inputs over that of the median row; 0 if it is not known."""
    inputs, _ = inputs_and_targets(batch)
    if inputs is None or inputs.ndim < 2 or len(inputs) < _FEW_ROWS:
        return 0.0
    squares = inputs.detach().float().flatten(1).square().mean(1)
    squares = torch.where(squares.isfinite(), squares, torch.nan)
    mean, median = read(torch.stack([squares.nanmean(), squares.nanmedian(0).values]).sqrt())
    return mean / median if median > 0 and math.isfinite(mean) else 0.0


def _recent(history: History) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return norms and losses of the newest finite steps."""
    table = history.tensors()
    finite = table["total_norm"].isfinite()
    return tuple(table["total_norm"][finite].tolist()), tuple(table["loss"][finite].tolist())


def _rms(x: Tensor | None) -> float | None:
    if x is None:
        return None
    squares = x.detach().float().square()
    return _known(read(squares[squares.isfinite()].mean().sqrt().reshape(1))[0])


def _settings(optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    """Return the optimizer's groups as plain types."""
    plain = []
    for group in optimizer.param_groups if optimizer is not None else []:
        kept = {
            k: read(v.reshape(1))[0] if isinstance(v, Tensor) and v.numel() == 1 else v
            for k, v in group.items()
            if k != "params"
        }
        plain.append({k: v for k, v in kept.items() if isinstance(v, (int, float, str, tuple, type(None)))})
    return plain


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _in_order(vector: Tensor, order: Sequence[int]) -> tuple[float, ...]:
    numbers = read(vector)
    return tuple(numbers[i] for i in order)


def _log10(norm: float) -> float:
    return math.log10(norm) if 0 < norm < math.inf else (-math.inf if norm == 0 else norm)
