"""Contents of the page about a run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_gradguard.diagnosis.wording import MISTAKE, quote
from lightning_gradguard.html_report import figures
from lightning_gradguard.html_report.event_reader import Run, Track
from lightning_gradguard.loggers.findings import SPANS, FoundRecord
from lightning_gradguard.loggers.overview import SKIPPED
from lightning_gradguard.loggers.status import EVENTS, Course, LoggedFinding, Status
from lightning_gradguard.loggers.tags import NOTES
from lightning_gradguard.loggers.verdict import MARKS, UNJUDGED, Verdict, verdict_of
from lightning_gradguard.results import ClipSpan, Fault
from lightning_gradguard.stats.parameters import optimizer_title

#: Largest number of findings in the full list and of diagnoses, the newest of each, and of the training's own losses.
LISTED, DIAGNOSES, LOSSES = 200, 5, 3

#: Ratio of the largest to the smallest loss from which on its logarithm is shown.
WIDE = 300.0

#: Charts: name of the scalar to its title and the limits of its healthy range, in `loggers.tags.NOTES`.
CHARTS = {
    "total_norm_log10": ("Gradient norm, log10", ()),
    "depth_tilt_decades": ("Depth tilt, decades", (-1.8, 3.0)),
    "update_ratio_log10": ("Update ratio, log10", (-6.0, -1.0)),
    "worst_layer_rms_log10": ("Farthest layer, log10 RMS", ()),
    "clip_scale": ("Clip scale", ()),
    "clip_rate": ("Clip rate", ()),
    "threshold_log10": ("Clip threshold, log10", ()),
}

_PRECEDENCE = {fault.value: fault.precedence for fault in Fault}


@dataclass(frozen=True)
class Record:
    """Counts of steps; None if not known.

    Attributes:
        last: The last step that was recorded.
        clipped: Steps clipped.
        skipped: Steps not taken.
        nonfinite: Steps whose gradients were not finite.
        strongest: Smallest clip scale among the logged steps that were taken, and its step.
    """

    last: int
    clipped: int | None
    skipped: int | None
    nonfinite: int | None
    strongest: tuple[float, int] | None


@dataclass(frozen=True)
class Group:
    """All findings of one fault.

    Attributes:
        fault: Name of the fault.
        worst: The first of the most severe findings.
        first: Step of the first.
        last: Step of the last.
        count: How many.
    """

    fault: str
    worst: LoggedFinding
    first: int
    last: int
    count: int

    @property
    def title(self) -> str:
        """The fault in words."""
        return "not finite" if self.fault == Fault.NONFINITE.value else self.fault.replace("_", " ")


@dataclass(frozen=True)
class Sheet:
    """Contents for one optimizer of one run.

    Attributes:
        title: Name of the run, and of the optimizer if there are several.
        verdict: The verdict.
        left_out: Layers without a row in the heat map.
        record: Clipped and skipped steps.
        groups: Findings by fault, the most severe first.
        findings: The newest findings, newest first.
        diagnoses: In Markdown, newest first.
        spans: From when to when a fault had gradients clipped, the newest 20, oldest first.
        exponents: What narrow number formats would lose at the newest step, in Markdown; empty if not logged.
        notices: What the reader has to know about the files.
        figures: Data of the figures.
    """

    title: str
    verdict: Verdict
    left_out: int
    record: Record
    groups: list[Group]
    findings: list[LoggedFinding]
    diagnoses: list[str]
    spans: list[ClipSpan] = field(default_factory=list)
    exponents: str = ""
    notices: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        """The mark of the verdict's level."""
        return MARKS[self.verdict.level]

    @property
    def is_judged(self) -> bool:
        """True if a `GradGuard` judged the run."""
        return self.verdict.level != "unjudged"


def sheets_of(run: Run) -> list[Sheet]:
    """Return a sheet for each optimizer."""
    return [_sheet(run, group, track) for group, track in run.tracks.items()]


def charts_of(sheets: Sequence[Sheet]) -> list[dict[str, Any]]:
    """Return title, note and limits of each chart.

    They are the charts that some sheet has a curve for, the losses first. A loss that spans many decades (factors of
    ten) is shown as its logarithm, since one peak would hide the rest.
    """
    names = dict.fromkeys(name for sheet in sheets for name in sheet.figures["curves"])
    losses = []
    for name in [name for name in names if name not in CHARTS]:
        curves = [sheet.figures["curves"][name] for sheet in sheets if name in sheet.figures["curves"]]
        known = [x for curve in curves for x in curve["values"] if x is not None]
        is_wide = bool(known) and min(known) > 0 and max(known) > WIDE * min(known)
        for curve in curves if is_wide else ():
            curve["values"] = [None if x is None else round(math.log10(x), 4) for x in curve["values"]]
        losses.append(
            {"name": name, "title": f"{name}, log10" if is_wide else name, "note": "", "limits": []}
        )
    own = [
        {"name": name, "title": title, "note": NOTES[name], "limits": list(limits)}
        for name, (title, limits) in CHARTS.items()
        if name in names
    ]
    return losses + own


def merge_found(records: Iterable[FoundRecord]) -> tuple[list[LoggedFinding], list[str]]:
    """Join what was found at each step.

    A resumed run repeats what its checkpoint holds.

    Args:
        records: Oldest first.

    Returns:
        Each finding once, oldest first, and each diagnosis once, newest first.
    """
    findings: dict[str, LoggedFinding] = {}
    diagnoses: dict[str, None] = {}
    for record in records:
        # By text, since NaN is not equal to itself.
        for finding in record.findings:
            findings.setdefault(repr(finding), finding)
        diagnoses |= dict.fromkeys(record.diagnoses)
    return sorted(findings.values(), key=lambda finding: finding.step), list(reversed(diagnoses))


def merge_spans(records: Iterable[FoundRecord]) -> list[ClipSpan]:
    """Join the spans of clipping that were logged at each step.

    Of a span that was logged several times the newest record counts, which may know its end.

    Args:
        records: Oldest first.
    """
    spans = {span.first: span for record in records for span in record.spans}
    return [spans[first] for first in sorted(spans)]


def by_fault(findings: Sequence[LoggedFinding]) -> list[Group]:
    """Group findings by fault, most severe and earliest first."""
    groups: list[Group] = []
    of_fault: dict[str, list[LoggedFinding]] = defaultdict(list)
    for finding in findings:
        of_fault[finding.fault].append(finding)
    for fault, own in of_fault.items():
        worst = max(own, key=lambda finding: (finding.severity, -finding.step))
        # A finding that became critical has the step of its warning.
        times = len({finding.step for finding in own})
        groups.append(Group(fault, worst, own[0].step, own[-1].step, times))
    last = len(_PRECEDENCE)
    return sorted(groups, key=lambda g: (-g.worst.severity, g.first, _PRECEDENCE.get(g.fault, last)))


def _sheet(run: Run, name: str, track: Track) -> Sheet:
    title = (
        run.name
        if len(run.tracks) == 1
        else f"{run.name}, {optimizer_title(name.partition('_')[2] or 0, track.layers)}"
    )
    findings, diagnoses = merge_found(track.found.values())
    groups, record = by_fault(findings), _record(track)
    mistaken = any(text.startswith(f"### {MISTAKE}") for text in diagnoses)
    status = _status(track, groups, record, int(name.partition("_")[2] or 0), mistaken)
    tensors, left_out = figures.histograms(track)
    losses = {tag: figures.curve(run.losses[tag]) for tag in sorted(run.losses)[:LOSSES]}
    known = {name: figures.curve(track.scalars[name]) for name in CHARTS if name in track.scalars}
    steps: dict[str, list[int]] = defaultdict(list)
    for finding in findings:
        steps[finding.fault].append(finding.step)
    marks = [
        {
            "title": group.title,
            "severity": group.worst.severity.name.lower(),
            "steps": figures.thin(steps[group.fault], figures.MARKS),
        }
        for group in groups
    ]
    return Sheet(
        title,
        verdict_of(status) if track.scalars else UNJUDGED,
        status.left_out,
        record,
        groups,
        findings[::-1][:LISTED],
        diagnoses[:DIAGNOSES],
        merge_spans(track.found.values())[-SPANS:],
        next(reversed(track.exponents.values()), ""),
        _notices(run, track, left_out),
        {
            "title": title,
            "judged": bool(track.scalars),
            "heat": figures.heat_map(track),
            "marks": marks,
            "curves": losses | known,
            "histograms": tensors,
        },
    )


def _status(track: Track, groups: Sequence[Group], record: Record, optimizer: int, mistaken: bool) -> Status:
    """Return the newest status, with what was logged since.

    Files of older versions have none; there it follows from findings and counts.
    """
    logged = next((found.status for found in reversed(track.found.values()) if found.status), None)
    counts = (record.nonfinite or 0, record.skipped or 0, record.clipped or 0)
    if logged is None:
        # The last record may stand one step behind what it shows.
        step, row = next(reversed(track.rows.items()), (-2, None))
        is_skipped = row is not None and step + 1 >= record.last and int(row[0]) == SKIPPED
        courses = tuple(
            Course(g.worst, g.first, g.count, lasts=True if is_skipped and g.fault in EVENTS[:1] else None)
            for g in groups
        )
        nonfinite, skipped, clipped = counts
        return Status(
            record.last, 0, nonfinite, skipped, clipped, 0, courses, (), mistaken, 0, optimizer, None, False
        )
    if logged.end is not None:
        return logged
    nonfinite, skipped, clipped = map(max, counts, (logged.nonfinite, logged.skipped, logged.clipped))
    steps = logged.steps + max(0, record.last - logged.step)
    return replace(
        logged,
        step=max(record.last, logged.step),
        steps=steps,
        nonfinite=nonfinite,
        skipped=skipped,
        clipped=clipped,
        mistaken=logged.mistaken or mistaken,
    )


def _record(track: Track) -> Record:
    curves: list[Mapping[int, Any]] = [track.rows, *track.scalars.values(), *track.histograms.values()]
    scales = {s: x for s, x in track.scalars.get("clip_scale", {}).items() if 0 < x < 1}
    strongest = min(scales, key=lambda step: scales[step], default=None)
    return Record(
        max((step for points in curves for step in points), default=0),
        _total(track, "clipped_total"),
        _total(track, "skipped_total"),
        _total(track, "nonfinite_total"),
        None if strongest is None else (scales[strongest], strongest),
    )


def _total(track: Track, name: str) -> int | None:
    totals = list(track.scalars.get(name, {}).values())
    return int(totals[-1]) if totals and math.isfinite(totals[-1]) else None


def _notices(run: Run, track: Track, left_out: int) -> list[str]:
    notices = []
    if run.damaged:
        files = ", ".join(map(quote, run.damaged))
        verb = "ends" if len(run.damaged) == 1 else "end"
        notices.append(
            f"{files} {verb} in the middle of a record: the run was killed or is still writing. "
            "Everything before that is shown."
        )
    for name, reason in run.unopened.items():
        notices.append(f"{quote(name)} cannot be read: {reason}.")
    for name, count in run.undecoded.items():
        records, hold = ("record is", "it holds") if count == 1 else ("records are", "they hold")
        notices.append(f"{count} {records} left out of {quote(name)}: what {hold} is no event.")
    if run.unreadable:
        tags = ", ".join(quote(tag) for tag in sorted(run.unreadable)[:3])
        more = f" and {len(run.unreadable) - 3} more tags" if len(run.unreadable) > 3 else ""
        count = sum(run.unreadable.values())
        notices.append(
            f"{count} record{' is' if count == 1 else 's are'} left out, under {tags}{more}: "
            f"{'it is' if count == 1 else 'they are'} not in the form that this package writes."
        )
    if run.files > 1:
        notices.append(
            f"Joined from {run.files} event files. Where a resumed run repeated steps, the later ones are shown."
        )
    if track.values:
        notices.append(
            "Histograms of values are shown in TensorBoard only. This page shows those of log10 magnitudes."
        )
    if not track.rows and track.histograms:
        notices.append("The heat map is built from histograms, so it shows only their tensors and steps.")
    if left_out:
        notices.append(f"{left_out} more tensors have histograms that are not shown.")
    return notices
