"""Causes in the optimizer: learning rate, momentum, epsilon."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_gradguard.diagnosis.causes.data import inputs_out_of_scale, outputs_too_large, target_scale
from lightning_gradguard.diagnosis.causes.model import DIED_AFTER, weights_out_of_scale
from lightning_gradguard.diagnosis.causes.numerics import summed_loss, unbounded_loss
from lightning_gradguard.diagnosis.context import (
    CERTAIN,
    LARGEST_UPDATE,
    TYPICAL_MOMENTUM,
    TYPICAL_UPDATE,
    DiagnosticContext,
    Evidence,
    finite_median,
)
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.wording import fraction, number, power, quote
from lightning_gradguard.results import Fault

#: Growth of a layer's weights since the start that healthy training does not show in so few steps.
_NOTABLE_GROWTH = 3.0
#: Decades lost since the first steps that the steps themselves account for.
_LOST_BY_STEPS = 2.0
#: Steps after which the velocity of a typical momentum has built up; later the learning rate alone is not to blame.
_BUILT_UP = 10


def learning_rate_too_high(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame a learning rate with too large steps.

    They are or were too large for the weights, or have enlarged them.

    Decades for which other causes account are subtracted: they made the gradient large, or added it up.
    """
    oversized = _oversized_steps(context)
    if (
        context.fault == Fault.VANISHING
        and context.lost_since_start >= _LOST_BY_STEPS
        and oversized is not None
    ):
        text = (
            f"Since the first steps, gradients at the input have fallen 10^{context.lost_since_start:.1f}-fold beside "
            f"those at the output: at a learning rate of {number(context.learning_rate)}, {oversized[1]}."
        )
        # What the weights were at the start did not make them vanish.
        yield Evidence(context.lost_since_start + 2.0, text)
        return
    killed = context.fault == Fault.DEAD
    if not (context.too_large or killed) or oversized is None or context.decayed:
        return
    decades, words = oversized
    left = decades - (0.0 if killed else _decades_of_other_causes(context))
    # A step this large makes the next loss overflow, if it was on its way there.
    grown = context.loss_start > 0 and context.loss_now > 3 * context.loss_start
    before = context.found_before(Fault.EXPLODING, Fault.OVERSIZED_UPDATE)
    if left <= 0:
        left = min(0.9 * decades, 1.0)  # a lower rate would still help
    elif context.fault == Fault.NONFINITE and (grown or before):
        left += 10.0
    elif killed:
        left += 2.0
    yield Evidence(left, f"At a learning rate of {number(context.learning_rate)}, {words}.")


def learning_rate_too_low(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame a learning rate with too small steps."""
    if context.fault not in (Fault.STALLED, Fault.VANISHING) or not context.learning_rates:
        return
    rate, update = context.learning_rate, context.typical_update
    if context.schedule_ended and context.fault == Fault.STALLED:
        steps, peak = context.rate_fell_at, context.peak_rate
        first = "first step" if steps == 1 else f"first {steps} steps"
        text = (
            f"The schedule lowered the learning rate from {number(peak)} to {number(rate)}: it has been below a tenth "
            f"of its peak after the {first} of {context.steps}."
        )
        yield Evidence(CERTAIN, text)
        return
    if context.climbs_slowly:
        text = (
            f"The schedule raises the learning rate only once in {context.rate_stair} steps, and after "
            f"{context.steps} steps it is {number(rate)}: a step changes the median layer by {fraction(update)}. The "
            "warm-up is advanced once an epoch, and counts steps."
        )
        yield Evidence(CERTAIN, text)
        return
    if rate == 0:
        yield Evidence(CERTAIN, "The learning rate is 0.")
        return
    below = math.log10(context.typical_learning_rate / rate)
    if update > 0:
        below = min(below, math.log10(TYPICAL_UPDATE / update))
    if context.fault == Fault.STALLED and not context.normalizes_gradient:
        # The step is proportional to the gradient, so a larger rate helps if the gradient is small for no other reason.
        below = max(below, 0.6)
    text = f"The learning rate is {number(rate)}"
    if not math.isnan(update):
        typical = number(100 * TYPICAL_UPDATE)
        text += f", and a step changes the median layer by {fraction(update)}, where {typical}% is typical"
    yield Evidence(below, text + ".")


def gradient_scaling(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame clipping of gradients that are still scaled."""
    norm = context.clipped_scaled_norm
    if context.fault not in (Fault.STALLED, Fault.VANISHING, Fault.UNDERFLOW) or math.isnan(norm):
        return
    now = context.recent_norms[-1]
    text = (
        f"The gradient norm is {number(now)} at every step, which times a loss scale of {number(norm / now)} is "
        f"{number(norm)}: the gradients were clipped to {number(norm)} while they were still scaled."
    )
    yield Evidence(CERTAIN, text)


def optimizer_epsilon(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame an epsilon larger than the gradients."""
    eps = context.setting("eps")
    if context.fault not in (Fault.STALLED, Fault.VANISHING, Fault.UNDERFLOW):
        return
    if not (context.normalizes_gradient and eps > 0):
        return
    concerned = [i for i in context.layers if context.names[i] in context.finding.parameters]
    rms = finite_median(context.gradient_rms_log10(i) for i in concerned or context.layers)
    if rms >= math.log10(eps) or math.isnan(rms):
        return
    decades = math.log10(eps) - rms
    text = (
        f"{context.optimizer} divides each gradient by its size plus eps. Here eps = {number(eps)} is larger than the "
        f"gradients, whose RMS is {power(rms)}: steps are 10^{decades:.1f} times smaller than the learning rate "
        "suggests."
    )
    # If the gradient vanished on its way, that is the cause; eps only keeps the optimizer from making up for it.
    yield Evidence(decades if context.fault == Fault.STALLED else min(decades, 1.0), text)


def momentum(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame a momentum that lets the velocity grow."""
    value = context.setting("momentum")
    killed = context.fault == Fault.DEAD and context.growth[0] > DIED_AFTER
    if not (context.too_large or killed) or not value >= 0.95:
        return
    if value >= 1:
        yield Evidence(50.0, f"With a momentum of {number(value)}, the velocity never decays.")
        return
    factor = 1 / (1 - value)
    text = f"With a momentum of {number(value)}, a steady gradient adds up to {number(factor)} times the learning rate."
    oversized = _oversized_steps(context) if context.finding.step > _BUILT_UP else None
    weight = max(math.log10(factor), oversized[0] if oversized else 0.0)
    yield Evidence(weight + 2.5 if killed else weight, text)


def weight_decay(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame a decay that has shrunk the weights."""
    if context.decayed:
        decay, size = number(context.setting("weight_decay")), number(100 * context.remaining_size)
        text = f"The weights have shrunk to {size}% of their initial size: a weight decay of {decay} is too strong."
        # What else is found then follows from it: steps are large for weights that are nearly nothing.
        yield Evidence(CERTAIN, text)


def _oversized_steps(context: DiagnosticContext) -> tuple[float, str] | None:
    """Return the excess of a step, decades, and words.

    The excess is over a hundredth of the weights; else the growth of the weights. None if neither is large.
    """
    limit, killed = LARGEST_UPDATE, context.fault == Fault.DEAD
    ratio, name = context.largest_update
    if ratio > max(limit, 0.0 if killed else context.first_update):
        layer = quote(name) if name else "a layer"
        words = (
            f"a step changes {layer} by {fraction(ratio)}, {number(ratio / limit)} times the healthy limit"
        )
        return math.log10(10 * ratio / limit), words
    ratio = context.first_update
    if ratio > limit and not killed:
        size = f"by {fraction(ratio)}, {number(ratio / limit)} times the healthy limit"
        words = f"the first steps of {context.optimizer} change the median layer {size}"
        return math.log10(10 * ratio / limit), words
    growth, name = context.growth
    if growth > (DIED_AFTER if killed else _NOTABLE_GROWTH):
        return math.log10(growth), f"the weights of {quote(name)} have grown {number(growth)}-fold"
    return None


def _decades_of_other_causes(context: DiagnosticContext) -> float:
    """Return the decades that other causes add to a step.

    They are the initial weights, the data, the loss and the momentum.

    0 under an optimizer that normalizes the gradient, which does not pass them on.
    """
    if context.normalizes_gradient:
        return 0.0
    value = context.setting("momentum")
    typical = 1 - TYPICAL_MOMENTUM
    excess = math.log10(typical / (1 - value)) if TYPICAL_MOMENTUM < value < 1 else 0.0
    if excess and context.finding.step > _BUILT_UP:
        excess = math.inf
    evidence = [*inputs_out_of_scale(context), *target_scale(context)]
    for cause in (Cause.UNNORMALIZED_INPUT, Cause.TOO_DEEP, Cause.BAD_INITIALIZATION):
        evidence += outputs_too_large(context, cause)
    evidence += [*unbounded_loss(context), *summed_loss(context)]
    if context.initial_weight_norms:
        evidence += weights_out_of_scale(context)
    return excess + sum(e.weight for e in evidence)
