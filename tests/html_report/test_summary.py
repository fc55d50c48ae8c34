import math
from collections import Counter

import numpy as np
import pytest

from lightning_gradguard.html_report.event_reader import Run, Track, read_runs
from lightning_gradguard.html_report.summary import (
    CHARTS,
    DIAGNOSES,
    LISTED,
    by_fault,
    charts_of,
    merge_found,
    merge_spans,
    sheets_of,
)
from lightning_gradguard.loggers.findings import FoundRecord, LoggedFinding
from lightning_gradguard.loggers.overview import SKIPPED
from lightning_gradguard.results import ClipSpan, Fault, Severity


def sheet_of(folder):
    (run,) = read_runs([folder])
    (sheet,) = sheets_of(run)
    return sheet


def test_a_healthy_run(written):
    sheet = sheet_of(written(steps=100))
    assert sheet.verdict.level == "healthy"
    assert str(sheet.verdict) == (
        "No end recorded at step 99 (still running, or killed): healthy; 14 of 100 steps were clipped."
    )
    assert (sheet.record.clipped, sheet.record.skipped, sheet.record.nonfinite) == (14, 0, 0)
    assert sheet.record.strongest == (0.5, 10)
    assert not sheet.notices


@pytest.mark.parametrize(
    ("kind", "level", "verdict"),
    [
        ("vanishing", "critical", "gradients vanish, since step 75, worst in net.blocks.0.weight"),
        ("exploding", "critical", "gradients explode, since step 75, worst in net.blocks.0.weight"),
        ("nan", "protected", "protected; 10 of 100 steps had NaN or Inf and were skipped, 12 clipped"),
    ],
)
def test_a_run_with_a_fault(written, kind, level, verdict):
    sheet = sheet_of(written(steps=100, kind=kind, diagnosis="### Why"))
    assert sheet.verdict.level == level
    assert verdict in str(sheet.verdict)
    assert sheet.diagnoses == ["### Why"]
    assert sheet.record.skipped == (10 if kind == "nan" else 0)


def test_a_run_whose_newest_step_was_skipped_says_so(begun):
    run = begun(steps=100, kind="nan")
    run.write(0, 55)
    assert sheet_of(run.folder).verdict.state == "gradients or loss are NaN or Inf"
    run.write(55, 60)
    assert sheet_of(run.folder).verdict.state == "protected"


@pytest.mark.parametrize(("last", "said"), [(4, True), (5, True), (6, False)])
def test_in_older_files_the_last_row_may_stand_one_step_behind_the_other_curves(last, said):
    track = Track(
        layers=("a",),
        rows={3: np.array([0.0, -1.0]), 4: np.array([float(SKIPPED), np.nan])},
        scalars={"clip_scale": {last: 0.0}},
        found={4: FoundRecord((found(4, "nonfinite"),))},
    )
    (sheet,) = sheets_of(Run("r", {"gradguard": track}))
    assert (sheet.verdict.state == "gradients or loss are NaN or Inf") == said
    assert sheet.verdict.ended == f"Up to step {last}"


@pytest.mark.parametrize(
    ("severity", "level"),
    [(Severity.INFO, "healthy"), (Severity.WARNING, "warning"), (Severity.CRITICAL, "critical")],
)
def test_in_older_files_the_level_is_that_of_the_worst_finding(severity, level):
    records = {1: FoundRecord((found(1, "spike", Severity.INFO), found(1, severity=severity)))}
    (sheet,) = sheets_of(Run("r", {"gradguard": Track(scalars={"clip_scale": {9: 1.0}}, found=records)}))
    assert sheet.verdict.level == level


def test_the_strongest_clip_is_that_of_a_step_that_was_taken_and_clipped():
    for scales, strongest in (({0: 1.0, 1: 0.25, 2: 0.0, 3: 0.5}, (0.25, 1)), ({0: 1.0, 1: 0.0}, None)):
        (sheet,) = sheets_of(Run("r", {"gradguard": Track(scalars={"clip_scale": scales})}))
        assert sheet.record.strongest == strongest


@pytest.mark.parametrize(("count", "more"), [(3, False), (4, True)])
def test_three_tags_that_cannot_be_read_are_named(count, more):
    unreadable = Counter({f"gradguard/{i}": 1 for i in range(count)})
    run = Run("r", {"gradguard": Track(scalars={"clip_scale": {9: 1.0}})}, unreadable=unreadable, files=1)
    (notice,) = sheets_of(run)[0].notices
    assert "`gradguard/2`" in notice
    assert ("more tags" in notice) == more


def test_without_a_guard_nothing_is_judged():
    (sheet,) = sheets_of(Run("r", {"gradguard": Track(histograms={"000_a": {0: np.ones(30)}})}))
    assert sheet.verdict.level == "unjudged"
    assert "built from histograms" in sheet.notices[0]
    assert sheet.record.clipped is None


def test_notices_of_damaged_and_joined_files(begun):
    run = begun(steps=40)
    run.write(0, 20)
    run.write(20, 40)
    newest = max(run.folder.iterdir(), key=lambda path: path.name.endswith(".20"))
    newest.write_bytes(newest.read_bytes()[:-3])
    notices = sheet_of(run.folder).notices
    assert f"`{newest.name}` ends in the middle of a record" in notices[0]
    assert "Joined from 2 event files" in notices[1]


def test_optimizers_have_sheets_of_their_own():
    scalars = {"clip_scale": {0: 1.0}}
    sheets = sheets_of(
        Run("gan", {"gradguard": Track(scalars=scalars), "gradguard_1": Track(scalars=scalars)})
    )
    assert [sheet.title for sheet in sheets] == ["gan, optimizer 0", "gan, optimizer 1"]
    own, other = Track(layers=("g.0", "g.2"), scalars=scalars), Track(layers=("critic",), scalars=scalars)
    sheets = sheets_of(Run("gan", {"gradguard": own, "gradguard_1": other}))
    assert [sheet.title for sheet in sheets] == ["gan, optimizer 0 (g)", "gan, optimizer 1 (critic)"]


def test_charts_losses_first_and_only_what_there_is(written):
    charts = charts_of([sheet_of(written(steps=30))])
    names = [chart["name"] for chart in charts]
    assert names[0] == "train_loss"
    # These runs have no clipper.
    assert names[1:] == [name for name in CHARTS if name not in ("clip_rate", "threshold_log10")]
    assert all(chart["note"] for chart in charts[1:])


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1e4, 1.0, math.nan], [4.0, 0.0, None]),
        ([2.0, 1.0, math.nan], [2.0, 1.0, None]),
        ([1e4, -1.0], [1e4, -1.0]),
    ],
)
def test_a_loss_that_spans_decades_is_shown_as_its_logarithm(values, shown):
    run = Run("r", {"gradguard": Track(scalars={"clip_scale": {0: 1.0}})}, {"loss": dict(enumerate(values))})
    sheets = sheets_of(run)
    (chart, *_) = charts_of(sheets)
    assert sheets[0].figures["curves"]["loss"]["values"] == shown
    assert chart["title"] == ("loss, log10" if shown[0] == 4 else "loss")


def test_the_newest_table_of_narrow_formats_is_shown():
    (sheet,) = sheets_of(Run("run", {"gradguard": Track(exponents={0: "old", 10: "new"})}))
    assert sheet.exponents == "new"
    (sheet,) = sheets_of(Run("run", {"gradguard": Track()}))
    assert sheet.exponents == ""


def test_a_notice_says_where_histograms_of_values_are():
    (sheet,) = sheets_of(Run("run", {"gradguard": Track(values={"000_w"})}))
    assert (
        "Histograms of values are shown in TensorBoard only. This page shows those of log10 magnitudes."
        in sheet.notices
    )


def found(step, fault="vanishing", severity=Severity.WARNING, value=4.0):
    return LoggedFinding(step, fault, severity, ("net.0.weight",), value, 3.0, "depth tilt, decades")


def test_the_newest_findings_and_diagnoses_are_listed():
    record = FoundRecord(tuple(map(found, range(LISTED + 50))), tuple(map(str, range(DIAGNOSES + 2))))
    (sheet,) = sheets_of(Run("r", {"gradguard": Track(scalars={"clip_scale": {9: 1.0}}, found={9: record})}))
    assert [finding.step for finding in sheet.findings] == list(range(LISTED + 49, 49, -1))
    assert sheet.diagnoses == ["6", "5", "4", "3", "2"]
    assert sheet.groups[0].count == LISTED + 50


def test_what_a_resumed_run_repeats_counts_once():
    first = FoundRecord((found(1), found(2, value=math.nan)), ("### one",))
    resumed = FoundRecord((found(1), found(2, value=float("nan")), found(3)), ("### one", "### two"))
    findings, diagnoses = merge_found([first, resumed])
    assert [finding.step for finding in findings] == [1, 2, 3]
    assert diagnoses == ["### two", "### one"]


@pytest.mark.parametrize(
    ("diagnosis", "title"),
    [("### A mistake in the code\n\nTwo.", "a mistake in the code"), ("### Gradients explode", "healthy")],
)
def test_only_a_named_mistake_makes_a_run_without_a_fault_unhealthy(diagnosis, title):
    record = FoundRecord((found(3, severity=Severity.INFO),), (diagnosis,))
    (sheet,) = sheets_of(Run("r", {"gradguard": Track(scalars={"clip_scale": {9: 1.0}}, found={9: record})}))
    assert sheet.verdict.state == title


def test_findings_by_fault_the_most_severe_first():
    groups = by_fault(
        [
            found(2, "stalled"),
            found(5, "spike", Severity.INFO),
            found(9),
            found(30, severity=Severity.CRITICAL),
            found(40, severity=Severity.CRITICAL),
        ]
    )
    assert [group.fault for group in groups] == ["vanishing", "stalled", "spike"]
    assert (groups[0].first, groups[0].last, groups[0].count, groups[0].worst.step) == (9, 40, 3, 30)


def test_of_equal_findings_the_fault_with_precedence_is_first_and_an_unknown_one_last():
    names = ["made_elsewhere", *(fault.value for fault in reversed(Fault))]
    assert [group.fault for group in by_fault([found(0, name) for name in names])] == [
        *(fault.value for fault in Fault),
        "made_elsewhere",
    ]


def test_a_fault_that_this_process_does_not_know_is_reported_by_its_name():
    record = FoundRecord((found(7, "heavily_quantized", Severity.CRITICAL),))
    (sheet,) = sheets_of(Run("r", {"gradguard": Track(scalars={"clip_scale": {9: 1.0}}, found={7: record})}))
    assert sheet.verdict.level == "critical"
    assert sheet.verdict.state == "custom fault heavily quantized"
    assert sheet.figures["marks"] == [{"title": "heavily quantized", "severity": "critical", "steps": [7]}]


def test_faults_in_words():
    titles = [group.title for group in by_fault([found(0, "nonfinite"), found(1, "vanishing_in_time")])]
    assert titles == ["not finite", "vanishing in time"]


def test_spans_of_clipping_are_those_of_the_newest_record():
    open_span, whole = ClipSpan(120, None, ("exploding",)), ClipSpan(120, 480, ("exploding", "spike"))
    later = ClipSpan(900, None, ("spike",))
    records = [FoundRecord(spans=(open_span,)), FoundRecord(), FoundRecord(spans=(whole, later))]
    assert merge_spans(records) == [whole, later]
    assert merge_spans([]) == []
