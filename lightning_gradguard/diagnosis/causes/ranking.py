"""Why: from the facts of a case to its causes, most likely first, and to the whole diagnosis."""

from __future__ import annotations

from lightning_gradguard.diagnosis.causes.evidence import Evidence
from lightning_gradguard.diagnosis.causes.loss import LOSS_RULES
from lightning_gradguard.diagnosis.causes.model import MODEL_RULES
from lightning_gradguard.diagnosis.causes.scale import SCALE_RULES
from lightning_gradguard.diagnosis.causes.training import TRAINING_RULES
from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause, Diagnosis
from lightning_gradguard.diagnosis.fixes.selection import find_remedies
from lightning_gradguard.diagnosis.symptoms import find_signs
from lightning_gradguard.diagnosis.wording import number

#: Decades that a cause must account for to be named, and at least this part of the likeliest's.
_LEAST_WEIGHT, _LEAST_PART = 0.5, 0.2
#: Causes that are named at most.
_MOST_CAUSES = 4
#: All rules.
RULES = (*MODEL_RULES, *SCALE_RULES, *TRAINING_RULES, *LOSS_RULES)


def find_causes(case: DiagnosticContext) -> list[tuple[Cause, str]]:
    """Weighs all clues; each cause counts with its strongest.

    Args:
        case: What is known.

    Returns:
        Causes with the numbers that speak for them, most likely first; never empty, at most four. Their
        rank is by weight, which `clues.Evidence` explains.
    """
    clues = [clue for rule in RULES for clue in rule(case)]
    least = max(_LEAST_WEIGHT, _LEAST_PART * max((clue.weight for clue in clues), default=0.0))
    best: dict[Cause, Evidence] = {}
    for clue in sorted(clues, key=lambda clue: -clue.weight):
        if clue.weight >= least:
            best.setdefault(clue.cause, clue)
    named = [(clue.cause, clue.evidence) for clue in list(best.values())[:_MOST_CAUSES]]
    return named or [(Cause.UNKNOWN, _unknown(case))]


def _unknown(case: DiagnosticContext) -> str:
    """What there is to say without a cause that has a name."""
    if case.decayed:
        decay = number(case.setting("weight_decay"))
        return (
            f"The weights have shrunk to {number(100 * case.shrunk)} % of their size at the start: the weight decay of "
            f"{decay} takes more from them than gradients add."
        )
    return "None of the causes that are known here shows in what was measured."


def diagnose(case: DiagnosticContext) -> Diagnosis:
    """The whole answer to a critical finding: signs, causes with their evidence, remedies.

    Args:
        case: What is known.
    """
    causes = find_causes(case)
    return Diagnosis(
        fault=case.finding.fault,
        step=case.finding.step,
        parameters=case.finding.parameters,
        signs=find_signs(case),
        causes=tuple(cause for cause, _ in causes),
        evidence=dict(causes),
        remedies=find_remedies(case, [cause for cause, _ in causes]),
    )
