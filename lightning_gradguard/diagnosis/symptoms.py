"""Symptoms of a fault, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_gradguard.diagnosis.context import LARGEST_UPDATE, TYPICAL_UPDATE, DiagnosticContext
from lightning_gradguard.diagnosis.nan_origin import Place
from lightning_gradguard.diagnosis.wording import count, fraction, listing, number, power, quote
from lightning_gradguard.results import Fault

#: Decades between the gradients of the first and the last layer that are reported; healthy models have below 2.3.
_NOTABLE_FALL = 2.0
#: Update ratio below which weights count as unchanged.
_UNCHANGED = 1e-6
#: Steps from which the loss has a trend: its start is the median of the first five.
_FIRST_LOSSES = 5
#: Detectors whose value is in decades, except for those of `Exploding` with a positive limit.
_IN_DECADES = ("DepthTilt", "TimeTilt")


def find_symptoms(context: DiagnosticContext) -> tuple[str, ...]:
    """Return the symptoms, the finding's own first.

    Args:
        context: The facts at the step of the finding.
    """
    rules = (_finding, _loss, _nonfinite, _depth, _zero_gradients, _weights, _other_faults, _unseen_graph)
    return tuple(sentence for rule in rules for sentence in rule(context))


def _finding(context: DiagnosticContext) -> Iterator[str]:
    finding = context.finding
    if finding.fault == Fault.NONFINITE and (_nonfinite_tensors(context) or context.nonfinite_loss):
        return  # the sentences about loss and gradients say it all
    measure = finding.measure or finding.detector
    tilt = finding.detector in _IN_DECADES or (finding.detector == "Exploding" and finding.limit < 0)
    decade = "; a decade is a factor of ten" if tilt else ""
    limit = f"(limit {number(finding.limit)}{decade})"
    yield f"{measure[:1].upper()}{measure[1:]}: {number(finding.value)} {limit}."


def _loss(context: DiagnosticContext) -> Iterator[str]:
    start, now, steps = context.loss_start, context.loss_now, count(context.steps, "step")
    known = math.isfinite(start) and math.isfinite(now)
    if context.nonfinite_loss:
        change = f"went from {number(start)} to {number(now)}"
        before = change if number(start) != number(now) else f"was {number(now)}"
        yield "The loss is NaN or Inf." + (f" Before, it {before}." if known and context.steps > 1 else "")
        return
    if context.fault == Fault.NONFINITE and math.isfinite(context.loss_last):
        now = context.loss_last  # the mean leaves out a step that is not finite
    if known and now > start + 0.2 * abs(start):
        yield f"The loss has risen: from {number(start)} to {number(now)} in {steps}."
    elif context.fault == Fault.NONFINITE and known and context.steps < _FIRST_LOSSES:
        yield f"The loss is finite: {number(now)}."
    elif known and now > start - 0.1 * abs(start):
        yield f"The loss has plateaued: from {number(start)} to {number(now)} in {steps}."
    elif known:
        yield f"The loss is still falling: from {number(start)} to {number(now)} in {steps}."


def _nonfinite(context: DiagnosticContext) -> Iterator[str]:
    bad = _nonfinite_tensors(context)
    if bad and (context.origin is None or context.origin.place != Place.NORM):
        # The backward pass goes from output to input, so the gradient of the last of these layers was computed first.
        of = f"{len(bad)} of {count(len(context.names), 'tensor')} {'has' if len(bad) == 1 else 'have'}"
        yield f"{of} NaN or Inf gradients; in the order of the backward pass, {quote(bad[-1])} is the first."
    if context.origin is not None:
        yield str(context.origin)


def _nonfinite_tensors(context: DiagnosticContext) -> list[str]:
    logs = zip(context.names, context.gradients_log10, strict=True)
    return [name for name, log10 in logs if math.isnan(log10) or log10 == math.inf]


def _depth(context: DiagnosticContext) -> Iterator[str]:
    finite = [i for i in context.layers if math.isfinite(context.gradients_log10[i])]
    if len(finite) < 2:
        return
    first, last = finite[0], finite[-1]
    fall = context.gradients_log10[last] - context.gradients_log10[first]
    if abs(fall) >= _NOTABLE_FALL:
        change = f"{'shrink' if fall > 0 else 'grow'} by a factor of 10^{abs(fall):.1f}"
        late = f"norm {power(context.gradients_log10[last])} in {quote(context.names[last])}"
        early = f"{power(context.gradients_log10[first])} in {quote(context.names[first])}"
        yield f"From the last layer to the first, gradients {change}: {late}, {early}."


def _zero_gradients(context: DiagnosticContext) -> Iterator[str]:
    zero = [context.names[i] for i in context.layers if context.gradients_log10[i] == -math.inf]
    if zero:
        of = f"{len(zero)} of {count(len(context.layers), 'layer')} {'gets' if len(zero) == 1 else 'get'}"
        yield f"{of} a gradient of exactly zero, or none: {listing(zero)}."


def _weights(context: DiagnosticContext) -> Iterator[str]:
    typical, (largest, name) = context.typical_update, context.largest_update
    usual = f"where {number(100 * TYPICAL_UPDATE)}% is typical"
    if typical < _UNCHANGED:
        yield f"The weights hardly change: a step changes the median layer by {fraction(typical)}, {usual}."
    elif largest > LARGEST_UPDATE:
        layer = quote(name) if name else "a layer"
        yield f"A step changes {layer} by up to {fraction(largest)}, {usual}."
    bad = [n for n, norm in zip(context.names, context.weight_norms, strict=True) if not math.isfinite(norm)]
    if bad:
        yield f"The weights of {listing(bad)} are NaN or Inf."


def _unseen_graph(context: DiagnosticContext) -> Iterator[str]:
    """Say that the graph was not seen, or not all of it."""
    graph = context.graph_summary
    if graph is None or not graph.nodes:
        yield "The autograd graph was not seen, so the causes rest on the statistics of the gradients alone."
    elif graph.opaque or graph.hidden:
        what = f" ({listing(graph.hidden)})" if graph.hidden else ""
        yield f"Parts of the autograd graph could not be read{what}; of these, only statistics are known."


def _other_faults(context: DiagnosticContext) -> Iterator[str]:
    others: dict[str, int] = {}
    for finding in context.findings:
        if finding.fault != context.fault:
            others.setdefault(finding.fault.value.replace("_", " "), finding.step)
    if others:
        yield (
            "Also found: " + ", ".join(f"{fault} (since step {step})" for fault, step in others.items()) + "."
        )
