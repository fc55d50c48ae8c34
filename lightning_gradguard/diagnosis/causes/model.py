"""Causes in the model: activations, weights, depth, graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from lightning_gradguard.diagnosis.causes.data import outputs_too_large
from lightning_gradguard.diagnosis.causes.numerics import FROM_THE_START
from lightning_gradguard.diagnosis.context import CERTAIN, DEEP, PADDED, DiagnosticContext, Evidence
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.operation_evidence import is_initial
from lightning_gradguard.diagnosis.wording import count, listing, number, quote
from lightning_gradguard.introspection.graph_problems import Problem
from lightning_gradguard.introspection.operations import SATURATING, kind_of
from lightning_gradguard.results import Fault

#: Decades by which a layer's gain differs from `preserving_gain` before it is reported (a factor of 1.4), and before it
#: can stall or kill a network by itself (a factor of 4).
_NOTABLE_GAIN, _CRIPPLING_GAIN = 0.15, 0.6
#: Growth of the weights which shows that dead units were once active, and that the updates killed them.
DIED_AFTER = 1.5
#: RMS of a bias that exceeds the sums of standardized inputs, and RMS of the median bias that moves activations to
#: where they are flat.
_LARGE_BIAS, _NOTABLE_BIAS = 3.0, 2.0
#: Mean of a layer's weights as a fraction of their RMS from which nearly all have the same sign.
_ONE_SIGNED = 0.5
#: Decades lost between layers of usual weights that depth does not lose by chance.
_LOST_BETWEEN_LAYERS = 3.0
#: Saturating activations for each layer, below which they do not explain what a residual net loses over depth.
_FEW_OF_LAYERS = 0.25
#: Activations whose slope is zero only by rounding, far out.
_ROUND = ("sigmoid", "tanh", "softsign", "erf", "atan")
#: Decades by which layers behind a softmax lie below the others before it is blamed, and the faults it explains. At the
#: start of a healthy transformer, queries and keys lie 2.6 below.
_STARVED = 3.0
_OF_A_SOFTMAX = (Fault.VANISHING, Fault.STALLED, Fault.DEAD, Fault.OVERSIZED_UPDATE, Fault.EXPLODING)
#: Weight of a factor of zero: more than dead units, which look alike.
_BY_ZERO = 4.0
#: Decades for which one layer of a deep network is responsible: He-initialized ReLU networks of 30 layers tilt by one
#: or two decades by chance.
_DECADES_PER_LAYER = 0.05
#: Smooth operations whose slope is zero by rounding on one side, far out, where a ReLU's is zero at once.
_ROUND_ON_ONE_SIDE = ("Gelu", "Silu", "Elu", "Celu", "Mish", "Softplus", "Hardswish", "Softmax")


def saturating_activation(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame activations whose slope is near zero.

    Their weight is what they lose even at their steepest, plus the decades that nothing else explains.
    """
    decades, starved = context.starved_by_softmax
    if decades >= _STARVED and context.fault in _OF_A_SOFTMAX:
        text = (
            f"{listing(starved)} get a gradient 10^{decades:.1f} times smaller than the layers beside them: the scores "
            "of the softmax above them are so large that it is sure of one place, and its slope is near 0."
        )
        yield Evidence(decades, text)
    if not context.too_small:
        return
    name, operations = operations_above(context)
    saturated = [op for op in _flat(operations) if kind_of(op) in _ROUND]
    if name and saturated == _flat(operations) != []:
        text = f"The gradient of {quote(name)} is exactly zero: behind it a {kind_of(saturated[0])} is saturated."
        yield Evidence(_BY_ZERO, text)
    rest = context.unexplained_decades
    if _is_residual(context) and sum(context.saturating.values()) < _FEW_OF_LAYERS * len(context.layers):
        rest = 0.0  # a few activations do not shrink what passes beside them, layer after layer
    if not context.saturating:
        # Activations that are flat on one side, such as softplus or GELU, pushed there by their biases.
        biases = _median_bias_rms(context)
        if context.path.get("soft relu") and rest >= 1 and biases > _NOTABLE_BIAS:
            activations = count(context.path["soft relu"], "activation")
            text = (
                f"Gradients shrink by a factor of 10^{rest:.1f} that the weights do not explain. The median bias "
                f"has an RMS of {number(biases)}, which moves {activations} on the path to where they are flat."
            )
            yield Evidence(rest, text)
        if rest >= _LOST_BETWEEN_LAYERS and _has_softmax_units(context):
            softmax = count(context.path["attention"], "softmax", "softmax activations")
            text = (
                f"Gradients shrink by a factor of 10^{rest:.1f} that the weights do not explain. The path from the "
                f"loss to the first layer has {softmax}, whose slope is at most 0.25, and less the more units share it."
            )
            yield Evidence(rest, text)
        return
    bounded = context.decades_lost_in_activations
    kinds = " and ".join(count(n, f"{kind} activation") for kind, n in context.saturating.items())
    text = f"The path from the loss to the first layer has {kinds}."
    if bounded >= 0.1:
        in_all = f" (in all: 10^{context.lost_decades:.1f})" if context.lost_decades > bounded else ""
        text += f" Even at their steepest, they shrink gradients by a factor of 10^{bounded:.1f}{in_all}."
    if rest >= 0.5:
        factor = "another factor" if bounded >= 0.1 else "a factor"
        text += f" Gradients lose {factor} of 10^{rest:.1f} that the weights do not explain, so slopes are near zero."
    yield Evidence(bounded + rest, text)


def _is_residual(context: DiagnosticContext) -> bool:
    """Return True for skip connections with normalizations."""
    graph = context.graph_summary
    return graph is not None and graph.skips and graph.normalizations > 0


def bad_initialization(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame initial weights that shrink or enlarge signals, or that make NaN."""
    if context.too_small and context.zero_factors:
        text = (
            f"{listing(context.zero_factors)} are zero and stay so: the gradient of each is a product with another "
            "one that is zero."
        )
        yield Evidence(CERTAIN, text)
    origin = context.origin
    if (
        context.fault == Fault.NONFINITE
        and origin is not None
        and origin.located
        and is_initial(origin.facts)
    ):
        # Later on the parameter was brought to zero by the training.
        yield Evidence(9.0 if context.steps <= FROM_THE_START else 3.0, str(origin))
    yield from _lost_between_layers(context)
    yield from _one_signed_weights(context)
    yield from weights_out_of_scale(context)
    yield from outputs_too_large(context, Cause.BAD_INITIALIZATION)


def weights_out_of_scale(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame weights out of scale for their fan-in.

    Also weights that are NaN or Inf.
    """
    ruined = [
        n for n, norm in zip(context.names, context.starting_norms, strict=True) if not math.isfinite(norm)
    ]
    if ruined:
        verb = "were NaN or Inf before the first step" if context.initial_weight_norms else "are NaN or Inf"
        yield Evidence(CERTAIN, f"The weights of {listing(ruined)} {verb}.")
        return
    # PyTorch's default has 0.4 to 0.6 of the usual gain. That adds up over depth, but does not stall or kill by itself.
    notable = _NOTABLE_GAIN if context.too_large or context.fault == Fault.VANISHING else _CRIPPLING_GAIN
    excess, layers = context.excess_gain, context.bare_layers
    excess = max(excess, 0.0) if context.too_large else min(excess, 0.0)
    if abs(excess) <= notable or not layers or not (context.too_small or context.too_large):
        return
    scheme = "He" if context.preserving_gain > 1 else "Xavier"
    known = bool(context.initial_weight_norms)
    weights = "The initial weights of the median layer were" if known else "The median layer's weights are"
    size = f"{10**excess:.2g} times the size of {scheme} initialization" if excess > -3 else "almost zero"
    decades = abs(excess) * layers
    change = f"{'shrink' if excess < 0 else 'grow'} by a factor of 10^{decades:.1f}"
    yield Evidence(decades, f"{weights} {size}: over {count(layers, 'layer')}, gradients {change}.")


def _lost_between_layers(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame what lies between the layers.

    Only if neither weights nor activations explain how much gradients shrink.
    """
    rest = context.unexplained_decades
    if (
        context.fault != Fault.VANISHING
        or rest < _LOST_BETWEEN_LAYERS
        or not context.path
        or context.recurrent
    ):
        return
    soft = context.path.get("soft relu") and _median_bias_rms(context) > _NOTABLE_BIAS
    if context.saturating or soft or _has_softmax_units(context):
        return  # see saturating_activation
    text = (
        f"Gradients shrink by a factor of 10^{rest:.1f} that neither weights nor activations explain: something "
        "between the layers shrinks the signals."
    )
    yield Evidence(0.5 * rest, text)


def _one_signed_weights(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame weights of one sign.

    The inputs of a ReLU are then all positive or all negative.
    """
    if context.fault != Fault.DEAD or context.weight_means is None or context.growth[0] > DIED_AFTER:
        return
    signed = [
        context.names[i]
        for i in context.layers
        if abs(context.weight_means[i]) > _ONE_SIGNED * context.weight_rms(i) > 0
        and math.prod(context.shapes[i]) >= 64
    ]
    if signed:
        yield Evidence(3.0, f"Nearly all weights of {listing(signed)} have the same sign.")


def too_deep(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame many layers without a skip connection."""
    graph, layers = context.graph_summary, context.bare_layers
    plain = graph is not None and not graph.skips and not graph.recurrent and bool(context.path)
    if plain and layers >= DEEP and (context.too_small or context.too_large):
        decades = context.lost_decades / layers
        each = f"; each divides the gradient by {10**decades:.2g} on average" if decades else ""
        text = f"{count(layers, 'layer')} are in a row without a skip connection or normalization{each}."
        yield Evidence(_DECADES_PER_LAYER * layers, text)
    yield from outputs_too_large(context, Cause.TOO_DEEP)


def normalization(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame a normalization over a single element, or one after each block of a deep residual net.

    The result of the former is the same for every input, so no gradient passes. The latter stand on every path to the
    first layer, and each shrinks the gradient (arXiv:2002.04745).
    """
    for problem in context.problems if context.too_small else ():
        if problem.kind == Problem.ONE_ELEMENT_NORMALIZATION:
            yield Evidence(CERTAIN, problem.text)
    if context.is_post_norm and context.fault == Fault.VANISHING and context.lost_decades >= 1:
        norms = context.graph_summary.post_norms if context.graph_summary else 0
        text = (
            f"The model normalizes after each of {norms} sums (post-norm): no path from the loss to the first layer is "
            f"free of normalizations, and gradients lose a factor of 10^{context.lost_decades:.1f} on it."
        )
        yield Evidence(context.lost_decades, text)


def recurrence(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame weights applied at every step of a sequence."""
    tilt = context.finding.value if context.fault == Fault.VANISHING_IN_TIME else context.time_tilt
    if tilt is not None and abs(tilt) >= 1:
        way = "smaller" if tilt > 0 else "larger"
        gradient = f"a gradient 10^{abs(tilt):.1f} times {way} than the last tenth"
        text = f"The first tenth of the sequence gets {gradient}."
        if context.padding >= PADDED:
            text += f" The last {100 * context.padding:.0f} % of the steps of a sequence are all the same: padding."
        yield Evidence(abs(tilt), text)
        return
    graph, growing = context.graph_summary, context.too_large
    if graph is None or not graph.recurrent or not (context.too_small or growing):
        return
    matrices = [i for i in context.layers if context.names[i] in graph.recurrent]
    for i in sorted(matrices, key=lambda i: "hh" not in context.names[i]):
        # From the weights at the start: those that have run away since are a result.
        shape, size = context.shapes[i], context.starting_norms[i] / math.sqrt(math.prod(context.shapes[i]))
        gain = size * math.sqrt(shape[-1])
        if not (graph.recurrences and len(set(shape)) == 1 and gain > 0):
            # With gates or a fused layer the norm of the weights does not tell what one step does.
            yield Evidence(1.0, f"{quote(context.names[i])} is applied at each step of a sequence.")
        elif (gain > 1) == growing:
            decades = abs(math.log10(gain)) * graph.recurrences
            text = (
                f"{quote(context.names[i])} has a gain of {number(gain)} and is applied {graph.recurrences} times in a "
                f"row: over the sequence, gradients {'grow' if growing else 'shrink'} by a factor of 10^{decades:.1f}."
            )
            yield Evidence(decades, text)


def dead_activation(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame ReLUs whose inputs are all negative."""
    name, operations = operations_above(context)
    if name and "Mul" in operations and not _flat(operations):
        return  # see _multiplied_by_zero
    if context.fault == Fault.DEAD:
        where = f" in {listing(context.finding.parameters)}" if context.finding.parameters else ""
        text = f"{100 * context.finding.value:.0f}% of the units get a gradient of exactly zero{where}"
        if context.growth[0] > DIED_AFTER:
            # The biases say nothing here: if weights have grown, so have the sums.
            yield Evidence(1.0, text + "; they were active before.")
            return
        biases = [(context.weight_rms(i), i) for i, name in enumerate(context.names) if name.endswith("bias")]
        size, i = max(biases, default=(0.0, -1))
        # Standardized inputs make sums of about the layer's gain, at most a few times that.
        if size > _LARGE_BIAS:
            bias = f"{quote(context.names[i])} has an RMS of {number(size)}"
            text += f". {bias}, far more than the sums it is added to, so no input activates the units"
        yield Evidence(2.5 if size > _LARGE_BIAS else 2.0, text + ".")
        return
    zero = [context.names[i] for i in context.layers if context.gradients_log10[i] == -math.inf]
    rectifying = context.path.get("relu", 0) + context.path.get("hardtanh", 0)
    could_be_dead = zero and (rectifying or not context.path) and not context.missing.intersection(zero)
    if context.fault in (Fault.STALLED, Fault.DISCONNECTED) and could_be_dead:
        text = (
            f"The gradient of {listing(zero)} is exactly zero although a path leads there: no unit is active."
        )
        yield Evidence(1.5, text)


def detached_graph(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame a graph that is cut; name where.

    A function with slope 0, such as rounding, counts too.
    """
    concerned, missing = context.finding.parameters, context.missing
    kinds = context.graph_summary.kinds if context.graph_summary else {}
    steps = [name for name in concerned if kinds.get(name, {}).get("step")]
    if steps and context.fault in (Fault.DEAD, Fault.DISCONNECTED, Fault.STALLED):
        text = f"The path from the loss to {listing(steps)} goes through rounding or a sign function, whose slope is 0."
        yield Evidence(CERTAIN, text)
        return
    if any(p.kind == Problem.STALE_OPTIMIZER and p.certain for p in context.problems):
        return  # nothing is cut: the tensors are of other layers
    yield from _result_not_used(context)
    yield from _multiplied_by_zero(context)
    graph = context.graph_summary
    harmless = graph.idle | graph.unused if graph else frozenset()
    cut = [name for name in context.names if name in missing - harmless]
    cut = cut or [name for name in context.names if name in missing and not harmless.intersection(concerned)]
    if not cut or not (context.fault == Fault.DISCONNECTED or missing.intersection(concerned)):
        return
    text = f"No path leads from the loss to {listing(cut)}"
    after = next((n for n in context.names[context.names.index(cut[-1]) :] if n not in missing), None)
    if len(cut) == len(context.names):
        text += ", nor to any other tensor of this optimizer"
        text += (
            ": the graph is cut behind them" if context.ran_uncut else ": the loss comes from another model"
        )
    elif after is not None:
        text += f": the graph is cut between {quote(cut[-1])} and {quote(after)}"
    yield Evidence(CERTAIN, text + ".")


def _result_not_used(context: DiagnosticContext) -> Iterator[Evidence]:
    """Say that the loss does not learn from what some layers give."""
    idle = context.graph_summary.idle if context.graph_summary else frozenset()
    concerned = [name for name in context.finding.parameters if name in idle]
    if context.fault == Fault.DISCONNECTED and concerned:
        text = (
            f"The loss does not learn from the result of {listing(concerned)}: it does not use it, or takes it as a "
            "target, computed without gradients."
        )
        yield Evidence(CERTAIN, text)


def _multiplied_by_zero(context: DiagnosticContext) -> Iterator[Evidence]:
    """Blame a factor of zero, where nothing else between two layers can stop a gradient."""
    name, operations = operations_above(context)
    if name and "Mul" in operations and not _flat(operations):
        text = (
            f"A path leads from the loss to {quote(name)}, and its gradient is exactly zero: between it and the next "
            "layer its output is multiplied by zero."
        )
        yield Evidence(_BY_ZERO, text)


def operations_above(context: DiagnosticContext) -> tuple[str, tuple[str, ...]]:
    """Return the concerned layer nearest to the output that gets a gradient of exactly zero, and what follows it.

    That is the operations between it and the next layer towards the loss. The name is empty if there is no such layer.
    """
    graph = context.graph_summary
    if graph is None or context.fault not in (Fault.DEAD, Fault.DISCONNECTED, Fault.STALLED):
        return "", ()
    concerned = set(context.finding.parameters)
    zero = [
        context.names[i]
        for i in context.layers
        if context.gradients_log10[i] == -math.inf and context.names[i] in graph.above
    ]
    zero = [name for name in zero if name in concerned] or zero
    return (zero[-1], graph.above[zero[-1]]) if zero else ("", ())


def _flat(operations: Sequence[str]) -> list[str]:
    """Return the operations that have a slope of zero somewhere."""
    kinds = ("relu", "hardtanh", "step", *SATURATING)
    return [
        op for op in operations if kind_of(op) in kinds or op in ("Where", "MaskedFill", *_ROUND_ON_ONE_SIDE)
    ]


def _has_softmax_units(context: DiagnosticContext) -> bool:
    """Return True if softmax is the activation of hidden layers; attention has several layers for each."""
    return 2 * context.path.get("attention", 0) >= max(context.bare_layers, 1)


def _median_bias_rms(context: DiagnosticContext) -> float:
    biases = [context.weight_rms(i) for i in range(len(context.names)) if len(context.shapes[i]) == 1]
    return median(biases) if biases else 0.0
