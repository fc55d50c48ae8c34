"""Onset, patience, hysteresis, precedence, silence and skips, on plain numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.engine.fault_tracker import SILENCE, FaultTracker
from lightning_gradguard.engine.step_record import DetectorResult, StepRecord
from lightning_gradguard.policy import Policy
from lightning_gradguard.results import Fault, Severity


def result(
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


def record(*results, finite=True, total=1.0, clipped=1.0, loss=1.0, loss_scale=math.nan):
    nan = math.nan
    return StepRecord(
        total_norm=total, clipped_norm=clipped, threshold=nan, clipped=clipped < total, finite=finite, loss=loss,
        loss_start=1.0, loss_mean=1.0, loss_first=1.0, loss_scale=loss_scale, tilt=nan, update_ratio=nan,
        baseline_norm=1.0, norms={"a": 1.0}, results=list(results),
    )  # fmt: skip


def run(tracker, step, *results, **kwargs):
    flags = {"has_loss": True, "scaled": False, "clipping": False}
    flags = {k: kwargs.pop(k, v) for k, v in flags.items()}
    return tracker.decide(step, record(*results, **kwargs), **flags)


BAD = result(Fault.NONFINITE)


def severities(decisions):
    return [f.severity for d in decisions for f in d.report.findings]


def test_warning_at_once_and_critical_after_patience():
    tracker = FaultTracker(Policy(patience=5))
    decisions = [run(tracker, s, result()) for s in range(10, 30)]
    found = {d.report.step: d.report.findings[0] for d in decisions if d.report.findings}
    assert {s: f.severity for s, f in found.items()} == {10: Severity.WARNING, 15: Severity.CRITICAL}
    assert all(f.step == 10 for f in found.values())
    assert all(d.halt is None for d in decisions)


def test_halt_comes_with_the_critical_finding_and_skips_the_step():
    tracker = FaultTracker(Policy(respond={"vanishing": "halt"}, patience=3))
    decisions = [run(tracker, s, result()) for s in range(4)]
    assert [d.halt is not None for d in decisions] == [False, False, False, True]
    assert decisions[-1].report.skip
    assert decisions[-1].report.scale == 0.0


def test_patience_zero_is_critical_at_once():
    assert severities([run(FaultTracker(Policy(patience=0)), 0, result())]) == [Severity.CRITICAL]


def test_a_condition_stays_below_its_ceiling():
    tracker = FaultTracker(Policy.strict())
    assert severities([run(tracker, s, result(ceiling=Severity.WARNING)) for s in range(200)]) == [
        Severity.WARNING
    ]

    tracker = FaultTracker(Policy.strict())
    assert severities([run(tracker, s, result(ceiling=Severity.INFO)) for s in range(200)]) == [Severity.INFO]


def test_a_condition_that_turns_graver_is_said_again():
    tracker = FaultTracker(Policy(patience=3))
    ceilings = [Severity.INFO] * 5 + [Severity.WARNING] * 5 + [Severity.CRITICAL] * 5
    decisions = [run(tracker, s, result(ceiling=c)) for s, c in enumerate(ceilings)]
    assert [(d.report.step, f.severity) for d in decisions for f in d.report.findings] == [
        (0, Severity.INFO), (5, Severity.WARNING), (10, Severity.CRITICAL),
    ]  # fmt: skip


def test_hysteresis_keeps_the_episode():
    tracker = FaultTracker(Policy(patience=3))
    between = result(raised=False, cleared=False)
    steps = [result(), between, between, result(), result(), result()]
    found = severities([run(tracker, i, s) for i, s in enumerate(steps)])
    assert found == [Severity.WARNING, Severity.CRITICAL]


def test_patience_counts_the_steps_at_which_the_condition_is_raised():
    tracker, between = FaultTracker(Policy(patience=5)), result(raised=False, cleared=False)
    decisions = [run(tracker, s, result() if s == 0 or s > 20 else between) for s in range(30)]
    assert [s for s, d in enumerate(decisions) for f in d.report.findings if f.severity == 2] == [25]


def test_a_cleared_condition_begins_anew():
    tracker = FaultTracker(Policy(patience=3))
    steps = [result(), result(), result(raised=False), *[result()] * 4]
    reports = [run(tracker, i, s).report for i, s in enumerate(steps)]
    assert [f.step for r in reports for f in r.findings] == [0, 3, 3]


def test_flapping_says_it_once_in_a_hundred_steps():
    tracker = FaultTracker(Policy(patience=10))
    decisions = [run(tracker, s, result(raised=bool(s % 2))) for s in range(3 * SILENCE)]
    assert [s for s, d in enumerate(decisions) if d.messages] == [1, 1 + SILENCE, 1 + 2 * SILENCE]
    assert sum(len(d.report.findings) for d in decisions) == 150


def test_an_event_is_found_each_time_and_never_halts():
    tracker = FaultTracker(Policy.strict())
    spike = result(Fault.SPIKE, event=True)
    decisions = [run(tracker, s, spike) for s in range(80)]
    assert severities(decisions) == [Severity.WARNING] * 80
    assert [f.step for d in decisions for f in d.report.findings] == list(range(80))
    assert all(d.halt is None and not d.report.skip for d in decisions)
    assert sum(len(d.messages) for d in decisions) == 1


def test_findings_come_by_precedence():
    tracker = FaultTracker(Policy())
    report = run(
        tracker, 0, result(Fault.SPIKE, event=True), result(Fault.DISCONNECTED), result(Fault.VANISHING)
    ).report
    assert [f.fault for f in report.findings] == [Fault.DISCONNECTED, Fault.VANISHING, Fault.SPIKE]


def test_a_consequence_is_not_reported_beside_its_cause():
    tracker = FaultTracker(Policy())
    report = run(tracker, 0, result(Fault.STALLED), result(Fault.VANISHING)).report
    assert [f.fault for f in report.findings] == [Fault.VANISHING]
    after = run(tracker, 1, result(Fault.STALLED), result(Fault.VANISHING, raised=False)).report
    assert [(f.fault, f.step) for f in after.findings] == [(Fault.STALLED, 0)]


def test_ignore_says_and_finds_nothing():
    verdict = run(FaultTracker(Policy(respond={"vanishing": "ignore"})), 0, result())
    assert verdict.report.findings == verdict.messages == ()


def test_rules_that_need_the_loss_are_off_without_it():
    assert run(FaultTracker(Policy()), 0, result(needs_loss=True), has_loss=False).report.findings == ()
    assert run(FaultTracker(Policy()), 0, result(needs_loss=True), has_loss=True).report.findings


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_nonfinite_skips_up_to_the_limit_then_halts(limit):
    tracker = FaultTracker(Policy(max_consecutive_skips=limit))
    decisions = [run(tracker, s, BAD, finite=False) for s in range(limit + 1)]
    assert all(d.report.skip for d in decisions)
    assert [d.halt is not None for d in decisions] == [False] * limit + [True]
    assert decisions[-1].halt.severity == Severity.CRITICAL
    assert decisions[-1].halt.step == 0


def test_a_good_step_ends_a_stretch_of_nonfinite_ones():
    tracker, onsets = FaultTracker(Policy()), []
    for step in range(10):
        is_bad = step in (3, 4, 8)
        report = run(tracker, step, BAD if is_bad else result(raised=False), finite=not is_bad).report
        onsets += [finding.step for finding in report.findings]
    assert onsets == [3, 3, 8]


def test_a_good_step_resets_the_count_of_skips():
    tracker = FaultTracker(Policy(max_consecutive_skips=2))
    for step in range(30):
        verdict = run(tracker, step, BAD if step % 3 else result(raised=False), finite=step % 3 == 0)
        assert verdict.halt is None


@pytest.mark.parametrize("response", ["ignore", "warn"])
def test_ignore_and_warn_skip_nonfinite_but_never_halt(response):
    tracker = FaultTracker(Policy(respond={"nonfinite": response}))
    decisions = [run(tracker, s, BAD, finite=False) for s in range(50)]
    assert all(d.report.skip and d.halt is None for d in decisions)
    assert sum(len(d.messages) for d in decisions) == (response == "warn")


def test_halt_on_the_first_nonfinite():
    assert run(FaultTracker(Policy(respond={"nonfinite": "halt"})), 7, BAD, finite=False).halt.step == 7


def test_nonfinite_is_skipped_without_a_detector_for_it():
    report = run(FaultTracker(Policy()), 0, finite=False).report
    assert report.skip
    assert [f.fault for f in report.findings] == [Fault.NONFINITE]


def test_a_nonfinite_step_leaves_other_conditions_as_they_were():
    with_nan, without = FaultTracker(Policy(patience=5)), FaultTracker(Policy(patience=5))
    for step in range(4):
        run(with_nan, step, result())
        run(without, step, result())
    run(with_nan, 4, result(raised=False), BAD, finite=False)
    a = [run(with_nan, s, result()).report.findings for s in range(5, 10)]
    b = [run(without, s, result()).report.findings for s in range(5, 10)]
    assert a == b


def test_a_scalers_overflow_is_routine_until_its_scale_is_below_one():
    tracker = FaultTracker(Policy(max_consecutive_skips=2))
    for step in range(20):
        verdict = run(tracker, step, BAD, finite=False, scaled=True, loss_scale=1024.0)
        assert verdict.report.skip
        assert verdict.halt is None
        assert verdict.messages == ()
        assert severities([verdict]) == [Severity.INFO]
    decisions = [run(tracker, s, BAD, finite=False, scaled=True, loss_scale=0.5) for s in range(20, 23)]
    assert severities(decisions) == [Severity.WARNING, Severity.WARNING, Severity.CRITICAL]


def test_a_nonfinite_loss_counts_with_a_scaler_too():
    verdict = run(FaultTracker(Policy()), 0, BAD, finite=False, scaled=True, loss_scale=1024.0, loss=math.nan)
    assert severities([verdict]) == [Severity.WARNING]


def test_skip_on_a_condition_skips_while_it_holds_and_then_halts():
    tracker = FaultTracker(Policy(respond={"exploding": "skip"}, max_consecutive_skips=3))
    decisions = [run(tracker, s, result(Fault.EXPLODING)) for s in range(4)]
    assert [d.report.skip for d in decisions] == [True] * 4
    assert [d.halt is not None for d in decisions] == [False, False, False, True]


def test_scale_is_what_was_done():
    report = run(FaultTracker(Policy()), 0, total=4.0, clipped=1.0, clipping=True).report
    assert (report.total_norm, report.clipped_norm, report.scale) == (4.0, 1.0, 0.25)


def test_state_survives_a_round_trip():
    one, two = FaultTracker(Policy(patience=5)), FaultTracker(Policy(patience=5))
    for step in range(3):
        run(one, step, result(), result(Fault.SPIKE, event=True))
    two.load_state_dict(one.state_dict())
    for step in range(3, 12):
        a, b = (run(j, step, result(), result(Fault.SPIKE, event=True)) for j in (one, two))
        assert a == b
    assert one.state_dict() == two.state_dict()


def test_a_custom_fault_explains_nothing_and_nothing_explains_it():
    custom = Fault.custom("custom_in_the_tracker")
    tracker = FaultTracker(Policy(respond={custom: "halt"}, patience=2))
    own, dead, vanishing = result(custom), result(Fault.DEAD), result(Fault.VANISHING)
    first = run(tracker, 0, own, vanishing, dead)
    assert [f.fault for f in first.report.findings] == [Fault.DEAD, custom]
    run(tracker, 1, own, vanishing, dead)
    assert run(tracker, 2, own, vanishing, dead).halt.fault == custom


def test_a_custom_fault_is_restored_with_its_results():
    custom = result(Fault.custom("custom_in_a_state"), ceiling=Severity.WARNING)
    assert DetectorResult.from_plain(custom.to_plain()) == custom


def test_clip_as_warn_and_never_halts_or_skips():
    tracker = FaultTracker(Policy(respond={"exploding": "clip"}, patience=2))
    exploding = result(Fault.EXPLODING)
    decisions = [run(tracker, s, exploding, clipped=0.5, clipping=None) for s in range(6)]
    assert severities(decisions) == [Severity.WARNING, Severity.CRITICAL]
    assert not any(d.report.skip or d.halt for d in decisions)
    assert [d.report.scale for d in decisions] == [0.5] * 6


def test_clip_is_in_force_only_for_its_faults_and_the_patience_after_them():
    tracker = FaultTracker(Policy(respond={"spike": "clip"}, patience=2))
    spike, vanishing = (
        result(Fault.SPIKE, event=True, ceiling=Severity.INFO),
        result(Fault.VANISHING),
    )
    steps = [vanishing, spike, *[result(Fault.SPIKE, False, event=True)] * 4, vanishing]
    decisions = [run(tracker, s, r, clipped=0.5, clipping=None) for s, r in enumerate(steps)]
    assert [d.report.scale < 1 for d in decisions] == [False, True, True, True, False, False, False]
    assert [d.record.clipped for d in decisions] == [d.report.scale < 1 for d in decisions]
    assert all(d.report.clipped_norm == d.report.total_norm for d in decisions if d.report.scale == 1)


def test_an_explained_fault_puts_clip_in_force_only_once_it_is_reported():
    tracker = FaultTracker(Policy(respond={"exploding": "clip"}))
    vanishing, exploding = result(Fault.VANISHING), result(Fault.EXPLODING)
    assert not run(tracker, 0, vanishing, exploding, clipping=None).record.clipped
    assert tracker.clip_response.spans == ()
    run(tracker, 1, exploding, result(Fault.VANISHING, False), clipping=None)
    assert tracker.clip_response.since == 1


LASTING = [fault for fault in Fault.known() if fault not in (Fault.NONFINITE, Fault.SPIKE)]
#: Results of several detectors: fault, whether it is raised or neither raised nor cleared, and how severe it may be.
RESULTS = st.lists(
    st.builds(
        lambda fault, raised, cleared, ceiling, needs_loss: result(
            fault, raised, cleared and not raised, Severity(ceiling), needs_loss=needs_loss
        ),
        st.sampled_from(LASTING),
        st.booleans(),
        st.booleans(),
        st.integers(0, 2),
        st.booleans(),
    ),
    max_size=4,
    unique_by=lambda r: r.fault,
)


@given(
    before=st.lists(st.tuples(RESULTS, st.booleans()), max_size=6),
    newest=RESULTS,
    losses=st.lists(st.booleans(), min_size=1, max_size=30),
    patience=st.sampled_from([0, 1, 2, 5, 12]),
    responses=st.dictionaries(
        st.sampled_from([f.value for f in LASTING]), st.sampled_from(["ignore", "warn", "halt"])
    ),
)
def test_an_accepted_step_counts_as_one_with_the_same_results(before, newest, losses, patience, responses):
    """For as many steps as it says, whether they come with a loss or not; the one after them may change something."""
    accepting, deciding = (FaultTracker(Policy(patience=patience, respond=responses)) for _ in range(2))
    for results, has_loss in [*before, (newest, losses[0])]:
        for tracker in (accepting, deciding):
            run(tracker, 0, *results, has_loss=has_loss)
    most = accepting.steps_until_change(newest)
    for step, has_loss in enumerate(losses):
        if step >= most:
            return
        accepting.count_accepted(newest, has_loss=has_loss)
        decision = run(deciding, 0, *newest, has_loss=has_loss)
        assert not decision.report.findings
        assert decision.halt is None
        assert accepting.state_dict() == deciding.state_dict()


@pytest.mark.parametrize("patience", [1, 2, 10])
def test_accepted_steps_end_where_a_fault_becomes_critical(patience):
    tracker = FaultTracker(Policy(patience=patience))
    run(tracker, 0, result())
    most = tracker.steps_until_change([result()])
    assert most == patience - 1
    for _ in range(most):
        tracker.count_accepted([result()], has_loss=True)
    assert tracker.steps_until_change([result()]) == 0
    assert severities([run(tracker, patience, result())]) == [Severity.CRITICAL]
    assert tracker.steps_until_change([result()]) == math.inf


def test_an_event_is_never_followed_by_an_accepted_step():
    assert FaultTracker(Policy()).steps_until_change([result(Fault.SPIKE, event=True)]) == 0
    assert (
        FaultTracker(Policy()).steps_until_change([result(Fault.SPIKE, raised=False, event=True)]) == math.inf
    )


def test_only_a_critical_explosion_has_exploded():
    tracker = FaultTracker(Policy(patience=2))
    seen = []
    for step, fault in enumerate([Fault.DISCONNECTED] * 4 + [Fault.EXPLODING] * 4):
        run(tracker, step, result(fault))
        seen.append(tracker.has_exploded)
    assert seen == [False] * 6 + [True] * 2
