"""What was measured: the classic signs of sick gradients, a sentence each."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_gradguard.diagnosis.context import LARGEST_UPDATE, TYPICAL_UPDATE, DiagnosticContext
from lightning_gradguard.diagnosis.nan_origin import Place
from lightning_gradguard.diagnosis.wording import count, listing, number, power, quote
from lightning_gradguard.results import Fault

#: Decades between the first and the last layer's gradients that are worth a word; healthy: below 2.3.
_NOTABLE_FALL = 2.0
#: Update ratio below which weights count as unchanged.
_UNCHANGED = 1e-6


def find_symptoms(case: DiagnosticContext) -> tuple[str, ...]:
    """The signs that the case shows; the number that the verdict rests on leads."""
    rules = (_verdict, _loss, _nonfinite, _origin, _gradients_over_depth, _zero_gradients, _weights, _earlier)
    return tuple(sentence for rule in rules for sentence in rule(case))


def _verdict(case: DiagnosticContext) -> Iterator[str]:
    finding = case.finding
    what = finding.measure or finding.detector
    yield f"{what[:1].upper()}{what[1:]}: {number(finding.value)}; the limit is {number(finding.limit)}."


def _loss(case: DiagnosticContext) -> Iterator[str]:
    start, now, steps = case.loss_start, case.loss_now, count(case.steps, "step")
    known = math.isfinite(start) and math.isfinite(now)
    if not case.nonfinite_loss and case.fault == Fault.NONFINITE and math.isfinite(case.loss_last):
        now = case.loss_last  # the mean leaves out a step that is not finite
    if case.nonfinite_loss:
        yield "The loss is not finite" + (
            f"; it had run from {number(start)} to {number(now)}." if known and case.steps > 1 else "."
        )
    elif known and now > start + 0.2 * abs(start):
        yield f"The loss rises: from {number(start)} to {number(now)} in {steps}."
    elif known and now > start - 0.1 * abs(start):
        yield f"The loss stands still: from {number(start)} to {number(now)} in {steps}."
    elif known:
        yield f"The loss still falls: from {number(start)} to {number(now)} in {steps}."


def _nonfinite(case: DiagnosticContext) -> Iterator[str]:
    if case.origin is not None and case.origin.place == Place.NORM:
        return  # each element is finite
    bad = [n for n, g in zip(case.names, case.gradients_log10, strict=True) if math.isnan(g) or g == math.inf]
    if bad:
        # Backward goes from the output to the input, so the last layer's gradient went bad first.
        of = f"{len(bad)} of {count(len(case.names), 'gradient')} {'is' if len(bad) == 1 else 'are'} not finite"
        yield f"{of}; in the order of the backward pass {quote(bad[-1])} is the first."


def _origin(case: DiagnosticContext) -> Iterator[str]:
    if case.origin is not None:
        yield str(case.origin)


def _gradients_over_depth(case: DiagnosticContext) -> Iterator[str]:
    finite = [i for i in case.layers if math.isfinite(case.gradients_log10[i])]
    if len(finite) < 2:
        return
    first, last = finite[0], finite[-1]
    fall = case.gradients_log10[last] - case.gradients_log10[first]
    if abs(fall) >= _NOTABLE_FALL:
        way = "below" if fall > 0 else "above"
        early = f"norm {power(case.gradients_log10[first])} in {quote(case.names[first])}"
        late = f"{power(case.gradients_log10[last])} in {quote(case.names[last])}"
        decades = f"{abs(fall):.1f} decades (powers of ten)"
        yield f"Early layers' gradients are {decades} {way} late ones': {early} against {late}."


def _zero_gradients(case: DiagnosticContext) -> Iterator[str]:
    zero = [case.names[i] for i in case.layers if case.gradients_log10[i] == -math.inf]
    if zero:
        of = f"{len(zero)} of {count(len(case.layers), 'layer')}"
        yield f"{of} got no gradient, or one of zero: {listing(zero)}."


def _weights(case: DiagnosticContext) -> Iterator[str]:
    typical, (largest, name) = case.typical_update, case.largest_update
    if typical < _UNCHANGED:
        yield f"The weights hardly change: update ratio {number(typical)}, where {TYPICAL_UPDATE} is usual."
    elif largest > LARGEST_UPDATE:
        size = f"{number(100 * largest)} % of" if largest < 1 else f"{number(largest)} times"
        yield f"The weights change by up to {size} their size a step ({quote(name)}), where 0.1 % is usual."
    ruined = [n for n, w in zip(case.names, case.weight_norms, strict=True) if not math.isfinite(w)]
    if ruined:
        yield f"The weights of {listing(ruined)} are not finite."


def _earlier(case: DiagnosticContext) -> Iterator[str]:
    """What else was found, each fault once."""
    others: dict[str, int] = {}
    for finding in case.findings:
        if finding.fault != case.fault:
            others.setdefault(finding.fault.value.replace("_", " "), finding.step)
    if others:
        yield "Also found: " + ", ".join(f"{fault} (step {step})" for fault, step in others.items()) + "."
