"""Put a diagnosis together: symptoms, causes with their evidence, and fixes."""

from __future__ import annotations

from lightning_gradguard.diagnosis.causes import find_causes
from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Diagnosis
from lightning_gradguard.diagnosis.fixes import find_fixes
from lightning_gradguard.diagnosis.symptoms import find_symptoms


def diagnose(context: DiagnosticContext) -> Diagnosis:
    """Return the diagnosis of a critical finding.

    Args:
        context: The facts at the step of the finding.
    """
    causes = find_causes(context)
    return Diagnosis(
        fault=context.finding.fault,
        step=context.finding.step,
        parameters=context.finding.parameters,
        signs=find_symptoms(context),
        causes=tuple(cause for cause, _ in causes),
        evidence=dict(causes),
        remedies=find_fixes(context, [cause for cause, _ in causes]),
    )
