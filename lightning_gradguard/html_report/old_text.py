"""Findings from event files that have them only as text, as older versions wrote them."""

from __future__ import annotations

import re

from lightning_gradguard.loggers.findings import FoundRecord, LoggedFinding
from lightning_gradguard.results import Severity

_SEPARATOR, _HEADING = "\n\n---\n\n", "### Found, newest first"
_LINE = re.compile(
    r"\* step (?P<step>[\d,]+): \*\*(?P<fault>\w+)\*\* \((?P<severity>info|warning|critical)\), "
    r"(?P<measure>.*) (?P<value>\S+), limit (?P<limit>\S+?)(?:, in (?P<names>`.*`)(?: and (?P<more>\d+) more)?)?"
)


def parse_old_text(text: str) -> FoundRecord:
    """Return the findings and diagnoses of a text that an older version wrote.

    Args:
        text: Markdown: diagnoses, then one line for each finding, newest first in both.

    Returns:
        What the text holds, oldest first. A tensor that the text only counts has an empty name.
    """
    *diagnoses, found = text.split(_SEPARATOR)
    matches = [match for match in map(_LINE.fullmatch, reversed(found.splitlines())) if match is not None]
    findings = [
        LoggedFinding(
            step=int(match["step"].replace(",", "")),
            fault=match["fault"],
            severity=Severity[match["severity"].upper()],
            parameters=_parameters(match),
            value=float(match["value"]),
            limit=float(match["limit"]),
            measure=match["measure"],
        )
        for match in matches
    ]
    return FoundRecord(tuple(findings), tuple(d for d in reversed(diagnoses) if not d.startswith(_HEADING)))


def _parameters(match: re.Match[str]) -> tuple[str, ...]:
    if match["names"] is None:
        return ()
    return (*match["names"][1:-1].split("`, `"), *[""] * int(match["more"] or 0))
