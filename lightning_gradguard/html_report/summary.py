"""What the page says of a run: verdict, record, findings, and the data of its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_gradguard.diagnosis.wording import headline
from lightning_gradguard.html_report import figures
from lightning_gradguard.html_report.event_reader import Run, Track
from lightning_gradguard.html_report.findings import Group, Line, by_fault, diagnoses_of, findings_of
from lightning_gradguard.loggers.overview import SKIPPED
from lightning_gradguard.loggers.tags import NOTES
from lightning_gradguard.results import Severity

#: Findings in the full list, and diagnoses, the newest of each; and the training's own losses.
LISTED, DIAGNOSES, LOSSES = 200, 5, 3

#: Ratio of the largest to the smallest loss from which on its logarithm is shown.
WIDE = 300.0

#: Charts: name of the scalar to title and to where a verdict begins, in `loggers.tags.NOTES`.
CHARTS = {
    "total_norm_log10": ("Gradient norm, log10", ()),
    "depth_tilt_decades": ("Depth tilt, decades", (-1.8, 3.0)),
    "update_ratio_log10": ("Update ratio, log10", (-6.0, -1.0)),
    "worst_layer_rms_log10": ("Farthest layer, log10 RMS", ()),
    "clip_scale": ("Clip scale", ()),
    "clip_rate": ("Clip rate", ()),
    "threshold_log10": ("Clip threshold, log10", ()),
}


@dataclass(frozen=True)
class Verdict:
    """The first thing that is read.

    Attributes:
        level: "critical", "warning", "healthy" or "unjudged".
        title: In a few words.
        detail: Markdown of one line.
    """

    level: str
    title: str
    detail: str


@dataclass(frozen=True)
class Record:
    """Counts of steps; None is not known.

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
class Sheet:
    """All that is shown of one optimizer of one run.

    Attributes:
        title: Name of the run, and of the optimizer where there are several.
        verdict: The verdict.
        record: Clipped and skipped steps.
        groups: Findings by fault, the most severe first.
        lines: The newest findings, newest first.
        diagnoses: In Markdown, newest first.
        exponents: What narrow number formats would lose at the newest step, in Markdown; empty if nobody asked.
        notices: What the reader has to know of the files.
        figures: Data of the figures.
    """

    title: str
    verdict: Verdict
    record: Record
    groups: list[Group]
    lines: list[Line]
    diagnoses: list[str]
    exponents: str = ""
    notices: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def is_judged(self) -> bool:
        """Whether a `GradGuard` watched."""
        return self.verdict.level != "unjudged"


def sheets_of(run: Run) -> list[Sheet]:
    """A sheet for each optimizer of a run."""
    return [_sheet(run, group, track) for group, track in run.tracks.items()]


def _sheet(run: Run, group: str, track: Track) -> Sheet:
    title = run.name if len(run.tracks) == 1 else f"{run.name}, optimizer {group.partition('_')[2] or 0}"
    lines = findings_of(track.texts.values())
    groups, record = by_fault(lines), _record(track)
    steps = [[line.step for line in lines if line.fault is group.fault] for group in groups]
    tensors, left_out = figures.histograms(track)
    losses = {tag: figures.curve(run.losses[tag]) for tag in sorted(run.losses)[:LOSSES]}
    known = {name: figures.curve(track.scalars[name]) for name in CHARTS if name in track.scalars}
    return Sheet(
        title,
        _verdict(track, groups, record),
        record,
        groups,
        lines[::-1][:LISTED],
        diagnoses_of(track.texts.values())[:DIAGNOSES],
        next(reversed(track.exponents.values()), ""),
        [*_notices(run, track), *([f"{left_out} more tensors have histograms."] if left_out else [])],
        {
            "title": title,
            "judged": bool(track.scalars),
            "heat": figures.heat_map(track),
            "marks": figures.marks(groups, steps),
            "curves": losses | known,
            "histograms": tensors,
        },
    )


def charts_of(sheets: Sequence[Sheet]) -> list[dict[str, Any]]:
    """Title, note and limits of each chart that some sheet has a curve for, the losses first."""
    names = dict.fromkeys(name for sheet in sheets for name in sheet.figures["curves"])
    losses = [{"name": n, "title": n, "note": "", "limits": []} for n in names if n not in CHARTS]
    for chart in losses:
        _spread(
            chart,
            [
                sheet.figures["curves"][chart["name"]]
                for sheet in sheets
                if chart["name"] in sheet.figures["curves"]
            ],
        )
    own = [
        {"name": name, "title": title, "note": NOTES[name], "limits": list(limits)}
        for name, (title, limits) in CHARTS.items()
        if name in names
    ]
    return losses + own


def _spread(chart: dict[str, Any], curves: Sequence[dict[str, Any]]) -> None:
    """Shows the logarithm of a loss that spans many decades, of which one peak would hide the rest."""
    known = [x for curve in curves for x in curve["values"] if x is not None]
    if known and min(known) > 0 and max(known) > WIDE * min(known):
        chart["title"] += ", log10"
        for curve in curves:
            curve["values"] = [None if x is None else round(math.log10(x), 4) for x in curve["values"]]


def _verdict(track: Track, groups: Sequence[Group], record: Record) -> Verdict:
    worst = groups[0] if groups else None
    if worst is not None and worst.worst.severity >= Severity.WARNING:
        line, level = worst.worst, worst.worst.severity.name.lower()
        where = f", in {line.where}" if line.where else ""
        ended = (
            f" Step {record.last:,}, the last one, was not taken." if _ended_in_a_skip(track, record) else ""
        )
        detail = f"{level.capitalize()}, since step {worst.first:,}: {line.measure} {line.value}, limit {line.limit}"
        return Verdict(level, headline(line.fault), f"{detail}{where}.{ended}")
    if not track.scalars:
        return Verdict("unjudged", "Not judged", "There are histograms, but no `GradGuard` watched this run.")
    notes = sum(group.count for group in groups)
    only = f"; {notes} {'thing was' if notes == 1 else 'things were'} noted" if notes else ""
    return Verdict("healthy", "Healthy", f"No warning up to step {record.last:,}{only}.")


def _ended_in_a_skip(track: Track, record: Record) -> bool:
    # The last panel may stand one step behind what it shows.
    step, row = next(reversed(track.rows.items()), (-2, None))
    return row is not None and step + 1 >= record.last and int(row[0]) == SKIPPED


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


def _notices(run: Run, track: Track) -> list[str]:
    notices = []
    if run.damaged:
        files = ", ".join(f"`{name}`" for name in run.damaged)
        verb = "breaks" if len(run.damaged) == 1 else "break"
        notices.append(
            f"{files} {verb} off in the middle of a record: the run was killed, or is still writing. "
            "What stands before that is shown."
        )
    if run.files > 1:
        notices.append(
            f"Joined from {run.files} event files; where steps were taken again, the later ones are shown."
        )
    if track.values:
        notices.append("Histograms of values are in TensorBoard only; those of log10 magnitudes are here.")
    if not track.rows and track.histograms:
        notices.append(
            "The heat map is put together from histograms, so it has only the tensors and steps of those."
        )
    return notices
