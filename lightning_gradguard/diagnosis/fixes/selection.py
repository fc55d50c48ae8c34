"""What to do: the remedies that fit a case, best first, each with a line of code that does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause, Remedy
from lightning_gradguard.diagnosis.fixes import model, training
from lightning_gradguard.results import Fault

#: Remedies of the likeliest cause, of each other one, and in all: what one reads before trying the first.
_FIRST, _OTHERS, _ALL = 4, 2, 6


def find_remedies(case: DiagnosticContext, causes: Sequence[Cause]) -> tuple[Remedy, ...]:
    """Remedies for the causes of a case, without repetition.

    Args:
        case: What is known.
        causes: Most likely first.

    Returns:
        Best first, at most six. Where one change alone is not enough, the combination that is comes first.
    """
    chosen: dict[str, Remedy] = {}
    for rank, cause in enumerate(causes):
        offered = [r for r in _BY_CAUSE[cause](case) if r != training.CLIP or not case.clipper]
        for remedy in offered[: _OTHERS if rank else _FIRST]:
            chosen.setdefault(remedy.key, remedy)
    return tuple(chosen.values())[:_ALL]


def _unknown(case: DiagnosticContext) -> list[Remedy]:
    one = Remedy("See whether one batch can be learned at all", "trainer = Trainer(overfit_batches=1)")
    if case.decayed:
        return [training.lower_decay(case), one]
    return [training.ANOMALY, one] if case.fault == Fault.NONFINITE else [one]


_BY_CAUSE: dict[Cause, Callable[[DiagnosticContext], list[Remedy]]] = {
    Cause.SATURATING_ACTIVATION: model.saturating_activation,
    Cause.BAD_INITIALIZATION: model.bad_initialization,
    Cause.TOO_DEEP: model.too_deep,
    Cause.RECURRENCE: model.recurrence,
    Cause.DEAD_ACTIVATION: model.dead_activation,
    Cause.DETACHED_GRAPH: model.detached_graph,
    Cause.UNNORMALIZED_INPUT: model.unnormalized_input,
    Cause.TARGET_SCALE: training.target_scale,
    Cause.LEARNING_RATE_TOO_HIGH: training.lower_learning_rate,
    Cause.LEARNING_RATE_TOO_LOW: training.learning_rate_too_low,
    Cause.OPTIMIZER_EPSILON: training.optimizer_epsilon,
    Cause.MOMENTUM: training.momentum,
    Cause.BAD_DATA: training.bad_data,
    Cause.LOSS_FUNCTION: training.loss_function,
    Cause.LOW_PRECISION: training.low_precision,
    Cause.OUTLIER_BATCH: training.outlier_batch,
    Cause.UNKNOWN: _unknown,
}
