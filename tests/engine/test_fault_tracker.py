"""Onset, patience, hysteresis, precedence, silence and skips, on plain numbers."""

import math

import pytest

from lightning_gradguard.engine.fault_tracker import SILENCE, FaultTracker
from lightning_gradguard.engine.step_record import DetectorResult, StepRecord
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import Fault, Severity


def sight(
    fault=Fault.VANISHING,
    raised=True,
    cleared=None,
    ceiling=Severity.CRITICAL,
    event=False,
    needs_loss=False,
    where=("a",),
):
    return DetectorResult(
        detector=fault.value.title(), fault=fault, event=event, needs_loss=needs_loss, raised=raised,
        cleared=not raised if cleared is None else cleared, ceiling=ceiling, value=4.0, limit=3.0, measure="decades",
        parameters=where,
    )  # fmt: skip


def letter(*sights, finite=True, total=1.0, clipped=1.0, loss=1.0, loss_scale=math.nan):
    nan = math.nan
    return StepRecord(
        total_norm=total, clipped_norm=clipped, threshold=nan, clipped=clipped < total, finite=finite, loss=loss,
        loss_start=1.0, loss_mean=1.0, loss_first=1.0, loss_scale=loss_scale, tilt=nan, update_ratio=nan,
        baseline_norm=1.0, norms={"a": 1.0}, results=list(sights),
    )  # fmt: skip


def run(judge, step, *sights, **kwargs):
    flags = {"has_loss": True, "scaled": False, "clipping": False}
    flags = {k: kwargs.pop(k, v) for k, v in flags.items()}
    return judge.decide(step, letter(*sights, **kwargs), **flags)


BAD = sight(Fault.NONFINITE)


def severities(verdicts):
    return [f.severity for v in verdicts for f in v.report.findings]


def test_warning_at_once_and_critical_after_patience():
    judge = FaultTracker(Policy(patience=5))
    verdicts = [run(judge, s, sight()) for s in range(10, 30)]
    found = {v.report.step: v.report.findings[0] for v in verdicts if v.report.findings}
    assert {s: f.severity for s, f in found.items()} == {10: Severity.WARNING, 15: Severity.CRITICAL}
    assert all(f.step == 10 for f in found.values())
    assert all(v.halt is None for v in verdicts)


def test_halt_comes_with_the_critical_finding_and_skips_the_step():
    judge = FaultTracker(Policy(respond={"vanishing": "halt"}, patience=3))
    verdicts = [run(judge, s, sight()) for s in range(4)]
    assert [v.halt is not None for v in verdicts] == [False, False, False, True]
    assert verdicts[-1].report.skip
    assert verdicts[-1].report.scale == 0.0


def test_patience_zero_is_critical_at_once():
    assert severities([run(FaultTracker(Policy(patience=0)), 0, sight())]) == [Severity.CRITICAL]


def test_a_condition_stays_below_its_ceiling():
    judge = FaultTracker(Policy.strict())
    assert severities([run(judge, s, sight(ceiling=Severity.WARNING)) for s in range(200)]) == [
        Severity.WARNING
    ]

    judge = FaultTracker(Policy.strict())
    assert severities([run(judge, s, sight(ceiling=Severity.INFO)) for s in range(200)]) == [Severity.INFO]


def test_a_condition_that_turns_graver_is_said_again():
    judge = FaultTracker(Policy(patience=3))
    ceilings = [Severity.INFO] * 5 + [Severity.WARNING] * 5 + [Severity.CRITICAL] * 5
    verdicts = [run(judge, s, sight(ceiling=c)) for s, c in enumerate(ceilings)]
    assert [(v.report.step, f.severity) for v in verdicts for f in v.report.findings] == [
        (0, Severity.INFO), (5, Severity.WARNING), (10, Severity.CRITICAL),
    ]  # fmt: skip


def test_hysteresis_keeps_the_episode():
    judge = FaultTracker(Policy(patience=3))
    between = sight(raised=False, cleared=False)
    steps = [sight(), between, between, sight(), sight(), sight()]
    found = severities([run(judge, i, s) for i, s in enumerate(steps)])
    assert found == [Severity.WARNING, Severity.CRITICAL]


def test_a_cleared_condition_begins_anew():
    judge = FaultTracker(Policy(patience=3))
    steps = [sight(), sight(), sight(raised=False), *[sight()] * 4]
    reports = [run(judge, i, s).report for i, s in enumerate(steps)]
    assert [f.step for r in reports for f in r.findings] == [0, 3, 3]


def test_flapping_says_it_once_in_a_hundred_steps():
    judge = FaultTracker(Policy(patience=10))
    verdicts = [run(judge, s, sight(raised=bool(s % 2))) for s in range(3 * SILENCE)]
    assert sum(len(v.messages) for v in verdicts) == 3
    assert sum(len(v.report.findings) for v in verdicts) == 150


def test_an_event_is_found_each_time_and_never_halts():
    judge = FaultTracker(Policy.strict())
    spike = sight(Fault.SPIKE, event=True)
    verdicts = [run(judge, s, spike) for s in range(80)]
    assert severities(verdicts) == [Severity.WARNING] * 80
    assert [f.step for v in verdicts for f in v.report.findings] == list(range(80))
    assert all(v.halt is None and not v.report.skip for v in verdicts)
    assert sum(len(v.messages) for v in verdicts) == 1


def test_findings_come_by_precedence():
    judge = FaultTracker(Policy())
    report = run(
        judge, 0, sight(Fault.SPIKE, event=True), sight(Fault.DISCONNECTED), sight(Fault.VANISHING)
    ).report
    assert [f.fault for f in report.findings] == [Fault.DISCONNECTED, Fault.VANISHING, Fault.SPIKE]


def test_a_consequence_is_not_reported_beside_its_cause():
    judge = FaultTracker(Policy())
    report = run(judge, 0, sight(Fault.STALLED), sight(Fault.VANISHING)).report
    assert [f.fault for f in report.findings] == [Fault.VANISHING]
    after = run(judge, 1, sight(Fault.STALLED), sight(Fault.VANISHING, raised=False)).report
    assert [(f.fault, f.step) for f in after.findings] == [(Fault.STALLED, 0)]


def test_ignore_says_and_finds_nothing():
    verdict = run(FaultTracker(Policy(respond={"vanishing": "ignore"})), 0, sight())
    assert verdict.report.findings == verdict.messages == ()


def test_rules_that_need_the_loss_are_off_without_it():
    assert run(FaultTracker(Policy()), 0, sight(needs_loss=True), has_loss=False).report.findings == ()
    assert run(FaultTracker(Policy()), 0, sight(needs_loss=True), has_loss=True).report.findings


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_nonfinite_skips_up_to_the_limit_then_halts(limit):
    judge = FaultTracker(Policy(max_consecutive_skips=limit))
    verdicts = [run(judge, s, BAD, finite=False) for s in range(limit + 1)]
    assert all(v.report.skip for v in verdicts)
    assert [v.halt is not None for v in verdicts] == [False] * limit + [True]
    assert verdicts[-1].halt.severity == Severity.CRITICAL
    assert verdicts[-1].halt.step == 0


def test_a_good_step_resets_the_count_of_skips():
    judge = FaultTracker(Policy(max_consecutive_skips=2))
    for step in range(30):
        verdict = run(judge, step, BAD if step % 3 else sight(raised=False), finite=step % 3 == 0)
        assert verdict.halt is None


@pytest.mark.parametrize("response", ["ignore", "warn"])
def test_ignore_and_warn_skip_nonfinite_but_never_halt(response):
    judge = FaultTracker(Policy(respond={"nonfinite": response}))
    verdicts = [run(judge, s, BAD, finite=False) for s in range(50)]
    assert all(v.report.skip and v.halt is None for v in verdicts)
    assert sum(len(v.messages) for v in verdicts) == (response == "warn")


def test_halt_on_the_first_nonfinite():
    assert run(FaultTracker(Policy(respond={"nonfinite": "halt"})), 7, BAD, finite=False).halt.step == 7


def test_nonfinite_is_skipped_without_a_detector_for_it():
    report = run(FaultTracker(Policy()), 0, finite=False).report
    assert report.skip
    assert [f.fault for f in report.findings] == [Fault.NONFINITE]


def test_a_nonfinite_step_leaves_other_conditions_as_they_were():
    with_nan, without = FaultTracker(Policy(patience=5)), FaultTracker(Policy(patience=5))
    for step in range(4):
        run(with_nan, step, sight())
        run(without, step, sight())
    run(with_nan, 4, sight(raised=False), BAD, finite=False)
    a = [run(with_nan, s, sight()).report.findings for s in range(5, 10)]
    b = [run(without, s, sight()).report.findings for s in range(5, 10)]
    assert a == b


def test_a_scalers_overflow_is_routine_until_its_scale_is_below_one():
    judge = FaultTracker(Policy(max_consecutive_skips=2))
    for step in range(20):
        verdict = run(judge, step, BAD, finite=False, scaled=True, loss_scale=1024.0)
        assert verdict.report.skip
        assert verdict.halt is None
        assert verdict.messages == ()
        assert severities([verdict]) == [Severity.INFO]
    verdicts = [run(judge, s, BAD, finite=False, scaled=True, loss_scale=0.5) for s in range(20, 23)]
    assert severities(verdicts) == [Severity.WARNING, Severity.WARNING, Severity.CRITICAL]


def test_a_nonfinite_loss_counts_with_a_scaler_too():
    verdict = run(FaultTracker(Policy()), 0, BAD, finite=False, scaled=True, loss_scale=1024.0, loss=math.nan)
    assert severities([verdict]) == [Severity.WARNING]


def test_skip_on_a_condition_skips_while_it_holds_and_then_halts():
    judge = FaultTracker(Policy(respond={"exploding": "skip"}, max_consecutive_skips=3))
    verdicts = [run(judge, s, sight(Fault.EXPLODING)) for s in range(4)]
    assert [v.report.skip for v in verdicts] == [True] * 4
    assert [v.halt is not None for v in verdicts] == [False, False, False, True]


def test_scale_is_what_was_done():
    report = run(FaultTracker(Policy()), 0, total=4.0, clipped=1.0, clipping=True).report
    assert (report.total_norm, report.clipped_norm, report.scale) == (4.0, 1.0, 0.25)


def test_state_survives_a_round_trip():
    one, two = FaultTracker(Policy(patience=5)), FaultTracker(Policy(patience=5))
    for step in range(3):
        run(one, step, sight(), sight(Fault.SPIKE, event=True))
    two.load_state_dict(one.state_dict())
    for step in range(3, 12):
        a, b = (run(j, step, sight(), sight(Fault.SPIKE, event=True)) for j in (one, two))
        assert a == b
    assert one.state_dict() == two.state_dict()
