"""Rules that look for the cause in the training: optimizer, loss function, data and precision."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_gradguard.diagnosis.causes.evidence import CERTAIN, GROWING, Evidence
from lightning_gradguard.diagnosis.causes.loss import bottomless_loss
from lightning_gradguard.diagnosis.causes.model import DIED_AFTER, bad_initialization
from lightning_gradguard.diagnosis.causes.scale import SCALE_RULES
from lightning_gradguard.diagnosis.context import DiagnosticContext, middle_of
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.nan_origin import Place
from lightning_gradguard.diagnosis.wording import listing, number, power, quote
from lightning_gradguard.results import Fault

#: Applied update ratios: the usual one (CS231n notes), and the largest healthy one.
USUAL_UPDATE, LARGEST_UPDATE = 1e-3, 0.1
#: Growth of a layer's weights since the start that healthy training does not show in so few steps.
_NOTABLE_GROWTH = 3.0
#: Steps by which a velocity of the usual momentum has built up; what comes later is not the rate's doing alone.
_BUILT_UP = 10
#: Momentum that is usual; it enlarges a steady step by 1 / (1 - momentum).
USUAL_MOMENTUM = 0.9
_LOW_PRECISION = ("float16", "float8_e4m3fn", "float8_e5m2")


def usual_learning_rate(case: DiagnosticContext) -> float:
    """What one would begin with: 1e-3 for optimizers that normalise the gradient, 1e-2 for the others."""
    return 1e-3 if case.normalises else 1e-2


def learning_rate_too_high(case: DiagnosticContext) -> Iterator[Evidence]:
    """Steps too large for the weights, now or in the beginning, or weights that have grown from them.

    What other causes account for is taken off: they made the gradient large, or added it up.
    """
    wild = _wild_steps(case)
    if case.fault not in (*GROWING, Fault.DEAD) or wild is None or case.decayed:
        return
    decades, words = wild
    left = decades - (0.0 if case.fault == Fault.DEAD else _inherited(case))
    # A step this wild is what makes the next loss overflow, if that was on its way.
    grown = case.loss_start > 0 and case.loss_now > 3 * case.loss_start
    before = case.found_before(Fault.EXPLODING, Fault.OVERSIZED_UPDATE)
    if left <= 0:
        left = min(0.9 * decades, 1.0)  # a lower one would help all the same
    elif case.fault == Fault.NONFINITE and (grown or before):
        left += 10.0
    elif case.fault == Fault.DEAD:
        left += 2.0
    evidence = f"At a learning rate of {number(case.learning_rate)} {words}."
    yield Evidence(left, Cause.LEARNING_RATE_TOO_HIGH, evidence)


def _wild_steps(case: DiagnosticContext) -> tuple[float, str] | None:
    """Decades of a step above a hundredth of the weights, or of the weights' growth, and the words for it."""
    limit = LARGEST_UPDATE
    ratio, name = case.largest_update
    if ratio > max(limit, 0.0 if case.fault == Fault.DEAD else case.first_update):
        times = f"{number(ratio / limit)} times the limit {limit}"
        return math.log10(
            10 * ratio / limit
        ), f"the update ratio is {number(ratio)} in {quote(name)}, {times}"
    ratio = case.first_update
    if ratio > limit and case.fault != Fault.DEAD:
        size = f"by {number(ratio)} of its size, {number(ratio / limit)} times the limit {limit}"
        return math.log10(
            10 * ratio / limit
        ), f"the first steps of {case.optimizer} change the median layer {size}"
    growth, name = case.growth
    if growth > (DIED_AFTER if case.fault == Fault.DEAD else _NOTABLE_GROWTH):
        return math.log10(growth), f"the weights of {quote(name)} have grown {number(growth)}-fold"
    return None


def learning_rate_too_low(case: DiagnosticContext) -> Iterator[Evidence]:
    """Steps too small for the weights, at a learning rate below the usual."""
    if case.fault not in (Fault.STALLED, Fault.VANISHING) or not case.learning_rates:
        return
    rate, usual = case.learning_rate, usual_learning_rate(case)
    if rate == 0:
        yield Evidence(CERTAIN, Cause.LEARNING_RATE_TOO_LOW, "The learning rate is 0.")
        return
    below = math.log10(usual / rate)
    update = case.typical_update
    if update > 0:
        below = min(below, math.log10(USUAL_UPDATE / update))
    if case.fault == Fault.STALLED and not case.normalises:
        # Its step is proportional to the gradient, so where that is small for no other reason, a larger
        # rate is what helps.
        below = max(below, 0.6)
    evidence = f"The learning rate is {number(rate)}"
    if not math.isnan(update):
        evidence += f", and the median update ratio {number(update)}, where {USUAL_UPDATE} is usual"
    yield Evidence(below, Cause.LEARNING_RATE_TOO_LOW, evidence + ".")


def optimizer_epsilon(case: DiagnosticContext) -> Iterator[Evidence]:
    """An epsilon that outweighs the gradient in the optimizer's denominator."""
    eps = case.setting("eps")
    if case.fault not in (Fault.STALLED, Fault.VANISHING, Fault.UNDERFLOW) or not (
        case.normalises and eps > 0
    ):
        return
    sick = [i for i in case.layers if case.names[i] in case.finding.parameters] or case.layers
    rms = middle_of(case.gradient_rms_log10(i) for i in sick)
    if rms >= math.log10(eps) or math.isnan(rms):
        return
    decades = math.log10(eps) - rms
    evidence = (
        f"{case.optimizer} divides by the gradient's size plus eps = {number(eps)}, but the RMS of the "
        f"gradients is {power(rms)}: steps are {decades:.1f} decades smaller than the learning rate says."
    )
    # Where the gradient vanished on its way, that is the cause; eps only keeps it from being made up for.
    yield Evidence(
        decades if case.fault == Fault.STALLED else min(decades, 1.0), Cause.OPTIMIZER_EPSILON, evidence
    )


def momentum(case: DiagnosticContext) -> Iterator[Evidence]:
    """A velocity that goes on growing while gradients do not."""
    value = case.setting("momentum")
    killed = case.fault == Fault.DEAD and case.growth[0] > DIED_AFTER
    if not (case.fault in GROWING or killed) or not value >= 0.95:
        return
    if value >= 1:
        evidence = f"A momentum of {number(value)} lets the velocity grow by itself."
        yield Evidence(50.0, Cause.MOMENTUM, evidence)
        return
    factor = 1 / (1 - value)
    evidence = (
        f"Momentum {number(value)} lets a steady gradient add up to {number(factor)} times the learning rate."
    )
    wild = _wild_steps(case) if case.finding.step > _BUILT_UP else None
    weight = max(math.log10(factor), wild[0] if wild else 0.0)
    yield Evidence(weight + 2.5 if killed else weight, Cause.MOMENTUM, evidence)


def bad_data(case: DiagnosticContext) -> Iterator[Evidence]:
    """NaN or Inf in the batch itself."""
    if case.fault != Fault.NONFINITE:
        return
    origin = case.origin
    if origin is not None and (origin.place in (Place.BATCH, Place.OUTSIDE) or origin.in_data):
        yield Evidence(CERTAIN if origin.place == Place.BATCH else 8.0, Cause.BAD_DATA, str(origin))
    elif case.bad_rows:
        more = f" and {len(case.bad_rows) - 8} more" if len(case.bad_rows) > 8 else ""
        rows = ", ".join(str(row) for row in case.bad_rows[:8]) + more
        evidence = f"The batch holds NaN or Inf in row{'' if len(case.bad_rows) == 1 else 's'} {rows}."
        # Where the replay blames something else, what is not finite may be meant, such as targets that are masked.
        elsewhere = origin is not None and origin.located
        yield Evidence(3.0 if elsewhere else CERTAIN, Cause.BAD_DATA, evidence)
    elif origin is None and case.bad_rows is None and case.nonfinite_loss and _calm(case):
        evidence = (
            "The loss stopped being finite from one step to the next; whether the batch is was not looked at."
        )
        yield Evidence(2.5, Cause.BAD_DATA, evidence)


def low_precision(case: DiagnosticContext) -> Iterator[Evidence]:
    """Numbers below, or above, what the dtype can hold."""
    low = [dtype for dtype in case.dtypes if dtype in _LOW_PRECISION]
    if case.fault == Fault.UNDERFLOW:
        dtype = low[0] if low else next(iter(case.dtypes), "this dtype")
        evidence = f"{100 * case.finding.value:.0f} % of the gradient's elements are too small for {dtype}."
        yield Evidence(10.0, Cause.LOW_PRECISION, evidence)
    elif low and case.fault == Fault.DEAD and all(g == -math.inf for g in case.gradients_log10):
        evidence = (
            f"Every gradient is exactly zero, those of the last layer too, and they pass through {listing(low)}, "
            "which holds nothing below 6e-8."
        )
        yield Evidence(6.0, Cause.LOW_PRECISION, evidence)
    elif low and case.fault in (Fault.NONFINITE, Fault.VANISHING):
        if case.origin is not None and case.origin.overflow and case.origin.dtype in low:
            yield Evidence(8.0, Cause.LOW_PRECISION, str(case.origin))
            return
        evidence = (
            f"Gradients pass through {listing(low)}, which holds nothing above 65504 and little below 6e-8."
        )
        yield Evidence(4.0 if case.fault == Fault.NONFINITE else 1.0, Cause.LOW_PRECISION, evidence)


def outlier_batch(case: DiagnosticContext) -> Iterator[Evidence]:
    """One batch unlike the others, after calm."""
    if case.fault == Fault.STALLED and "adagrad" in case.optimizer.lower():
        spike = next((f for f in case.findings if f.fault == Fault.SPIKE), None)
        if spike is not None and abs(spike.step - case.finding.step) <= 1:
            evidence = (
                f"The gradient of step {spike.step} was {number(spike.value)} ({spike.measure or 'spike score'}), and "
                f"{case.optimizer} divides by the sum of all squares so far, which never falls again."
            )
            yield Evidence(5.0, Cause.OUTLIER_BATCH, evidence)
    if case.fault == Fault.SPIKE and case.finding.value > 0:
        evidence = (
            f"The {case.finding.measure or 'gradient'} is {number(case.finding.value)} at this step alone."
        )
        yield Evidence(1 + math.log10(case.finding.value), Cause.OUTLIER_BATCH, evidence)
    if case.fault == Fault.NONFINITE and _calm(case) and not case.bad_rows:
        evidence = f"All was calm until step {case.finding.step}."
        yield Evidence(2.0, Cause.OUTLIER_BATCH, evidence)


TRAINING_RULES = (
    learning_rate_too_high,
    learning_rate_too_low,
    optimizer_epsilon,
    momentum,
    bad_data,
    low_precision,
    outlier_batch,
)


def _inherited(case: DiagnosticContext) -> float:
    """Decades by which other causes enlarge a step: the weights at the start, the data, the momentum.

    An optimizer that normalises the gradient does not pass them on.
    """
    if case.normalises:
        return 0.0
    momentum = case.setting("momentum")
    usual = 1 - USUAL_MOMENTUM
    excess = math.log10(usual / (1 - momentum)) if USUAL_MOMENTUM < momentum < 1 else 0.0
    if excess and case.finding.step > _BUILT_UP:
        excess = math.inf
    rules = [*SCALE_RULES, bottomless_loss, *([bad_initialization] if case.initial_weight_norms else [])]
    return excess + sum(clue.weight for rule in rules for clue in rule(case))


def _calm(case: DiagnosticContext) -> bool:
    """Whether nothing was out of the ordinary before this step."""
    return case.steps > 5 and not case.loss_now > 1.5 * abs(case.loss_start) and not case.found_before(*Fault)
