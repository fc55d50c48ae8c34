"""Which remedies are tried on a case: all carry the change that stands for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from lightning_gradguard.diagnosis.causes.evidence import GROWING
from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause, Remedy
from lightning_gradguard.diagnosis.fixes import model, training
from lightning_gradguard.diagnosis.trials.batches import has_targets
from lightning_gradguard.diagnosis.trials.weights import has_gates, has_plain_recurrence, has_recurrence
from lightning_gradguard.introspection.layer_calls import Plan
from lightning_gradguard.introspection.operations import kind_of, operation_of
from lightning_gradguard.results import Fault

#: Layers of equal width of which half can be left out.
_LONG = 4


def find_candidates(
    case: DiagnosticContext,
    causes: Sequence[Cause],
    module: nn.Module,
    batch: object,
    plan: Plan,
    profile: Sequence[float] = (),
) -> list[Remedy]:
    """Remedies that fit, the most promising first; those of the data and of the learning rate where a cause asks.

    The order is of use where more are healthy than there are passes for. It was found on the zoo; see
    ``benchmarks/diagnosis.md``.

    Args:
        case: What is known.
        causes: Most likely first.
        module: The model.
        batch: What it was trained on.
        plan: What its forward pass showed.
        profile: log10(‖g‖/‖w‖) of its layers without a remedy, weights brought back to their size at the start.
    """
    if case.decayed:
        return [training.lower_decay(case)]
    if is_bottomless(case, causes):
        return [training.bounded_slopes()]
    found: list[Remedy] = []
    if Cause.TARGET_SCALE in causes and has_targets(batch):
        found.append(training.standard_target())
    data = [model.standard_input()] if case.input_rms is not None else []
    if Cause.UNNORMALIZED_INPUT in causes:
        found += data
    if causes[0] == Cause.RECURRENCE and (has_recurrence(module) or plan.repeated):
        found += _recurrent(module)
        if has_recurrence(module):
            return found
    if Cause.MOMENTUM in causes:
        found.append(training.momentum(case)[0])
    if Cause.LEARNING_RATE_TOO_HIGH in causes:
        # Where the gradient is large for another reason, that is to be mended, and the rate is not to follow it.
        found += _lower_rate(case, profile if causes[0] == Cause.LEARNING_RATE_TOO_HIGH else ())
    found += _layers(case, plan)
    others = [*data, *(_recurrent(module) if has_recurrence(module) else ())]
    others += _lower_rate(case, ()) if case.fault == Fault.EXPLODING else ()
    return [*found, *(remedy for remedy in others if remedy not in found)]


def is_bottomless(case: DiagnosticContext, causes: Sequence[Cause]) -> bool:
    """Whether the loss has no lower bound, so that a lower one is not a better one."""
    return causes[0] == Cause.LOSS_FUNCTION and case.fault in GROWING and case.loss_now < 0


def pair(first: Remedy, second: Remedy) -> Remedy | None:
    """Both at once; None if they change the same."""
    if first.change is None or second.change is None or first.change.fields & second.change.fields:
        return None
    return Remedy(
        f"{first.name} + {second.name}",
        f"{first.how}\n{second.how}",
        change=first.change | second.change,
        key=f"{first.key} + {second.key}",
    )


def _layers(case: DiagnosticContext, plan: Plan) -> Iterator[Remedy]:
    """Activations, normalisation, skips, weights, depth."""
    inner = [i for i in plan.square if i < plan.last]
    kinds = {kind_of(operation_of(_node(name))) for name in plan.activations}
    rectifying = kinds <= {"relu", "soft relu"}
    blocks = model.residual_blocks(case) if inner and kinds else []
    bare = [i for i in range(plan.last) if i not in plan.normalised]
    norm = model.normalisation(case) if bare else []
    he, xavier = model.he(), model.xavier()
    swapped = [model.relu_and_norm(case)] if bare and not rectifying else []
    yield from blocks
    yield from (both for r in swapped or norm if (both := pair(r, he if kinds else xavier)))
    yield he if kinds and rectifying else xavier
    yield from swapped
    yield from norm
    yield from (both for r in blocks if (both := pair(r, he)))
    if not rectifying:
        yield model.relu_and_he()
    if inner and case.graph_summary is not None and not case.graph_summary.skips:
        yield model.skip_connections()
    if kinds:
        if set(plan.activations) != {"relu"}:
            yield model.relu()
        if rectifying:
            yield model.leaky_relu()
        if "gelu" not in plan.activations:
            yield model.gelu()
    if len(inner) >= _LONG:
        yield model.fewer_layers()


def _recurrent(module: nn.Module) -> list[Remedy]:
    found = [model.remembering() if has_gates(module) else model.orthogonal()]
    if has_plain_recurrence(module):
        found += [model.remembering_lstm(), model.gru(), model.gates()]
    return found


def _lower_rate(case: DiagnosticContext, profile: Sequence[float]) -> list[Remedy]:
    lower = training.lowered_rate(case)
    steep = max((decades for decades in profile if math.isfinite(decades)), default=-math.inf)
    if not case.normalises and steep > -math.inf:
        # An applied ratio is at most 2, whatever the step; that of a plain step from the weights at the start is not.
        momentum = case.setting("momentum")
        steady = 1 / max(1 - momentum, 1e-3) if momentum == momentum else 1.0
        lower = min(lower, training.round_down(0.02 / (10.0**steep * steady)))
    return training.lower_learning_rate(case, lower)[:1] if 0 < lower < case.learning_rate else []


def _node(name: str) -> str:
    """Name of the graph's node for a function: the kinds of activations are known by it."""
    special = {
        "logsigmoid": "LogSigmoid",
        "expit": "Sigmoid",
        "prelu": "PreluKernel",
        "rrelu": "RreluWithNoise",
    }
    plain = name.removeprefix("special_").removeprefix("arc" if name == "arctan" else "")
    plain = {"tan": "atan", "relu6": "hardtanh"}.get(plain, plain)
    return special.get(plain, "".join(part.capitalize() for part in plain.split("_")))
