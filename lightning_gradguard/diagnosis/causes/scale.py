"""Rules about scale: of the inputs, of the targets, of what a model gives before it has learnt anything."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_gradguard.diagnosis.causes.evidence import FADING, GROWING, Evidence
from lightning_gradguard.diagnosis.causes.model import DEEP, unexplained
from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.wording import count, number, power

#: Decades of the inputs' RMS from 1 that are worth a word: a factor of five.
_NOTABLE_SCALE = 0.7
#: First losses of a classification, in nats, that usual outputs give: that of ten thousand classes is 9.
_USUAL_LOSS = 20.0
_SQUARED = ("MseLoss", "SmoothL1Loss", "HuberLoss", "Pow")
_CLASSIFYING = ("NllLoss", "NllLoss2D", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits")


def unnormalized_input(case: DiagnosticContext) -> Iterator[Evidence]:
    """Inputs far from unit scale: they saturate the first layer, and the curvature grows with their square."""
    rms = case.input_rms
    if rms is None or not (math.isfinite(rms) and rms > 0) or abs(math.log10(rms)) < _NOTABLE_SCALE:
        return
    if case.shapes and len(case.shapes[0]) == 1 and case.normalised:
        return  # the first parameters that are used are a normalisation's
    decades = abs(math.log10(rms))
    # Where an activation saturates, inputs so large leave the first layer nothing but its flat ends.
    saturated = case.fault in FADING and case.saturating and rms > 1
    weight = 2 * decades if case.fault in GROWING or saturated else max(unexplained(case), 0.5 * decades)
    evidence = f"The batch's inputs have an RMS of {number(rms)}; layers are made for about 1."
    yield Evidence(weight, Cause.UNNORMALIZED_INPUT, evidence)


def target_scale(case: DiagnosticContext) -> Iterator[Evidence]:
    """Targets of thousands under a squared loss: the loss is their square."""
    if case.fault not in GROWING or not _is_squared(case) or not case.loss_start > 100:
        return
    if case.target_rms is not None and case.target_rms**2 < 0.01 * case.loss_start:
        return  # what is large is not the targets
    decades = math.log10(case.loss_start) / 2
    if case.target_rms is not None:
        size = number(case.target_rms)
        evidence = f"The targets have an RMS of {size}, and the loss began at {number(case.loss_start)}."
    else:
        evidence = f"The loss began at {number(case.loss_start)}: outputs and targets are about {power(decades)} apart."
    yield Evidence(decades, Cause.TARGET_SCALE, evidence)


def large_outputs(case: DiagnosticContext) -> Iterator[Evidence]:
    """A first loss that only outputs far too large can give, of a model whose layers' weights are usual."""
    graph_summary, first = case.graph_summary, case.loss_start
    if case.fault not in GROWING or graph_summary is None:
        return
    if any(op in graph_summary.loss_ops for op in _CLASSIFYING):
        usual, decades = _USUAL_LOSS, math.log10(max(first, 1.0) / 3)
    elif _is_squared(case) and case.target_rms is not None:
        usual, decades = 100 * max(case.target_rms**2, 1.0), math.log10(max(first, 1.0)) / 2
    else:
        return
    if not first > usual:
        return
    began = f"The loss began at {number(first)}, which only outputs far too large can give"
    layers = len(case.layers)
    if any(True for _ in unnormalized_input(case)):
        size = f"and the batch's inputs have an RMS of {number(case.input_rms or 0.0)}; layers are made for about 1"
        yield Evidence(decades, Cause.UNNORMALIZED_INPUT, f"{began}, {size}.")
    elif layers >= 2 * DEEP and abs(case.excess_gain) < 0.3 and not case.normalised:
        grown = f"the weights are usual, but signals grow in {count(layers, 'layer')} without normalization"
        yield Evidence(decades, Cause.TOO_DEEP, f"{began}: {grown}.")
    else:
        yield Evidence(
            decades, Cause.BAD_INITIALIZATION, f"{began}: the model enlarges what passes through it."
        )


SCALE_RULES = (unnormalized_input, target_scale, large_outputs)


def _is_squared(case: DiagnosticContext) -> bool:
    operations = case.graph_summary.loss_ops if case.graph_summary else {}
    return any(op in operations for op in _SQUARED)
