"""Findings and diagnoses as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_gradguard.loggers.status import TERMS, LoggedFinding, Status
from lightning_gradguard.results import ClipSpan, Finding

#: Newest findings, diagnoses and spans of clipping that are kept.
FINDINGS, DIAGNOSES, SPANS = 50, 3, 20


class FoundRecord(NamedTuple):
    """New findings and diagnoses of one step, and the run's status.

    Attributes:
        findings: Oldest first.
        diagnoses: Markdown, oldest first.
        spans: From when to when a fault had gradients clipped, oldest first. Unlike the others these are the newest
            that there are, since a span that has been logged may end later.
        status: What the verdict rests on, of the whole run so far; None in files of older versions.
    """

    findings: tuple[LoggedFinding, ...] = ()
    diagnoses: tuple[str, ...] = ()
    spans: tuple[ClipSpan, ...] = ()
    status: Status | None = None

    def joined(self, later: FoundRecord) -> FoundRecord:
        """Return this record and a later one of the same step as one."""
        return FoundRecord(
            self.findings + later.findings,
            self.diagnoses + later.diagnoses,
            later.spans or self.spans,
            later.status or self.status,
        )

    def to_json(self) -> str:
        """Return the record as JSON."""
        parts = {
            "findings": [f.to_dict() for f in self.findings],
            "diagnoses": list(self.diagnoses),
            "clip_spans": self.spans,
            **({} if self.status is None else {"status": self.status.to_dict()}),
        }
        return json.dumps(parts, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> FoundRecord:
        """Return the record that `to_json` gave.

        Raises:
            ValueError: If the text is not JSON.
            KeyError: If a part is missing.
        """
        parts = json.loads(text)
        # Older versions wrote neither spans nor status.
        spans = [
            ClipSpan(int(first), None if last is None else int(last), tuple(map(str, faults)))
            for first, last, faults in parts.get("clip_spans", ())
        ]
        return cls(
            tuple(map(LoggedFinding.from_dict, parts["findings"])),
            tuple(map(str, parts["diagnoses"])),
            tuple(spans),
            Status.from_dict(parts["status"]) if "status" in parts else None,
        )


class FindingLog:
    """Newest findings, diagnoses and spans of clipping, and which are not logged."""

    def __init__(self) -> None:
        self._findings: list[LoggedFinding] = []  # newest first, like the diagnoses
        self._diagnoses: list[str] = []
        self._new_findings = self._new_diagnoses = 0
        self._spans: tuple[ClipSpan, ...] = ()
        self._has_new_spans = False

    def add(self, finding: Finding) -> None:
        """Add a finding."""
        self._findings = [LoggedFinding.of(finding), *self._findings][:FINDINGS]
        self._new_findings += 1

    def add_diagnosis(self, markdown: str) -> None:
        """Add a diagnosis in Markdown."""
        self._diagnoses = [markdown, *self._diagnoses][:DIAGNOSES]
        self._new_diagnoses += 1

    def set_spans(self, spans: Sequence[ClipSpan]) -> None:
        """Set the spans so far, oldest first.

        They are not part of the state, since the guard keeps them.
        """
        newest = tuple(spans[-SPANS:])
        self._has_new_spans |= newest != self._spans
        self._spans = newest

    def flush(self, status: Status | None = None) -> tuple[str, FoundRecord] | None:
        """Return what is new, and count it as logged.

        Args:
            status: The run's status, for the record.

        Returns:
            Markdown of all that is kept, and a record of what is new since the last call; None if nothing is.
        """
        if not self._new_findings and not self._new_diagnoses and not self._has_new_spans:
            return None
        new = FoundRecord(
            tuple(reversed(self._findings[: self._new_findings])),
            tuple(reversed(self._diagnoses[: self._new_diagnoses])),
            self._spans,
            status,
        )
        self._new_findings = self._new_diagnoses = 0
        self._has_new_spans = False
        # A list, since TensorBoard breaks the words in a table beside long names.
        lines = [
            f"* **{f.fault}** ({f.severity.name.lower()}) since step {f.step:,}. {f.evidence}."
            for f in self._findings
        ]
        terms = dict.fromkeys(TERMS[f.fault] for f in self._findings if f.fault in TERMS)
        found = ["\n\n".join(["### Findings, newest first", "\n".join(lines), *terms])] if lines else []
        spans = "\n".join(f"* {span}" for span in reversed(self._spans))
        clipped = [f"### Clipped for a fault, newest first\n\n{spans}"] if spans else []
        return "\n\n---\n\n".join([*self._diagnoses, *clipped, *found]), new

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types."""
        return {"findings": [f.to_dict() for f in self._findings], "diagnoses": list(self._diagnoses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the log; all of it counts as new."""
        # Older checkpoints hold findings as lines of text. Those are left out: the older event file has them.
        self._findings = [LoggedFinding.from_dict(f) for f in state["findings"] if isinstance(f, dict)]
        self._diagnoses = list(state["diagnoses"])
        self._new_findings, self._new_diagnoses = len(self._findings), len(self._diagnoses)
