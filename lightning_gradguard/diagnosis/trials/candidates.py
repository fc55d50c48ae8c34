"""Choose the fixes to try."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from lightning_gradguard.diagnosis import fixes
from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause, Remedy
from lightning_gradguard.diagnosis.trials.weights import has_gates, has_plain_recurrence, has_recurrence
from lightning_gradguard.introspection.batch import inputs_and_targets
from lightning_gradguard.introspection.layer_calls import LayerStructure
from lightning_gradguard.introspection.operations import kind_of, operation_of
from lightning_gradguard.results import Fault

#: Fewest layers of equal width of which half can be left out.
_MIN_SHORTENED = 4
#: Largest update ratio of a plain step from the weights at the start, with a lowered learning rate.
_START_RATIO = 0.02


def find_candidates(
    context: DiagnosticContext,
    causes: Sequence[Cause],
    module: nn.Module,
    batch: object,
    structure: LayerStructure,
    profile: Sequence[float] = (),
) -> list[Remedy]:
    """Return the fixes to try, most promising first.

    Those of data and learning rate are tried where a cause asks for them. The order matters where more fixes are
    healthy than there are passes for. It was chosen on the benchmark's cases; see ``benchmarks/diagnosis.md``.

    Args:
        context: The facts that the diagnosis rests on.
        causes: Causes, most likely first.
        module: The model.
        batch: The batch it was trained on.
        structure: Structure of its forward pass.
        profile: log10(‖g‖/‖w‖) of its layers without a fix, from weights of their size at the start.
    """
    if context.decayed:
        return [fix for fix in [fixes.lower_weight_decay(context)] if fix is not None]
    if is_bottomless(context, causes):
        return [fixes.SPECTRAL_NORMALIZATION]
    found: list[Remedy] = []
    if Cause.TARGET_SCALE in causes and inputs_and_targets(batch)[1] is not None:
        found.append(fixes.STANDARD_TARGET)
    data = [fixes.STANDARD_INPUT] if context.input_rms is not None else []
    if Cause.UNNORMALIZED_INPUT in causes:
        found += data
    if causes[0] == Cause.RECURRENCE and (has_recurrence(module) or structure.repeated):
        found += _recurrent_fixes(module)
        if has_recurrence(module):
            return found
    if Cause.MOMENTUM in causes:
        found.append(fixes.lower_momentum(context))
    if Cause.LEARNING_RATE_TOO_HIGH in causes:
        # Where the gradient is large for another reason, that is to be fixed, and the rate is not to follow it.
        found += _lower_rate(context, profile if causes[0] == Cause.LEARNING_RATE_TOO_HIGH else ())
    found += _layer_fixes(context, structure)
    others = [*data, *(_recurrent_fixes(module) if has_recurrence(module) else ())]
    others += _lower_rate(context, ()) if context.fault == Fault.EXPLODING else ()
    return [*found, *(fix for fix in others if fix not in found)]


def is_bottomless(context: DiagnosticContext, causes: Sequence[Cause]) -> bool:
    """Return True for a loss without lower bound."""
    return causes[0] == Cause.LOSS_FUNCTION and context.too_large and context.loss_now < 0


def combine(first: Remedy, second: Remedy) -> Remedy | None:
    """Return both as one fix; None on conflict."""
    if first.change is None or second.change is None or first.change.fields & second.change.fields:
        return None
    return Remedy(
        f"{first.name} + {second.name}",
        f"{first.how}\n{second.how}",
        change=first.change | second.change,
        key=f"{first.key} + {second.key}",
    )


def _layer_fixes(context: DiagnosticContext, structure: LayerStructure) -> Iterator[Remedy]:
    """Yield fixes of layers, activations, weights and depth."""
    inner = [i for i in structure.square if i < structure.last]
    bare = [i for i in range(structure.last) if i not in structure.normalised]
    kinds = {kind_of(operation_of(_node(name))) for name in structure.activations}
    rectifying = kinds <= {"relu", "soft relu"}
    blocks = [fix for fix in [fixes.residual_blocks(context)] if fix is not None and inner and kinds]
    norm = [fix for fix in [fixes.normalization(context)] if fix is not None and bare]
    relu_and_norm = [fixes.relu_and_normalization(context)] if bare and not rectifying else []
    he, xavier = fixes.HE, fixes.XAVIER
    yield from blocks
    yield from (both for fix in relu_and_norm or norm if (both := combine(fix, he if kinds else xavier)))
    yield he if kinds and rectifying else xavier
    yield from relu_and_norm
    yield from norm
    yield from (both for fix in blocks if (both := combine(fix, he)))
    if not rectifying:
        yield fixes.RELU_AND_HE
    if inner and context.graph_summary is not None and not context.graph_summary.skips:
        yield fixes.SKIP_CONNECTIONS
    if kinds:
        if set(structure.activations) != {"relu"}:
            yield fixes.RELU
        if rectifying:
            yield fixes.LEAKY_RELU
        if "gelu" not in structure.activations:
            yield fixes.GELU
    if len(inner) >= _MIN_SHORTENED:
        yield fixes.FEWER_LAYERS


def _recurrent_fixes(module: nn.Module) -> list[Remedy]:
    found = [fixes.REMEMBERING_GATES if has_gates(module) else fixes.ORTHOGONAL]
    if has_plain_recurrence(module):
        found += [fixes.REMEMBERING_LSTM, fixes.GRU, fixes.LSTM]
    return found


def _lower_rate(context: DiagnosticContext, profile: Sequence[float]) -> list[Remedy]:
    """Return the lower-rate fix, if one fits.

    Args:
        context: The facts that the diagnosis rests on.
        profile: log10(‖g‖/‖w‖) of the layers at the start; with it plain descent gets a rate that fits the start, too.
    """
    lower = fixes.lowered_rate(context)
    steep = max((decades for decades in profile if math.isfinite(decades)), default=-math.inf)
    if not context.normalizes_gradient and steep > -math.inf:
        # An applied ratio is at most 2, whatever the step; that of a plain step from the weights at the start is not.
        momentum = context.setting("momentum")
        steady = 1 / max(1 - momentum, 1e-3) if momentum == momentum else 1.0
        lower = min(lower, fixes.round_down(_START_RATIO / (10.0**steep * steady)))
    fix = fixes.lower_learning_rate(context, lower) if 0 < lower < context.learning_rate else None
    return [] if fix is None else [fix]


def _node(function: str) -> str:
    """Return an activation's autograd node name."""
    special = {
        "logsigmoid": "LogSigmoid",
        "expit": "Sigmoid",
        "prelu": "PreluKernel",
        "rrelu": "RreluWithNoise",
    }
    plain = function.removeprefix("special_").removeprefix("arc" if function == "arctan" else "")
    plain = {"tan": "atan", "relu6": "hardtanh"}.get(plain, plain)
    return special.get(plain, "".join(part.capitalize() for part in plain.split("_")))
