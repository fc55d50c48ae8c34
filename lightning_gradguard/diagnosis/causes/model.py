"""Rules that look for the cause in the model: its activations, weights, depth, and the graph itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from lightning_gradguard.diagnosis.causes.evidence import CERTAIN, FADING, GROWING, Evidence
from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.wording import count, listing, number, quote
from lightning_gradguard.introspection.operations import SATURATING
from lightning_gradguard.results import Fault

#: Gain of a layer, in decades from the usual one, that is worth a word: 1.4 times; and what cripples: 4 times.
_NOTABLE_GAIN, _CRIPPLING_GAIN = 0.15, 0.6
#: Growth of weights before units died that shows that they had been alive, and were killed by the steps.
DIED_AFTER = 1.5
#: RMS of biases that is more than standardised inputs make of the sums they are added to; and of those of a layer whose
#: activations are off their slope.
_LARGE_BIAS, _NOTABLE_BIAS = 3.0, 2.0
#: Mean of a layer's weights, as a part of their RMS, from which they are all of one sign.
_ONE_SIGNED = 0.5
#: Decades lost between layers of usual weights that depth alone does not lose by chance.
_BETWEEN = 3.0
#: Layers in a row without a short cut or normalisation that count as deep, and the decades that one is blamed
#: for: He-initialised ReLU nets of 30 layers tilt by one or two decades by chance alone.
DEEP, _DECADES_OF_DEPTH = 10, 0.05


def saturating_activation(case: DiagnosticContext) -> Iterator[Evidence]:
    """Activations that pass only a part: what their steepest slope loses, and what nothing else explains."""
    if case.fault in FADING and not case.saturating:
        yield from _shifted(case)
    if case.fault not in FADING or not case.saturating:
        return
    bounded, rest = _bounded_slopes(case), unexplained(case)
    kinds = " and ".join(count(n, f"{kind} activation") for kind, n in case.saturating.items())
    evidence = f"{kinds} on the shortest path from the loss to the first layer"
    if bounded >= 0.1:
        of = f" of the {case.lost_decades:.1f}" if case.lost_decades > bounded else ""
        evidence += f": even where the slope is steepest that costs {bounded:.1f}{of} decades"
    if rest >= 0.5:
        evidence += f", and {rest:.1f} decades are lost that the weights do not explain: slopes near zero"
    yield Evidence(bounded + rest, Cause.SATURATING_ACTIVATION, evidence + ".")


def _shifted(case: DiagnosticContext) -> Iterator[Evidence]:
    """Activations with one flat side, such as softplus or GELU, whose biases push everything there."""
    biases = [case.weight_rms(i) for i in range(len(case.names)) if len(case.shapes[i]) == 1]
    rest, size = unexplained(case), median(biases) if biases else 0.0
    if case.path.get("soft relu") and rest >= 1 and size > _NOTABLE_BIAS:
        evidence = (
            f"{rest:.1f} decades are lost that the weights do not explain, and the median bias has an RMS of "
            f"{number(size)}: {count(case.path['soft relu'], 'activation')} on the path work where they are flat."
        )
        yield Evidence(rest, Cause.SATURATING_ACTIVATION, evidence)
    elif rest >= _BETWEEN and case.path and not case.recurrent and case.fault == Fault.VANISHING:
        evidence = (
            f"{rest:.1f} decades are lost that neither weights nor activations explain: something between the layers "
            "makes the signals smaller."
        )
        yield Evidence(0.5 * rest, Cause.BAD_INITIALIZATION, evidence)


def bad_initialization(case: DiagnosticContext) -> Iterator[Evidence]:
    """Weights that shrink or blow up what passes through them, layer after layer."""
    norms = case.initial_weight_norms or case.weight_norms
    ruined = [n for n, norm in zip(case.names, norms, strict=True) if not math.isfinite(norm)]
    if ruined:
        yield Evidence(
            CERTAIN, Cause.BAD_INITIALIZATION, f"The weights of {listing(ruined)} are not finite themselves."
        )
        return
    yield from _one_signed(case)
    # PyTorch's default, 0.4 to 0.6 of the usual, adds up over depth, but stalls or kills nothing by itself.
    notable = _NOTABLE_GAIN if case.fault in (Fault.VANISHING, *GROWING) else _CRIPPLING_GAIN
    excess, layers = case.excess_gain, case.bare_layers
    excess = max(excess, 0.0) if case.fault in GROWING else min(excess, 0.0)
    if abs(excess) <= notable or not layers or case.fault not in FADING + GROWING:
        return
    scheme = "He" if case.usual_gain > 1 else "Xavier"
    verb = "were at the start" if case.initial_weight_norms else "are"
    size = (
        f"{10**excess:.2g} times the size that {scheme} initialization gives"
        if excess > -3
        else "all but zero"
    )
    lost = (
        f"{abs(excess) * layers:.1f} decades {'lost' if excess < 0 else 'gained'} in {count(layers, 'layer')}"
    )
    evidence = f"The median layer's weights {verb} {size}: {lost}."
    yield Evidence(abs(excess) * layers, Cause.BAD_INITIALIZATION, evidence)


def _one_signed(case: DiagnosticContext) -> Iterator[Evidence]:
    """Weights that all have the same sign: a ReLU's inputs are then all positive, or all negative."""
    if case.fault != Fault.DEAD or case.weight_means is None or case.growth[0] > DIED_AFTER:
        return
    signed = [
        case.names[i]
        for i in case.layers
        if abs(case.weight_means[i]) > _ONE_SIGNED * case.weight_rms(i) > 0
        and math.prod(case.shapes[i]) >= 64
    ]
    if signed:
        yield Evidence(
            3.0, Cause.BAD_INITIALIZATION, f"The weights of {listing(signed)} are nearly all of one sign."
        )


def too_deep(case: DiagnosticContext) -> Iterator[Evidence]:
    """Many layers in a row with no way around them."""
    graph_summary = case.graph_summary
    if (
        graph_summary is None
        or graph_summary.skips
        or graph_summary.recurrent
        or case.fault not in FADING + GROWING
    ):
        return
    if not case.path or case.bare_layers < DEEP:
        return
    loss = f", {case.lost_decades / case.bare_layers:.1f} decades lost in each" if case.lost_decades else ""
    evidence = (
        f"{count(case.bare_layers, 'layer')} in a row without a skip connection or normalization{loss}."
    )
    yield Evidence(_DECADES_OF_DEPTH * case.bare_layers, Cause.TOO_DEEP, evidence)


def recurrence(case: DiagnosticContext) -> Iterator[Evidence]:
    """The same weights applied at every step of a sequence."""
    tilt = case.finding.value if case.fault == Fault.VANISHING_IN_TIME else case.time_tilt
    if tilt is not None and abs(tilt) >= 1:
        way = "smaller" if tilt > 0 else "larger"
        gradient = f"a gradient {abs(tilt):.1f} decades {way} than the last tenth"
        evidence = f"The first tenth of the sequence gets {gradient}."
        yield Evidence(abs(tilt), Cause.RECURRENCE, evidence)
        return
    graph_summary = case.graph_summary
    if graph_summary is None or not graph_summary.recurrent or case.fault not in FADING + GROWING:
        return
    growing = case.fault in GROWING
    matrices = [i for i in case.layers if case.names[i] in graph_summary.recurrent]
    for i in sorted(matrices, key=lambda i: "hh" not in case.names[i]):
        # Of the weights at the start: what has run away since is what came of it.
        size = (case.initial_weight_norms or case.weight_norms)[i] / math.sqrt(math.prod(case.shapes[i]))
        gain = size * math.sqrt(case.shapes[i][-1])
        square = len(set(case.shapes[i])) == 1
        if not (graph_summary.recurrences and square and gain > 0):
            # Gates, or a fused layer: the norm of the weights does not tell what one step does.
            yield Evidence(
                1.0, Cause.RECURRENCE, f"{quote(case.names[i])} is applied at each step of a sequence."
            )
        elif (gain > 1) == growing:
            decades = abs(math.log10(gain)) * graph_summary.recurrences
            evidence = (
                f"{quote(case.names[i])}, of gain {number(gain)}, is applied {graph_summary.recurrences} times "
                f"in a row: {decades:.1f} decades {'gained' if growing else 'lost'} over the sequence."
            )
            yield Evidence(decades, Cause.RECURRENCE, evidence)


def dead_activation(case: DiagnosticContext) -> Iterator[Evidence]:
    """Units that no input reaches: ReLUs whose inputs are all negative."""
    zero = [case.names[i] for i in case.layers if case.gradients_log10[i] == -math.inf]
    rectifying = case.path.get("relu", 0) + case.path.get("hardtanh", 0)
    opaque = not case.path
    if case.fault == Fault.DEAD:
        yield from _dead_units(case)
    elif case.fault in (Fault.STALLED, Fault.DISCONNECTED) and zero and (rectifying or opaque):
        evidence = (
            f"The gradient of {listing(zero)} is exactly zero, though a path leads there: no unit is active."
        )
        missing = case.graph_summary.missing if case.graph_summary else frozenset()
        if not missing.intersection(zero):
            yield Evidence(1.5, Cause.DEAD_ACTIVATION, evidence)


def _dead_units(case: DiagnosticContext) -> Iterator[Evidence]:
    where = f" in {listing(case.finding.parameters)}" if case.finding.parameters else ""
    evidence = f"{100 * case.finding.value:.0f} % of the units get a gradient of exactly zero{where}"
    biases = [(case.weight_rms(i), i) for i, name in enumerate(case.names) if name.endswith("bias")]
    # Of weights that have grown the sums have, too.
    size, i = max(biases, default=(0.0, -1)) if case.growth[0] <= DIED_AFTER else (0.0, -1)
    # Standardised inputs make sums of about the layer's gain, at most a few times that.
    if size > _LARGE_BIAS:
        evidence += (
            f"; {quote(case.names[i])} has an RMS of {number(size)}, far more than the sums it is added to"
        )
    if case.growth[0] > DIED_AFTER:
        yield Evidence(1.0, Cause.DEAD_ACTIVATION, evidence + ", and they had been alive.")
        return
    yield Evidence(2.5 if size > _LARGE_BIAS else 2.0, Cause.DEAD_ACTIVATION, evidence + ".")


def detached_graph(case: DiagnosticContext) -> Iterator[Evidence]:
    """Parameters to which no path leads, or none with a slope; says between which two the graph is cut."""
    steps = [
        n
        for n in case.finding.parameters
        if case.graph_summary and case.graph_summary.kinds.get(n, {}).get("step")
    ]
    if steps and case.fault in (Fault.DEAD, Fault.DISCONNECTED, Fault.STALLED):
        evidence = f"The path from the loss to {listing(steps)} leads through rounding, or a sign, whose slope is zero."
        yield Evidence(CERTAIN, Cause.DETACHED_GRAPH, evidence)
        return
    missing = case.graph_summary.missing if case.graph_summary else frozenset()
    cut = [n for n in case.names if n in missing]
    if not cut or not (case.fault == Fault.DISCONNECTED or missing.intersection(case.finding.parameters)):
        return
    evidence = f"No path leads from the loss to {listing(cut)}"
    reached = [n for n in case.names if n not in missing]
    after = next((n for n in case.names[case.names.index(cut[-1]) :] if n not in missing), None)
    if not reached:
        evidence += ", nor to any other tensor of this optimizer: the loss is of another model"
    elif after is not None:
        evidence += f": the graph is cut between {quote(cut[-1])} and {quote(after)}"
    yield Evidence(CERTAIN, Cause.DETACHED_GRAPH, evidence + ".")


MODEL_RULES = (
    saturating_activation,
    bad_initialization,
    too_deep,
    recurrence,
    dead_activation,
    detached_graph,
)


def _bounded_slopes(case: DiagnosticContext) -> float:
    """Decades that the activations cost even where they are steepest; a normalisation makes up for its own."""
    total = sum(case.saturating.values())
    decades = sum(-math.log10(min(SATURATING[kind], 1.0)) * n for kind, n in case.saturating.items())
    return decades * max(0, total - case.path.get("normalisation", 0)) / max(total, 1)


def unexplained(case: DiagnosticContext) -> float:
    """Decades lost that neither bounded slopes nor small weights account for."""
    return max(
        0.0, case.lost_decades - _bounded_slopes(case) - max(0.0, -case.excess_gain) * case.bare_layers
    )
