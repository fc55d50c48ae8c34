"""Rules that look for the cause in the loss: where it is not finite, has no lower bound, or is flat."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_gradguard.diagnosis.causes.evidence import GROWING, Evidence
from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.wording import number, quote
from lightning_gradguard.introspection.operations import COMMON, RISKY
from lightning_gradguard.results import Fault

#: What a loss is made of whose slope fades where it comes near to zero.
_FADING_LOSSES = ("Softplus", "LogSigmoid", "Log", "Log1P", "Sigmoid", "Exp", "Tanh")
#: A first loss so near to zero that such an operation's slope, which is about as large, moves nothing.
_FLAT = 1e-3
#: How many times below zero, by its size at the start, a loss has to fall to count as without a bound.
_BOTTOMLESS = 100.0


def loss_function(case: DiagnosticContext) -> Iterator[Evidence]:
    """An operation, most often in the loss, that is not finite, or has no finite slope, for some finite inputs."""
    origin = case.origin
    if case.fault == Fault.NONFINITE and origin is not None and origin.in_data:
        return
    if case.fault == Fault.NONFINITE and origin is not None and origin.located:
        # What overflows in the loss was most often too large before it.
        if origin.in_loss or not origin.overflow:
            yield Evidence(3.0 if origin.overflow else 9.0, Cause.LOSS_FUNCTION, str(origin))
        return
    if case.fault != Fault.NONFINITE or case.graph_summary is None or case.bad_rows:
        return
    risky = [op for op in RISKY if op in case.graph_summary.loss_ops]
    if not risky:
        return
    what = (
        "The loss is not finite" if case.nonfinite_loss else "The gradient is not finite, though the loss is"
    )
    batch = "; the batch is" if case.bad_rows is not None else ""
    reasons = "; ".join(RISKY[op] for op in risky[:2])
    weight = 6.0 if not COMMON.issuperset(risky) else 3.0 if batch else 1.0
    evidence = f"{what}{batch}. Among what is computed after the last layer: {reasons}."
    yield Evidence(weight, Cause.LOSS_FUNCTION, evidence)


def bottomless_loss(case: DiagnosticContext) -> Iterator[Evidence]:
    """A loss that falls below zero for ever: the larger the weights, the better it seems."""
    start, now = case.loss_start, case.loss_now
    if case.fault not in GROWING or not (math.isfinite(start) and now < -_BOTTOMLESS * max(abs(start), 1.0)):
        return
    evidence = (
        f"The loss fell from {number(start)} to {number(now)} and falls on: it has no lower bound, so that the "
        "weights grow for ever."
    )
    yield Evidence(2 + math.log10(-now / max(abs(start), 1.0)), Cause.LOSS_FUNCTION, evidence)


def flat_loss(case: DiagnosticContext) -> Iterator[Evidence]:
    """A loss that was all but zero from the beginning, at the flat end of what it is made of."""
    operations = case.graph_summary.loss_ops if case.graph_summary else {}
    flat = next((op for op in _FADING_LOSSES if op in operations), None)
    if case.fault not in (Fault.STALLED, Fault.VANISHING) or flat is None:
        return
    if 0 < abs(case.loss_start) < _FLAT:
        evidence = (
            f"The loss was {number(case.loss_start)} from the beginning: {quote(flat.lower())} is flat there, and "
            "passes no more of a gradient than that."
        )
        yield Evidence(-math.log10(abs(case.loss_start)), Cause.LOSS_FUNCTION, evidence)


LOSS_RULES = (loss_function, bottomless_loss, flat_loss)
