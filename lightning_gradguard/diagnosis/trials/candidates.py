"""Which remedies are tried on a case, each with the change that stands for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from lightning_gradguard.diagnosis.context import TYPICAL_MOMENTUM, DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause, Remedy
from lightning_gradguard.diagnosis.fixes import model, training
from lightning_gradguard.diagnosis.trials.batches import has_targets
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.diagnosis.trials.weights import has_gates, has_plain_recurrence, has_recurrence
from lightning_gradguard.introspection.layer_calls import Plan
from lightning_gradguard.introspection.operations import kind_of, operation_of
from lightning_gradguard.results import Fault

#: Layers of equal width of which half can be left out.
_LONG = 4


class Candidate(NamedTuple):
    """A remedy and what it changes."""

    remedy: Remedy
    change: Change


def find_candidates(
    case: DiagnosticContext,
    causes: Sequence[Cause],
    module: nn.Module,
    batch: object,
    plan: Plan,
    profile: Sequence[float] = (),
) -> list[Candidate]:
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
        lower = training.lowered_decay(case) / case.setting("weight_decay")
        return [Candidate(training.lower_decay(case), Change(decay=lower))]
    if is_bottomless(case, causes):
        return [Candidate(training.bounded_slopes(), Change(lipschitz=True))]
    found = []
    if Cause.TARGET_SCALE in causes and has_targets(batch):
        found.append(Candidate(training.standard_target(), Change(target=True)))
    data = [Candidate(model.standard_input(), Change(input=True))] if case.input_rms is not None else []
    if Cause.UNNORMALIZED_INPUT in causes:
        found += data
    if causes[0] == Cause.RECURRENCE and (has_recurrence(module) or plan.repeated):
        found += _recurrent(module)
        if has_recurrence(module):
            return found
    if Cause.MOMENTUM in causes:
        found.append(Candidate(training.momentum(case)[0], Change(momentum=TYPICAL_MOMENTUM)))
    if Cause.LEARNING_RATE_TOO_HIGH in causes:
        # Where the gradient is large for another reason, that is to be mended, and the rate is not to follow it.
        found += _lower_rate(case, profile if causes[0] == Cause.LEARNING_RATE_TOO_HIGH else ())
    found += _layers(case, plan)
    others = [*data, *(_recurrent(module) if has_recurrence(module) else ())]
    others += _lower_rate(case, ()) if case.fault == Fault.EXPLODING else ()
    return [*found, *(candidate for candidate in others if candidate not in found)]


def is_bottomless(case: DiagnosticContext, causes: Sequence[Cause]) -> bool:
    """Whether the loss has no lower bound, so that a lower one is not a better one."""
    return causes[0] == Cause.LOSS_FUNCTION and case.too_large and case.loss_now < 0


def pair(first: Candidate, second: Candidate) -> Candidate | None:
    """Both at once; None if they change the same."""
    if first.change.fields & second.change.fields:
        return None
    return Candidate(_both(first.remedy, second.remedy), first.change | second.change)


def _layers(case: DiagnosticContext, plan: Plan) -> Iterator[Candidate]:
    """Activations, normalisation, skips, weights, depth."""
    inner = [i for i in plan.square if i < plan.last]
    kinds = {kind_of(operation_of(_node(name))) for name in plan.activations}
    rectifying = kinds <= {"relu", "soft relu"}
    relu = Candidate(Remedy("ReLU", "activation = nn.ReLU()"), Change(activation="relu"))
    blocks = [
        Candidate(remedy, Change(activation="relu" if kinds else None, normalise=True, skip=True))
        for remedy in (model.residual_blocks(case) if inner and kinds else ())
    ]
    bare = [i for i in range(plan.last) if i not in plan.normalised]
    norm = [Candidate(r, Change(normalise=True)) for r in model.normalisation(case)] if bare else []
    he = Candidate(model.he(), Change(initialise="he"))
    xavier = Candidate(model.xavier(), Change(initialise="xavier"))
    own = he if kinds and rectifying else xavier
    swapped = (
        []
        if rectifying
        else [Candidate(model.relu_and_norm(case), Change(activation="relu", normalise=True))]
    )
    yield from blocks
    yield from (made for c in (swapped if bare else []) or norm if (made := pair(c, he if kinds else xavier)))
    yield own
    yield from swapped if bare else ()
    yield from norm
    yield from (made for c in blocks if (made := pair(c, he)))
    if not rectifying:
        yield Candidate(model.relu_and_he(), Change(activation="relu", initialise="he"))
    if inner and case.graph_summary is not None and not case.graph_summary.skips:
        yield Candidate(Remedy("Skip connections", "h = h + activation(layer(h))"), Change(skip=True))
    if kinds:
        if set(plan.activations) != {"relu"}:
            yield relu
        if rectifying:
            yield Candidate(model.leaky_relu(), Change(activation="leaky_relu"))
        if "gelu" not in plan.activations:
            yield Candidate(Remedy("GELU", "activation = nn.GELU()"), Change(activation="gelu"))
    if len(inner) >= _LONG:
        yield Candidate(model.fewer_layers(), Change(shorten=True))


def _recurrent(module: nn.Module) -> Iterator[Candidate]:
    orthogonal = Change(initialise="orthogonal")
    yield Candidate(model.remembering() if has_gates(module) else model.orthogonal(), orthogonal)
    if has_plain_recurrence(module):
        how = (
            "rnn = nn.LSTM(inputs, width); rnn.bias_ih_l0.data[width : 2 * width] = 3.0  # in place of nn.RNN"
        )
        yield Candidate(
            Remedy("LSTM that begins by remembering", how), Change(gates="LSTM", initialise="orthogonal")
        )
        yield Candidate(
            Remedy("GRU", "rnn = nn.GRU(inputs, width)  # in place of nn.RNN"), Change(gates="GRU")
        )
        yield Candidate(model.gates(), Change(gates="LSTM"))


def _lower_rate(case: DiagnosticContext, profile: Sequence[float]) -> Iterator[Candidate]:
    lower = training.lowered_rate(case)
    steep = max((decades for decades in profile if math.isfinite(decades)), default=-math.inf)
    if not case.normalises and steep > -math.inf:
        # An applied ratio is at most 2, whatever the step; that of a plain step from the weights at the start is not.
        momentum = case.setting("momentum")
        steady = 1 / max(1 - momentum, 1e-3) if momentum == momentum else 1.0
        lower = min(lower, training.round_down(0.02 / (10.0**steep * steady)))
    if 0 < lower < case.learning_rate:
        yield Candidate(training.lower_learning_rate(case, lower)[0], Change(rate=lower / case.learning_rate))


def _both(first: Remedy, second: Remedy) -> Remedy:
    return Remedy(f"{first.name} + {second.name}", f"{first.how}\n{second.how}")


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
