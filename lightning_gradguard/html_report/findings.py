"""What the text of a run says: its findings as data again, and its diagnoses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_gradguard.results import Fault, Severity

# Those of `lightning_gradguard.loggers.overview`, which writes the text.
_BETWEEN, _FOUND = "\n\n---\n\n", "### Found, newest first"
_LINE = re.compile(
    r"\* step (?P<step>[\d,]+): \*\*(?P<fault>\w+)\*\* \((?P<severity>\w+)\), "
    r"(?P<measure>.*) (?P<value>\S+), limit (?P<limit>\S+?)(?:, in (?P<where>.*))?"
)


@dataclass(frozen=True)
class Line:
    """One finding, as the text has it.

    Attributes:
        step: Where the condition began.
        fault: What it is.
        severity: How much it matters.
        measure: What was measured.
        value: The number it rests on.
        limit: Where the verdict begins.
        where: Names in backticks, worst first; may be empty.
    """

    step: int
    fault: Fault
    severity: Severity
    measure: str
    value: str
    limit: str
    where: str


@dataclass(frozen=True)
class Group:
    """All findings of one fault.

    Attributes:
        fault: What it is.
        worst: The first of the most severe ones.
        first: Step of the first.
        last: Step of the last.
        count: How many.
    """

    fault: Fault
    worst: Line
    first: int
    last: int
    count: int

    @property
    def title(self) -> str:
        """The fault in words."""
        return words(self.fault)


def words(fault: Fault) -> str:
    """A fault as it is written in a sentence."""
    return "not finite" if fault is Fault.NONFINITE else fault.value.replace("_", " ")


def findings_of(texts: Iterable[str]) -> list[Line]:
    """All findings, oldest first. A text repeats the 50 newest, so that all texts together have nearly all."""
    lines: dict[str, Line] = {}
    for text in texts:
        found = text.split(_BETWEEN)[-1]
        for line in reversed(found.splitlines()):
            match = _LINE.fullmatch(line)
            if match is not None:
                lines.setdefault(line, _parse(match))
    return sorted(lines.values(), key=lambda line: line.step)


def diagnoses_of(texts: Iterable[str]) -> list[str]:
    """All diagnoses in Markdown, newest first."""
    seen: dict[str, None] = {}
    for text in texts:
        # The newest stands first.
        for diagnosis in reversed([part for part in text.split(_BETWEEN) if not part.startswith(_FOUND)]):
            seen.setdefault(diagnosis)
    return list(reversed(seen))


def by_fault(lines: Sequence[Line]) -> list[Group]:
    """Findings by fault, the most severe first, and of equal ones the earliest."""
    faults = dict.fromkeys(line.fault for line in lines)
    groups = []
    for fault in faults:
        own = [line for line in lines if line.fault is fault]
        worst = max(own, key=lambda line: (line.severity, -line.step))
        groups.append(Group(fault, worst, own[0].step, own[-1].step, len(own)))
    return sorted(groups, key=lambda group: (-group.worst.severity, group.first, group.fault.precedence))


def _parse(match: re.Match[str]) -> Line:
    return Line(
        step=int(match["step"].replace(",", "")),
        fault=Fault(match["fault"]),
        severity=Severity[match["severity"].upper()],
        measure=match["measure"],
        value=match["value"],
        limit=match["limit"],
        where=match["where"] or "",
    )
