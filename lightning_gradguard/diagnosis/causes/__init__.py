"""Causes of a fault: one function for each.

To add a cause: write the function in one of the files here, add it to `RULES`, add a member to `Cause`, and its fixes
to `lightning_gradguard.diagnosis.fixes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lightning_gradguard.diagnosis.causes import data, model, numerics, optimizer
from lightning_gradguard.diagnosis.context import CERTAIN, DiagnosticContext, Evidence
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.fixes import PROBLEMS
from lightning_gradguard.diagnosis.nan_origin import Place
from lightning_gradguard.introspection.graph_problems import UNBOUNDED, Problem
from lightning_gradguard.results import Fault

#: When each cause is named: its function yields the evidence for it. Ties go to the earlier one.
RULES: dict[Cause, Callable[[DiagnosticContext], Iterator[Evidence]]] = {
    Cause.SATURATING_ACTIVATION: model.saturating_activation,
    Cause.BAD_INITIALIZATION: model.bad_initialization,
    Cause.TOO_DEEP: model.too_deep,
    Cause.NORMALIZATION: model.normalization,
    Cause.RECURRENCE: model.recurrence,
    Cause.DEAD_ACTIVATION: model.dead_activation,
    Cause.DETACHED_GRAPH: model.detached_graph,
    Cause.UNNORMALIZED_INPUT: data.unnormalized_input,
    Cause.TARGET_SCALE: data.target_scale,
    Cause.LEARNING_RATE_TOO_HIGH: optimizer.learning_rate_too_high,
    Cause.LEARNING_RATE_TOO_LOW: optimizer.learning_rate_too_low,
    Cause.OPTIMIZER_EPSILON: optimizer.optimizer_epsilon,
    Cause.GRADIENT_SCALING: optimizer.gradient_scaling,
    Cause.MOMENTUM: optimizer.momentum,
    Cause.WEIGHT_DECAY: optimizer.weight_decay,
    Cause.BAD_DATA: data.bad_data,
    Cause.LOW_PRECISION: numerics.low_precision,
    Cause.OUTLIER_BATCH: data.outlier_batch,
    Cause.LOSS_FUNCTION: numerics.loss_function,
}

#: A named cause accounts for at least so many decades, and for at least this fraction of the most likely one's.
_LEAST_WEIGHT, _LEAST_FRACTION = 0.5, 0.2
_MOST_CAUSES = 4
#: Weight of a mistake that the graph shows and that may be meant: more than a symptom, less than proof.
_DOUBTFUL = 3.0
#: Faults that a mistake shown by the graph does not explain, unless it leaves the loss without a bound.
_OTHER_FAULTS = frozenset({Fault.NONFINITE, Fault.UNDERFLOW, Fault.SPIKE})


def find_causes(context: DiagnosticContext) -> list[tuple[Cause, str]]:
    """Rank the causes by their strongest evidence.

    Args:
        context: The facts at the step of the finding.

    Returns:
        Causes with a sentence of evidence, most likely first: at least one, at most four. `Cause.UNKNOWN` if no other
        fits, and for a custom fault.
    """
    strongest: dict[Cause, Evidence] = {}
    for cause, rule in RULES.items() if not context.fault.is_custom else ():
        evidence = max(rule(context), key=lambda evidence: evidence.weight, default=None)
        if evidence is not None:
            strongest[cause] = evidence
    for problem in context.problems:
        if problem.kind == Problem.LARGE_START:
            continue  # a symptom; see data.outputs_too_large
        explains = problem.kind == Problem.STALE_GRADIENTS or (
            context.too_large and problem.kind in UNBOUNDED
        )
        if context.fault in _OTHER_FAULTS and not explains:
            continue
        cause, weight = PROBLEMS[problem.kind][0], CERTAIN if problem.certain else _DOUBTFUL
        if cause not in strongest or strongest[cause].weight <= weight:
            strongest[cause] = Evidence(weight, problem.text)
    least = max(_LEAST_WEIGHT, _LEAST_FRACTION * max((e.weight for e in strongest.values()), default=0.0))
    ranked = sorted(strongest.items(), key=lambda item: -item[1].weight)
    named = [(cause, evidence.text) for cause, evidence in ranked if evidence.weight >= least]
    return named[:_MOST_CAUSES] or [(Cause.UNKNOWN, _unknown(context))]


def _unknown(context: DiagnosticContext) -> str:
    if context.fault.is_custom:
        return "The rules for causes know the built-in faults only; this one comes from a custom detector."
    if context.origin is not None and context.origin.place == Place.NOWHERE:
        return f"{context.origin} In `gradguard replay` this is called TRANSIENT."
    return "No cause that is known here fits what was measured."
