"""Causes in the data: scale, NaN or Inf, outliers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_gradguard.diagnosis.context import CERTAIN, DEEP, OUTLYING, DiagnosticContext, Evidence
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.nan_origin import Origin, Place, cause_of
from lightning_gradguard.diagnosis.wording import count, number, power
from lightning_gradguard.results import Fault

#: Decades between the RMS of the inputs and 1 before it is reported: a factor of five.
_NOTABLE_SCALE = 0.7
#: Largest first loss of a classification, in nats, that usual outputs give; ten thousand classes give 9.
_USUAL_LOSS = 20.0
#: Multiple of the losses before and after it from which a batch is an outlier. A training that comes apart at a
#: learning rate far too high reaches hundreds.
_OUTLIER = 1e4
#: RMS from which targets are large, and the factor between the loss and that of outputs of 0.
_LARGE_TARGETS, _NEAR = 100.0, 10.0
#: Faults that outliers alone can cause.
_FROM_OUTLIERS = (Fault.EXPLODING, Fault.STALLED)
_SQUARED = ("MseLoss", "SmoothL1Loss", "HuberLoss", "Pow")
_CLASSIFYING = ("NllLoss", "NllLoss2D", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits")


def unnormalized_input(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame inputs far from unit scale.

    They saturate the first layer, and the curvature of the loss grows with their square.
    """
    yield from inputs_out_of_scale(context)
    yield from outputs_too_large(context, Cause.UNNORMALIZED_INPUT)


def inputs_out_of_scale(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame inputs whose RMS is far from 1."""
    rms = context.input_rms
    if rms is None or not (math.isfinite(rms) and rms > 0) or abs(math.log10(rms)) < _NOTABLE_SCALE:
        return
    if context.shapes and len(context.shapes[0]) == 1 and context.has_normalization:
        return  # the first parameters are those of a normalization
    decades = abs(math.log10(rms))
    # Inputs this large move the activations of the first layer to where they are flat.
    saturated = context.too_small and context.saturating and rms > 1
    weight = (
        2 * decades if context.too_large or saturated else max(context.unexplained_decades, 0.5 * decades)
    )
    yield Evidence(weight, f"The inputs of the batch have an RMS of {number(rms)}; about 1 is typical.")


def outputs_too_large(context: DiagnosticContext, cause: Cause) -> Iterator[Evidence]:
    """Blame the cause of very large outputs.

    Only such outputs give a first loss this large.

    Args:
        context: The facts at the step of the finding.
        cause: Yields only if this one explains the outputs: `Cause.UNNORMALIZED_INPUT` if the inputs are large,
            `Cause.TOO_DEEP` in a deep model of usual weights without normalization, else `Cause.BAD_INITIALIZATION`.
    """
    first = context.loss_start
    if not context.too_large:
        return
    if any(op in context.loss_operations for op in _CLASSIFYING):
        usual, decades = _USUAL_LOSS, min(math.log10(max(first, 1.0) / 3), 38.0)
    elif _is_squared(context) and context.target_rms is not None:
        usual, decades = 100 * max(context.target_rms**2, 1.0), min(math.log10(max(first, 1.0)), 38.0) / 2
    else:
        return
    # An operation that has no finite result tells nothing about the size of what it was given.
    origin = context.origin
    is_overflow = first == math.inf and (
        origin is None or not origin.located or _overflows_with_outputs(origin)
    )
    if not first > usual or (first == math.inf and not is_overflow):
        return
    began = f"The first loss was {number(first)}, which only far too large outputs can give"
    layers = len(context.layers)
    if any(True for _ in inputs_out_of_scale(context)):
        explanation = Cause.UNNORMALIZED_INPUT
        size = f"an RMS of {number(context.input_rms or 0.0)}"
        text = f"{began}; the inputs of the batch have {size}, and about 1 is typical."
    elif layers >= 2 * DEEP and abs(context.excess_gain) < 0.3 and not context.has_normalization:
        explanation = Cause.TOO_DEEP
        grown = f"signals grow over {count(layers, 'layer')} without normalization"
        text = f"{began}: the weights have a typical size, but {grown}."
    else:
        explanation = Cause.BAD_INITIALIZATION
        text = f"{began}: the model enlarges what passes through it."
    if cause == explanation:
        yield Evidence(decades, text)


def _overflows_with_outputs(origin: Origin) -> bool:
    """Return True for an overflow that the outputs take part in, and not parameters of the loss alone."""
    given = () if origin.facts is None else origin.facts.arguments
    return origin.overflow > 0 and not any(argument.parameters for argument in given)


def target_scale(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame large targets, beside which the outputs are nothing, or under a squared loss."""
    dwarfing = context.dwarfing_targets
    if dwarfing and context.fault not in (Fault.NONFINITE, Fault.DISCONNECTED, Fault.SPIKE):
        text = (
            f"The targets have an RMS of {number(dwarfing)}, and the loss, {number(context.loss_now)}, is that of "
            "outputs which are nothing beside them."
        )
        # Whatever else is found concerns a slope that is the same for all samples.
        yield Evidence(10 + math.log10(dwarfing), text)
        return
    if context.fault == Fault.STALLED and context.finding.detector == "TargetScale":
        size = "" if context.target_rms is None else f", which have an RMS of {number(context.target_rms)}"
        text = (
            f"The outputs are {number(context.finding.value)} times as large as their targets{size}; "
            "the weights do move, "
            "but at this rate the outputs take thousands of steps to get there."
        )
        yield Evidence(-math.log10(max(context.finding.value, 1e-12)) + 1, text)
        return
    if context.fault in (Fault.STALLED, Fault.VANISHING):
        yield from _targets_out_of_reach(context)
        return
    if not context.too_large or not _is_squared(context) or not 100 < context.loss_start < math.inf:
        return
    if context.target_rms is not None and context.target_rms**2 < 0.01 * context.loss_start:
        return  # the outputs are large, not the targets
    decades = math.log10(context.loss_start) / 2
    first = number(context.loss_start)
    if context.target_rms is not None:
        text = f"The targets have an RMS of {number(context.target_rms)}, and the first loss was {first}."
    else:
        text = f"The first loss was {first}: outputs and targets differ by about {power(decades)}."
    yield Evidence(decades, text)


def _targets_out_of_reach(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame large targets whose loss is that of outputs of nothing, and stays there."""
    rms, start = context.target_rms, context.loss_start
    if rms is None or not _LARGE_TARGETS < rms < math.inf:
        return
    # A Huber loss of large distances is linear.
    sizes = (rms, rms**2) if _is_squared(context) else (rms,)
    is_near = any(size / _NEAR < start < _NEAR * size for size in sizes)
    if is_near and context.loss_now > 0.9 * start:
        text = (
            f"The targets have an RMS of {number(rms)}, and the loss is still {number(context.loss_now)}, about what "
            "outputs of 0 give: the outputs take thousands of steps to get there."
        )
        yield Evidence(math.log10(rms), text)


def bad_data(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame NaN or Inf in the batch, or inputs that are all zero."""
    # A batch may be a placeholder of zeros; inputs of zero leave the first layer's weight without a gradient.
    first = context.layers[0] if context.layers else None
    is_fed = first is not None and context.gradients_log10[first] != -math.inf
    if context.too_small and context.input_rms == 0 and not is_fed:
        yield Evidence(
            CERTAIN, "All inputs of the batch are exactly zero, so nothing can be learnt from them."
        )
    if context.fault != Fault.NONFINITE:
        return
    origin, rows = context.origin, context.bad_rows
    if origin is not None and origin.place == Place.BATCH:
        yield Evidence(CERTAIN, str(origin))
    elif (
        origin is not None
        and (origin.place == Place.OUTSIDE or origin.located)
        and cause_of(origin) == Cause.BAD_DATA
    ):
        yield Evidence(8.0, str(origin))
    elif rows:
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        listed = ", ".join(str(row) for row in rows[:8]) + more
        text = f"The batch has NaN or Inf in row{'' if len(rows) == 1 else 's'} {listed}."
        # If the replay blames something else, the NaN or Inf may be intended, such as masked targets.
        elsewhere = origin is not None and origin.located
        yield Evidence(3.0 if elsewhere else CERTAIN, text)
    elif origin is None and rows is None and context.nonfinite_loss and _was_healthy(context):
        text = "The loss became NaN or Inf from one step to the next. The batch itself could not be examined."
        yield Evidence(2.5, text)


def outlier_batch(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame one batch unlike the others."""
    step = context.finding.step
    if context.fault == Fault.STALLED and "adagrad" in context.optimizer.lower():
        spike = next((f for f in context.findings if f.fault == Fault.SPIKE), None)
        if spike is not None and abs(spike.step - step) <= 1:
            text = (
                f"The gradient spiked at step {spike.step} ({spike.measure or 'spike score'}: {number(spike.value)}). "
                f"{context.optimizer} divides by the root of the sum of all squared gradients, which never shrinks."
            )
            yield Evidence(5.0, text)
    if context.fault in _FROM_OUTLIERS and context.outlier_losses > _OUTLIER:
        text = (
            f"Single batches have a loss {number(context.outlier_losses)} times that of the batches before and after "
            f"them. The median loss is {number(context.median_loss)}, and the first was {number(context.loss_start)}."
        )
        yield Evidence(1 + math.log10(context.outlier_losses), text)
    if context.outlying_rows > OUTLYING and context.too_large:
        text = (
            f"Few rows of the batch are far larger than the others: the RMS of all is {number(context.outlying_rows)} "
            "times that of the median row."
        )
        # An operation that was named comes first: it has to bear such rows.
        named = context.fault == Fault.NONFINITE and context.origin is not None and context.origin.located
        yield Evidence(min(1.5 + math.log10(context.outlying_rows) / 2, 1.9 if named else math.inf), text)
    if context.fault == Fault.SPIKE and context.finding.value > 0:
        size = f"{context.finding.measure or 'gradient'}: {number(context.finding.value)}"
        text = f"Only the gradient of this step is so large ({size})."
        yield Evidence(1 + math.log10(context.finding.value), text)
    # A replay that named the place, or that was clean, tells that the batch is no outlier.
    origin = context.origin
    replayed = origin is not None and (origin.place != Place.UNKNOWN and not origin.overflow)
    if context.fault == Fault.NONFINITE and _was_healthy(context) and not context.bad_rows and not replayed:
        yield Evidence(2.0, f"No fault was found before step {step}.")


def _is_squared(context: DiagnosticContext) -> bool:
    return any(op in context.loss_operations for op in _SQUARED)


def _was_healthy(context: DiagnosticContext) -> bool:
    """Return True if nothing was wrong before."""
    risen = context.loss_now > 1.5 * abs(context.loss_start)
    return context.steps > 5 and not risen and not context.found_before(*Fault.known())
