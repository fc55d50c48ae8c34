"""Causes in the numerics: loss and number format."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lightning_gradguard.diagnosis.context import DiagnosticContext, Evidence
from lightning_gradguard.diagnosis.nan_origin import Place, blames_operation, blames_tensor
from lightning_gradguard.diagnosis.operation_domains import CLOSED
from lightning_gradguard.diagnosis.operation_evidence import is_initial
from lightning_gradguard.diagnosis.wording import fraction, number, quote
from lightning_gradguard.introspection.operations import COMMON, RISKY
from lightning_gradguard.results import Fault

#: Operations of a loss whose slope fades as their value approaches zero.
_FADING_LOSSES = ("Softplus", "LogSigmoid", "Log", "Log1P", "Sigmoid", "Exp", "Tanh")
#: First loss below which the slope of such an operation, which is about as large, moves nothing.
_FLAT = 1e-3
#: Multiple of its size at the start by which a loss has to fall below zero to count as unbounded.
_UNBOUNDED = 100.0
#: Share of changed elements below which most updates are lost to rounding.
_FEW_CHANGE = 0.2
#: Steps up to which a parameter counts as never changed: those that were not finite were skipped.
FROM_THE_START = 10
_LOW_PRECISION = ("float16", "float8_e4m3fn", "float8_e5m2")


def loss_function(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame an unstable, unbounded or flat loss."""
    yield from _unstable_operation(context)
    yield from unbounded_loss(context)
    yield from summed_loss(context)
    yield from _flat_loss(context)


def _unstable_operation(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame an operation with a non-finite value or slope.

    It is finite for other inputs, and most often in the loss.
    """
    origin = context.origin
    if context.fault != Fault.NONFINITE:
        return
    if origin is not None and origin.place == Place.OUTSIDE and blames_tensor(origin):
        yield Evidence(9.0, str(origin))
        return
    if origin is not None and origin.located:
        if origin.in_data and not blames_operation(origin):
            yield Evidence(4.0, str(origin))
        elif is_initial(origin.facts) and context.steps <= FROM_THE_START:
            return
        elif origin.in_loss or not origin.overflow:
            # What overflows in the loss was most often too large before it.
            yield Evidence(3.0 if origin.overflow else 9.0, str(origin))
        elif origin.facts is not None and origin.facts.function in CLOSED:
            yield Evidence(2.0, str(origin))
        return
    if origin is not None and origin.place in (Place.BATCH, Place.PARAMETERS, Place.OUTSIDE):
        return
    risky = [op for op in RISKY if op in context.loss_operations]
    if context.bad_rows or not risky:
        return
    unreproduced = origin is not None and origin.place == Place.NOWHERE
    if unreproduced and COMMON.issuperset(risky):
        return
    examined = context.bad_rows is not None
    if context.nonfinite_loss:
        what = "The loss is NaN or Inf" + (" although the batch is finite" if examined else "")
    else:
        finite = "the loss and the batch are" if examined else "the loss is"
        what = f"The gradient is NaN or Inf although {finite} finite"
    reasons = "; ".join(RISKY[op] for op in risky[:2])
    weight = 2.0 if unreproduced else 6.0 if not COMMON.issuperset(risky) else 3.0 if examined else 1.0
    yield Evidence(weight, f"{what}. Operations after the last layer can cause this: {reasons}.")


def unbounded_loss(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame a loss without a lower bound.

    Larger weights always improve it.
    """
    start, now = context.loss_start, context.loss_now
    if context.too_large and math.isfinite(start) and now < -_UNBOUNDED * max(abs(start), 1.0):
        text = (
            f"The loss fell from {number(start)} to {number(now)} and keeps falling: it has no lower bound, so the "
            "weights grow without end."
        )
        yield Evidence(2 + math.log10(-now / max(abs(start), 1.0)), text)


def summed_loss(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame a loss that is summed over the batch.

    Its gradient is as many times larger as there are samples. An optimizer that normalizes gradients does not pass
    that on.
    """
    rows = context.summed_rows
    killed = context.fault == Fault.DEAD and context.found_before(Fault.EXPLODING, Fault.OVERSIZED_UPDATE)
    harmful = killed or (context.too_large and context.fault != Fault.SPIKE)
    if rows and harmful and not context.normalizes_gradient:
        text = (
            f"The loss is a sum over {rows} samples (it began at {number(context.loss_start)}), not a "
            "mean: its gradient is "
            f"{rows} times as large, and so is each step of {context.optimizer or 'the optimizer'}."
        )
        yield Evidence((3 if killed else 1) + math.log10(rows), text)


def _flat_loss(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame a loss that began near zero.

    Its operations are flat there.
    """
    flat = next((op for op in _FADING_LOSSES if op in context.loss_operations), None)
    if context.fault not in (Fault.STALLED, Fault.VANISHING) or flat is None:
        return
    if 0 < abs(context.loss_start) < _FLAT:
        text = (
            f"The loss was {number(context.loss_start)} from the beginning: {quote(flat.lower())} is flat there, and "
            "its slope is as small as its value."
        )
        yield Evidence(-math.log10(abs(context.loss_start)), text)


def low_precision(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame numbers beyond the range of the dtype."""
    low = [dtype for dtype in context.dtypes if dtype in _LOW_PRECISION]
    if context.fault == Fault.UNDERFLOW:
        dtype = low[0] if low else next(iter(context.dtypes), "this dtype")
        text = f"{100 * context.finding.value:.0f}% of the gradient's elements are too small for {dtype}."
        yield Evidence(10.0, text)
    elif context.fault == Fault.STALLED and context.typical_change < _FEW_CHANGE:
        text = (
            f"A step changes {fraction(context.typical_change)} of the median layer's elements, although they get a "
            f"gradient: the updates of the others are too small for {_stored(context)} and are lost to rounding."
        )
        yield Evidence(20.0, text)
    elif low and context.fault == Fault.DEAD and all(g == -math.inf for g in context.gradients_log10):
        text = f"All gradients are exactly zero, even in the last layer. They pass through {_range(low[0])}."
        yield Evidence(6.0, text)
    elif low and context.fault in (Fault.NONFINITE, Fault.VANISHING):
        origin = context.origin
        if origin is not None and origin.overflow and origin.dtype in low:
            yield Evidence(8.0, str(origin))
            return
        text = f"Gradients pass through {_range(low[0])}."
        yield Evidence(4.0 if context.fault == Fault.NONFINITE else 1.0, text)


def _stored(context: DiagnosticContext) -> str:
    half = [dtype for dtype in context.dtypes if dtype in ("float16", "bfloat16")]
    return half[0] if half else "half precision"


def _range(dtype: str) -> str:
    info = torch.finfo(getattr(torch, dtype))
    smallest = info.tiny * info.eps  # subnormal
    return f"{quote(dtype)}, which holds magnitudes from {number(smallest)} to {number(info.max)} only"
