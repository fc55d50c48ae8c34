"""Verdicts: how a run ended, then what is left, and how bad that is."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.loggers.findings import FoundRecord
from lightning_gradguard.loggers.status import Course, End, LoggedFinding, RunEnd, Status, Tally
from lightning_gradguard.loggers.verdict import MARKS, verdict_of
from lightning_gradguard.results import ClipSpan, Fault, Finding, Report, Severity

WEIGHT = "net.layers.0.weight"
FINISHED = RunEnd(End.FINISHED, 540)


def report(step=0, *found, skip=False, scale=1.0, norm=1.0):
    findings = tuple(
        Finding(Fault(fault), severity, step, (WEIGHT, "b"), 4.0, 3.0, "D", measure="tilt")
        for fault, severity in found
    )
    return Report(step, 1.0, norm, norm, None, 0.0 if skip else scale, skip, findings)


def bad(step=0):
    return report(step, ("nonfinite", Severity.WARNING), skip=True, norm=math.nan)


def tally_of(*steps):
    """Return a tally of steps: a report, or a report and the faults that last."""
    tally = Tally()
    for step in steps:
        newest, lasting = step if isinstance(step, tuple) else (step, set())
        tally.observe(newest, lasting)
    return tally


def warned(fault="vanishing", step=29, severity=Severity.WARNING):
    return report(step, (fault, severity)), {fault}


def course(fault="vanishing", severity=Severity.WARNING, **facts):
    return Course(LoggedFinding(29, fault, severity, (WEIGHT,), 4.0, 3.0, "tilt"), 29, **facts)


@pytest.mark.parametrize(
    ("status", "sentence", "level"),
    [
        (Status(9, 540, end=FINISHED), "Finished: healthy; 540 steps, none skipped.", "healthy"),
        (
            Status(9, 540, 12, 12, 5, end=FINISHED, courses=(course("nonfinite", lasts=False),)),
            "Finished: protected; 12 of 540 steps had NaN or Inf and were skipped, 5 clipped.",
            "protected",
        ),
        (
            Status(
                75,
                76,
                0,
                1,
                end=RunEnd(End.HALTED, 75, "vanishing"),
                courses=(course(severity=Severity.CRITICAL),),
            ),
            f"Halted before step 75: gradients vanish, since step 29, worst in {WEIGHT}.",
            "critical",
        ),
        (
            Status(120, 120, end=RunEnd(End.ERROR, 120, error="ValueError")),
            "Ended by an error (ValueError) at step 120: healthy; 120 steps, none skipped.",
            "warning",
        ),
        (
            Status(80, 80, end=RunEnd(End.INTERRUPTED, 80)),
            "Interrupted at step 80: healthy; 80 steps, none skipped.",
            "healthy",
        ),
        (
            Status(310, 311),
            "No end recorded at step 310 (still running, or killed): healthy; 311 steps, none skipped.",
            "healthy",
        ),
        (
            Status(99, 100, end=FINISHED, courses=(course(lasts=False, until=81),)),
            "Finished: recovered; gradients vanished from step 29 to 80.",
            "protected",
        ),
        (
            Status(
                99,
                100,
                0,
                0,
                60,
                courses=(course("exploding", Severity.CRITICAL, lasts=True),),
                clipped_for=("exploding",),
                end=FINISHED,
            ),
            f"Finished: gradients explode, since step 29, and clipped, worst in {WEIGHT}; "
            "60 of 100 steps were clipped.",
            "warning",
        ),
        (
            Status(99, 100, end=FINISHED, courses=(course("spike", lasts=False, count=2, taken=2),)),
            f"Finished: gradients spiked, at 2 steps, not clipped, worst in {WEIGHT}.",
            "warning",
        ),
        (
            Status(99, 100, 3, 3, end=FINISHED, courses=(course("nonfinite", Severity.INFO, lasts=False),)),
            "Finished: healthy; 3 of 100 steps had NaN or Inf and were skipped by the gradient scaler.",
            "healthy",
        ),
        (
            Status(99, 100, end=FINISHED, mistaken=True),
            "Finished: a mistake in the code; 100 steps, none skipped.",
            "warning",
        ),
    ],
)
def test_a_verdict_in_one_sentence(status, sentence, level):
    verdict = verdict_of(status)
    assert str(verdict) == sentence
    assert verdict.level == level


def test_a_live_run_tells_its_step():
    assert verdict_of(Status(310, 311), live=True).title == "Step 310 so far: healthy"


def test_a_file_of_an_older_version_claims_no_end():
    assert verdict_of(Status(310, is_known=False)).title == "Up to step 310: healthy"


severities = st.sampled_from(list(Severity))
faults = st.sampled_from([fault.value for fault in Fault] + ["made_elsewhere"])
courses = st.builds(
    course,
    faults,
    severities,
    count=st.integers(1, 9),
    taken=st.integers(0, 9),
    lasts=st.none() | st.booleans(),
)
ends = st.none() | st.builds(
    RunEnd, st.sampled_from(list(End)), st.integers(0, 999), faults, st.just("E"), st.integers(0, 1)
)
statuses = st.builds(
    Status,
    step=st.integers(0, 999),
    steps=st.integers(0, 999),
    nonfinite=st.integers(0, 9),
    skipped=st.integers(0, 9),
    clipped=st.integers(0, 9),
    rollbacks=st.integers(0, 2),
    courses=st.lists(courses, max_size=4, unique_by=lambda c: c.worst.fault).map(tuple),
    mistaken=st.booleans(),
    end=ends,
)


@given(statuses)
def test_a_status_survives_json(status):
    text = FoundRecord(status=status).to_json()
    assert FoundRecord.from_json(text).status == status
    assert "status" not in json.loads(FoundRecord().to_json())


@given(statuses)
def test_a_verdict_says_first_how_the_run_ended_and_is_never_empty(status):
    verdict = verdict_of(status)
    assert verdict.level in MARKS
    assert str(verdict).startswith(verdict.ended)
    assert verdict.state
    assert "  " not in str(verdict)
    assert str(verdict).endswith(".")
    assert not str(verdict).endswith("..")


@given(statuses)
def test_what_was_halted_is_critical_and_what_had_no_warning_is_not(status):
    verdict, end = verdict_of(status), status.end
    if end is not None and end.how in (End.HALTED, End.STOPPED) and end.optimizer == 0:
        assert verdict.level == "critical"
    elif not any(c.worst.severity == Severity.CRITICAL and c.is_left for c in status.courses):
        assert verdict.level != "critical"


@given(statuses)
def test_more_findings_never_make_a_verdict_better(status):
    order = list(MARKS)
    worse = replace(status, courses=(*status.courses, course("made_worse", Severity.CRITICAL, lasts=True)))
    assert order.index(verdict_of(worse).level) <= order.index(verdict_of(status).level)


def test_a_fault_lasts_until_it_is_not_reported_as_lasting():
    tally = tally_of(report(28), warned(), (report(30), {"vanishing"}))
    assert [c.lasts for c in tally.status().courses] == [True]
    assert verdict_of(tally.status()).level == "warning"
    assert tally.observe(report(31), set())
    (only,) = tally.status().courses
    assert (only.lasts, only.until) == (False, 31)
    assert verdict_of(tally.status()).state == "recovered"


def test_a_fault_that_comes_back_is_as_severe_as_it_is_now():
    tally = tally_of(warned(severity=Severity.CRITICAL), report(50), warned(step=70))
    verdict = verdict_of(tally.status(FINISHED))
    assert (verdict.level, verdict.since) == ("warning", "since step 70")


def test_a_fault_that_becomes_critical_keeps_its_onset():
    found = Finding(Fault.VANISHING, Severity.CRITICAL, 29, (WEIGHT,), 4.0, 3.0, "D")
    tally = tally_of(warned(), (replace(report(79), findings=(found,)), {"vanishing"}))
    verdict = verdict_of(tally.status(FINISHED))
    assert (verdict.level, verdict.since) == ("critical", "since step 29")


@pytest.mark.parametrize(
    ("scale", "skip", "level"), [(1.0, False, "warning"), (0.5, False, "protected"), (1.0, True, "protected")]
)
def test_a_spike_counts_only_where_it_was_taken_as_it_was(scale, skip, level):
    spike = report(5, ("spike", Severity.WARNING), scale=scale, skip=skip)
    assert verdict_of(tally_of(report(4), spike, report(6)).status(FINISHED)).level == level


def test_steps_with_nan_are_over_with_the_next_good_one():
    tally = tally_of(report(0), (bad(1), {"nonfinite"}))
    assert verdict_of(tally.status()).state == "gradients or loss are NaN or Inf"
    tally.observe(report(2), set())
    assert verdict_of(tally.status()).state == "protected"
    assert tally.status().nonfinite == 1


def test_a_loss_that_is_nan_counts_though_the_gradients_are_finite():
    tally = tally_of(replace(report(0, skip=True), loss=math.nan))
    assert tally.status().nonfinite == 1


def test_clipping_for_a_fault_ends_with_its_span():
    tally = tally_of(warned("exploding"))
    tally.show_clipping([ClipSpan(29, None, ("exploding",))])
    assert tally.status().clipped_for == ("exploding",)
    tally.show_clipping([ClipSpan(29, 80, ("exploding",))])
    assert tally.status().clipped_for == ()


def test_a_rollback_ends_a_fault():
    tally = tally_of(warned("exploding"))
    found = report(79, ("exploding", Severity.CRITICAL), skip=True)
    tally.observe(found, set(), rollbacks=1)
    verdict = verdict_of(tally.status(FINISHED))
    assert verdict.level == verdict.state == "protected"
    assert "1 rollback" in str(verdict)


def test_the_halt_of_another_optimizer_is_named():
    verdict = verdict_of(Status(9, 10, optimizer=1, end=RunEnd(End.HALTED, 9, "vanishing", optimizer=0)))
    assert verdict.level == "healthy"
    assert str(verdict).startswith(
        "Halted before step 9: optimizer 1 was healthy; the reason is optimizer 0: gradients vanish"
    )


def test_the_number_of_faults_is_bounded():
    tally = Tally()
    for i in range(500):
        found = Finding(Fault.custom(f"odd_{i}"), Severity.WARNING, i, (), 1.0, 1.0, "D")
        tally.observe(replace(report(i), findings=(found,)), set())
    assert len(tally.status().courses) <= 32


def test_a_name_is_shortened_on_request_only():
    long = "encoder." + "x" * 90 + ".weight"
    status = Status(9, 9, courses=(course(),), end=FINISHED)
    worst = status.courses[0].worst._replace(parameters=(long,))
    verdict = verdict_of(replace(status, courses=(replace(status.courses[0], worst=worst),)))
    assert long in str(verdict)
    assert len(verdict.detail(20)) < 60
