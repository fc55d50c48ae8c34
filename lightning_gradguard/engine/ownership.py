"""Findings on tensors that the optimizer does not train: in no optimizer, or idle in the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lightning_gradguard.engine.readback import NAMED
from lightning_gradguard.engine.step_record import DetectorResult, StepRecord
from lightning_gradguard.introspection.autograd_graph import GraphSummary
from lightning_gradguard.introspection.graph_problems import OWNERSHIP, GraphProblem
from lightning_gradguard.results import Fault, Report, Severity

_MEASURE = "tensors that get gradients and are in no optimizer"


def add_ownership(record: StepRecord, problems: Sequence[GraphProblem]) -> StepRecord:
    """Return a record in which these mistakes are disconnected tensors.

    They raise at once, under the first detector of that fault: the tensors concerned are not the optimizer's, so no
    detector sees them. Without such a detector the record stays as it is.

    Args:
        record: Numbers of the step.
        problems: Mistakes that the graph shows, of any kind.
    """
    found = sorted((p for p in problems if p.kind in OWNERSHIP), key=lambda p: not p.certain)
    place = disconnected_index(record.results)
    if not found or place is None:
        return record
    old, worst = record.results[place], found[0]
    if old.raised and old.ceiling > Severity.INFO and not worst.certain:
        return record
    result = old._replace(
        raised=True,
        cleared=False,
        ceiling=Severity.CRITICAL if worst.certain else Severity.INFO,
        value=float(len(worst.names)),
        limit=0.0,
        measure=_MEASURE,
        parameters=worst.names[:NAMED],
    )
    results = [*record.results[:place], result, *record.results[place + 1 :]]
    return dataclasses.replace(record, results=results)


def name_idle(report: Report, summary: GraphSummary | None, reached: frozenset[str] = frozenset()) -> Report:
    """Return a report with a finding for each kind of tensor that gets nothing and is no mistake.

    A detector names one kind at a time.

    Args:
        report: Report of the step.
        summary: Summary of the newest autograd graph, or None.
        reached: Names of tensors that have had a gradient, such as those of an expert that is used now and then.
    """
    found = next(
        (f for f in report.findings if f.fault == Fault.DISCONNECTED and f.severity == Severity.INFO), None
    )
    if found is None or summary is None or found.measure == _MEASURE:
        return report
    kinds = (
        (summary.unused, "trainable tensors that are not used"),
        (summary.idle, "tensors whose result the loss does not use, or takes as a target"),
        (summary.constant, "tensors behind a softmax over one element, which is constant"),
    )
    others = tuple(
        dataclasses.replace(
            found,
            parameters=tuple(n for n in summary.names if n in names)[-NAMED:],
            value=float(len(names)),
            measure=measure,
        )
        for every, measure in kinds
        if (names := every - reached) and measure != found.measure
    )
    return dataclasses.replace(report, findings=(*report.findings, *others))


def disconnected_index(results: Sequence[DetectorResult]) -> int | None:
    """Return the index of the first detector of disconnected tensors, or None."""
    return next((i for i, r in enumerate(results) if r.fault == Fault.DISCONNECTED), None)
