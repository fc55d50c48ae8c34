import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.charts import ROWS
from lightning_gradguard.loggers.findings import FoundRecord
from lightning_gradguard.loggers.overview import CLIPPED, Overview
from lightning_gradguard.loggers.status import End, RunEnd
from lightning_gradguard.loggers.verdict import verdict_of
from lightning_gradguard.results import ClipSpan, Fault, Finding, Report, Severity

NAMES = ["net.0.weight", "net.0.bias", "net.norm.weight", "net.2.weight", "net.2.bias"]
NUMELS = [100, 4, 4, 400, 25]
MATRICES = [True, False, False, True, False]


def report(step=0, norms=None, **changes):
    norms = dict(zip(NAMES, [1.0, 2.0, 3.0, 0.02, 5.0], strict=True)) if norms is None else norms
    total = math.sqrt(sum(n * n for n in norms.values()))
    facts = {
        "loss": 1.0,
        "total_norm": total,
        "clipped_norm": total,
        "threshold": None,
        "scale": 1.0,
        "skip": False,
    }
    return Report(step=step, norms=norms, **facts | changes)


def bad(step):
    return report(step, dict.fromkeys(NAMES, 1.0) | {"net.0.bias": math.nan}, skip=True, scale=0.0)


def finding(step=0, fault=Fault.VANISHING, severity=Severity.WARNING, parameters=("net.0.weight",)):
    return Finding(fault, severity, step, parameters, 4.0, 3.0, "DepthTilt", measure="depth tilt")


def overview(**changes):
    return Overview(NAMES, NUMELS, **{"matrices": MATRICES} | changes)


def shown(view, newest, **facts):
    view.observe(newest)
    return view.build_record(newest, **facts)


def status_of(record):
    """Return the status that a record holds, or None."""
    texts = list(record.data.values())
    return FoundRecord.from_json(texts[0]).status if texts else None


def test_scalars_are_those_of_the_report():
    record = shown(overview(), report(scale=0.25), tilt=1.5, update_ratio=1e-3)
    assert record.scalars == pytest.approx(
        {
            "gradguard/grad_norm": math.sqrt(39.0004),
            "gradguard/total_norm_log10": math.log10(math.sqrt(39.0004)),
            "gradguard/worst_layer_rms_log10": -1.0,  # RMS 0.1 and 0.001: equally far from the median
            "gradguard/depth_tilt_decades": 1.5,
            "gradguard/update_ratio_log10": -3.0,
            "gradguard/clip_scale": 0.25,
            "gradguard/nonfinite_total": 0.0,
            "gradguard/clipped_total": 1.0,
            "gradguard/skipped_total": 0.0,
        }
    )


def test_what_a_clipper_did_is_that_of_the_same_step():
    clipped = report(scale=0.25, threshold=2.0, clipped_norm=1.5)
    view = overview()
    for step, scale in enumerate([1.0, 1.0, 0.5]):
        view.observe(report(step, scale=scale, threshold=2.0))
    view.observe(bad(3))  # not taken, so not counted
    record = shown(view, clipped)
    assert record.scalars["gradguard/clip_rate"] == 0.5
    assert record.scalars["gradguard/threshold_log10"] == pytest.approx(math.log10(2))
    assert record.scalars["gradguard/grad_norm_clipped"] == 1.5


def test_what_is_not_known_is_not_shown():
    scalars = shown(overview(), report()).scalars
    assert not {"gradguard/depth_tilt_decades", "gradguard/update_ratio_log10"} & scalars.keys()


def test_every_tag_has_a_note():
    view = overview(per_layer=True)
    record = shown(view, report(findings=(finding(),)), tilt=1.0, update_ratio=1e-3, final=True)
    tags = {*record.scalars, *record.texts, *record.images}
    assert all(record.notes[tag] for tag in tags)
    assert {"0_gradguard/heatmap", "gradguard/diagnosis"} < tags


def test_worst_layer_is_farthest_from_the_median():
    names, numels = ["a", "b", "c", "d"], [1, 1, 1, 1]
    norms = {"a": 1e-3, "b": 1e-9, "c": 1e-3, "d": 0.0}
    view = Overview(names, numels)
    assert shown(view, report(norms=norms)).scalars["gradguard/worst_layer_rms_log10"] == pytest.approx(-9)


@pytest.mark.parametrize("zero", [0.0, 1e-320])
def test_zero_gradients_have_a_finite_logarithm(zero):
    scalars = shown(overview(), report(norms=dict.fromkeys(NAMES, zero))).scalars
    assert all(math.isfinite(x) for x in scalars.values())


@pytest.mark.parametrize("norms", [{}, {"net.0.bias": 1.0}, {"unknown": 1.0}])
def test_missing_gradients_are_no_error(norms):
    view = overview(per_layer=True)
    assert shown(view, report(norms=norms), final=True).images["0_gradguard/heatmap"]()


@given(st.lists(st.booleans(), max_size=30))
def test_nonfinite_steps_are_counted(steps):
    view = overview()
    for step, is_bad in enumerate(steps):
        newest = bad(step) if is_bad else report(step)
        scalars = shown(view, newest).scalars
        assert scalars["gradguard/nonfinite_total"] == sum(steps[: step + 1])
        assert math.isnan(scalars["gradguard/total_norm_log10"]) == is_bad


def test_every_layer_is_a_row_and_shows_its_matrix():
    view = overview()
    view.observe(report())
    assert view._heatmap.names == ("net.0", "net.norm", "net.2")
    # The RMS of the matrix alone: 1 / sqrt(100), 0.02 / sqrt(400).
    assert view._heatmap.cells[0].tolist() == pytest.approx([-1, math.log10(1.5), -3])


@pytest.mark.parametrize(("blocks", "left_out"), [(ROWS // 2, 0), (ROWS // 2 + 1, ROWS // 2 + 1)])
def test_norms_and_embeddings_are_left_out_where_there_is_no_room_and_the_picture_says_so(blocks, left_out):
    names = [f"{i}.{kind}.weight" for i in range(blocks) for kind in ("norm", "linear")]
    view = Overview(names, [4] * len(names), matrices=["linear" in name for name in names])
    record = shown(view, report(norms=dict.fromkeys(names, 1.0)), final=True)
    assert len(view._heatmap.names) == 2 * blocks - left_out
    assert (view._heatmap.names[0] == "0.linear") == bool(left_out)
    assert status_of(record).left_out == left_out


def test_without_matrices_every_layer_is_a_row():
    view = overview(matrices=None)
    view.observe(report())
    assert view._heatmap.names == ("net.0", "net.norm", "net.2")
    assert view._heatmap.cells[0, 0] == pytest.approx(math.log10(math.sqrt(5 / 104)))


@pytest.mark.parametrize("step", [0, 1, 500, 12_345])
def test_a_nonfinite_bias_makes_its_layer_nonfinite_at_any_step(step):
    view = overview()
    for before in range(0, step, 7):
        view.observe(report(before))
    view.observe(bad(step))
    for after in range(step + 1, step + 3000):
        view.observe(report(after))
    assert np.isnan(view._heatmap.cells).any(axis=0).tolist() == [True, False, False]


def test_drawings_become_rare():
    view = overview()
    drawn = [step for step in range(10_000) if shown(view, report(step)).images]
    assert drawn[0] < 30
    gaps = np.diff(drawn)
    assert (gaps[1:] >= gaps[:-1]).all()
    assert len(drawn) < 20
    # But no picture is older than a third of the run.
    assert all(b <= 1.6 * a for a, b in pairwise(drawn))


def test_a_finding_is_drawn_soon_but_not_all_findings():
    view = overview()
    drawn = []
    for step in range(2000):
        found = (finding(step),) if step >= 1000 else ()
        if shown(view, report(step, findings=found)).images:
            drawn.append(step)
    assert 1000 in drawn
    assert len([step for step in drawn if step >= 1000]) <= 10


@pytest.mark.parametrize("severity", Severity)
def test_only_the_first_picture_after_a_warning_is_urgent(severity):
    view = overview()
    records = [
        shown(view, report(step, findings=(finding(step, severity=severity),) if step == 100 else ()))
        for step in range(300)
    ]
    urgent = [step for step, record in enumerate(records) if record.is_urgent]
    assert urgent == ([100] if severity >= Severity.WARNING else [])
    assert all(records[step].images for step in urgent)


#: A gradient's norm, or None where there is no gradient.
norms_or_none = (
    st.none() | st.sampled_from([0.0, math.nan, math.inf, 1e-38, 1e38]) | st.floats(0, 1e6, width=32)
)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), norms_or_none, st.booleans(), st.integers(0, 50)),
        min_size=1,
        max_size=12,
    )
)
def test_the_row_of_a_step_equals_brute_force(tensors):
    """A layer shows the RMS of its matrices, or of all it has; NaN if anything in it is not finite."""
    owners = sorted({owner for owner, *_ in tensors})
    tensors = sorted(tensors, key=lambda tensor: tensor[0])
    names = [f"{owner}.p{i}" for i, (owner, *_) in enumerate(tensors)]
    norms = {name: norm for name, (_, norm, *_) in zip(names, tensors, strict=True) if norm is not None}
    view = Overview(names, [t[3] for t in tensors], matrices=[t[2] for t in tensors])
    total = math.nan if any(not math.isfinite(x) for x in norms.values()) else 1.0
    record = shown(view, report(0, norms, total_norm=total, skip=math.isnan(total)))
    (((_, row),),) = record.rows.values()
    expected = []
    for owner in owners:
        own = [(name, *t[1:]) for name, t in zip(names, tensors, strict=True) if t[0] == owner]
        measured = [t for t in own if t[2]] or own
        seen = [(norm, numel) for _, norm, _, numel in measured if norm is not None]
        if any(norm is not None and not math.isfinite(norm) for _, norm, *_ in own):
            expected.append(math.nan)
        elif not seen:
            expected.append(-math.inf)
        else:
            rms = math.hypot(*(norm for norm, _ in seen)) / math.sqrt(max(1, sum(n for _, n in seen)))
            expected.append(math.log10(max(rms, 1.2e-38)))
    assert row[1:] == pytest.approx(expected, nan_ok=True)


def test_the_final_record_has_a_picture():
    view = overview()
    view.observe(report())
    assert view.build_record(report(), final=True).images["0_gradguard/heatmap"]().startswith(b"\x89PNG")


def test_without_a_step_nothing_is_drawn():
    assert not overview().build_record(report(), final=True).images


def test_picture_shows_the_step_it_was_asked_at():
    view = overview()
    view.observe(report())
    draw = view.build_record(report(), final=True).images["0_gradguard/heatmap"]
    before = draw()
    for step in range(1, 300):
        view.observe(bad(step))
    assert draw() == before


def test_text_is_cumulative_and_written_when_something_is_new():
    view = overview()
    assert not shown(view, report(0)).texts
    first = shown(view, report(1, findings=(finding(1),))).texts["gradguard/diagnosis"]
    assert "**vanishing**" in first
    assert "`net.0.weight`" in first
    assert not shown(view, report(2)).texts
    view.add_diagnosis("## Why")
    second = shown(view, report(3, findings=(finding(3, Fault.SPIKE),))).texts["gradguard/diagnosis"]
    assert second.index("## Why") < second.index("**spike**") < second.index("**vanishing**")


def test_text_does_not_grow_without_end():
    view = overview()
    for step in range(2000):
        view.observe(report(step, findings=(finding(step, parameters=tuple(NAMES)),)))
        view.add_diagnosis("why" * 100)
    text = view.build_record(report(2000)).texts["gradguard/diagnosis"]
    assert len(text) < 20_000
    assert "since step 1,999." in text


def test_rows_are_kept_with_their_own_steps_until_they_are_written():
    view = overview()
    for newest in (report(0), report(1, scale=0.5), bad(2)):
        view.observe(newest)
    record = view.build_record(report(2))
    ((tag, rows),) = record.rows.items()
    assert tag == "gradguard/layer_rms_log10"
    assert record.columns[tag] == ["mark", "net.0", "net.norm", "net.2"]
    assert [step for step, _ in rows] == [0, 1, 2]
    assert [row[0] for _, row in rows] == [0, 1, 2]
    assert rows[0][1][1:] == pytest.approx([-1, math.log10(1.5), -3])
    assert math.isnan(rows[2][1][1])
    assert not view.build_record(report(2)).rows


@pytest.mark.parametrize("make", [report, bad, lambda step: report(step, scale=0.5)])
def test_rows_do_not_grow_with_the_run(make):
    view = overview()
    for step in range(20_000):
        view.observe(make(step))
    # 128, then half as many for each doubling; and again for what was done, and for what is not finite.
    assert len(view.build_record(report(20_000)).rows["gradguard/layer_rms_log10"]) <= 3 * (128 + 64 * 8)


def test_groups_keep_optimizers_apart():
    first = shown(overview(per_layer=True), report(), final=True)
    second = shown(overview(per_layer=True, group="gradguard_1"), report(), final=True)
    assert not {*first.scalars, *first.images} & {*second.scalars, *second.images}


def test_per_layer_scalars_have_the_full_names():
    scalars = shown(overview(per_layer=True), report()).scalars
    assert {tag for tag in scalars if "_rms_log10/" in tag} == {
        f"gradguard_rms_log10/{name}" for name in NAMES
    }


def test_there_are_at_most_twelve_scalars_by_default():
    view = overview()
    view.show_clipping([ClipSpan(0, 0, ("spike",))])
    record = shown(view, report(threshold=2.0, scale=0.5), tilt=1.0, update_ratio=1e-3)
    assert len(record.scalars) == 12


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 40))
def test_resumes_as_if_it_had_not_stopped(steps, cut):
    whole, before, after = overview(), overview(), overview()
    for step, is_bad in enumerate(steps):
        found = (finding(step),) if step % 7 == 3 else ()
        newest = bad(step) if is_bad else report(step, findings=found, scale=0.5 if step % 3 else 1.0)
        whole.observe(newest)
        if step == cut:
            after.load_state_dict(before.state_dict())
        (before if step < cut else after).observe(newest)
    if len(steps) > cut:
        np.testing.assert_equal(after.state_dict(), whole.state_dict())


def test_state_is_plain(tmp_path):
    view = overview()
    view.observe(bad(0))
    view.observe(report(1, findings=(finding(),)))
    torch.save(view.state_dict(), tmp_path / "state.pt")
    np.testing.assert_equal(torch.load(tmp_path / "state.pt", weights_only=True), view.state_dict())


def test_a_clipper_is_shown_on_once_it_has_clipped_and_is_no_longer_in_force():
    view = overview()
    tags = {"gradguard/clip_rate", "gradguard/grad_norm_clipped"}
    assert not tags & shown(view, report(0)).scalars.keys()
    view.observe(report(1, threshold=2.0, clipped_norm=2.0, scale=0.5))
    view.show_clipping([ClipSpan(1, 1, ("spike",))])
    scalars = shown(view, report(2)).scalars
    assert tags <= scalars.keys()
    assert "gradguard/threshold_log10" not in scalars
    assert scalars["gradguard/clip_rate"] == pytest.approx(1 / 3)


def test_marks_show_what_stands_out():
    """Every clipped step where clipping is the exception; where it is the rule, those cut to less than half."""
    rare, often = overview(), overview()
    for step in range(40):
        rare.observe(report(step, scale=0.9 if step in (7, 30) else 1.0))
        often.observe(report(step, scale=0.3 if step in (20, 30) else 0.9))
    marked = []
    for view in (rare, often):
        (rows,) = view.build_record(report(39)).rows.values()
        marked.append([step for step, row in rows if row[0] == CLIPPED])
    assert marked[0] == [7, 30]
    assert marked[1] == [0, 1, 2, 3, 4, 20, 30]


def test_spans_of_clipping_are_shown_as_text_and_for_the_report():
    view = overview()
    view.show_clipping([ClipSpan(3, 9, ("exploding",))])
    record = shown(view, report(10))
    assert "from step 3 to 9 because of exploding" in record.texts["gradguard/diagnosis"]
    assert '"clip_spans":[[3,9,["exploding"]]]' in record.data["gradguard/findings"]


def test_the_status_is_logged_at_first_where_it_changes_and_at_the_end():
    view, logged = overview(), {}
    for step in range(300):
        lasting = {"vanishing"} if 100 <= step < 200 else set()
        found = (finding(step),) if step == 100 else ()
        view.observe(report(step, findings=found), lasting)
        record = view.build_record(report(step))
        if status := status_of(record):
            logged[step] = status
    assert {0, 100, 200} <= logged.keys()
    assert len(logged) < 20
    assert [logged[step].courses[0].lasts for step in (100, 200)] == [True, False]
    assert logged[200].courses[0].until == 200
    last = status_of(view.build_record(report(299), final=True, end=RunEnd(End.FINISHED, 300)))
    assert (last.end.how, last.steps) == (End.FINISHED, 300)
    assert verdict_of(last).level == "protected"


def test_a_resumed_run_has_not_ended_and_counts_on():
    before, after = overview(), overview()
    before.observe(bad(0), {"nonfinite"})
    before.build_record(bad(0), final=True, end=RunEnd(End.INTERRUPTED, 1))
    after.load_state_dict(before.state_dict())
    after.observe(report(1), set())
    status = status_of(after.build_record(report(1)))
    assert (status.end, status.steps, status.nonfinite) == (None, 2, 1)


def test_the_state_of_an_older_version_is_continued():
    before, after = overview(), overview()
    before.observe(bad(0))
    state = before.state_dict()
    del state["status"]
    after.load_state_dict(state)
    assert shown(after, report(1)).scalars["gradguard/skipped_total"] == 1


def test_the_picture_changes_with_the_verdict():
    view = overview()
    view.observe(report())
    drawn = [
        view.build_record(report(), final=True, end=end).images["0_gradguard/heatmap"]()
        for end in (None, RunEnd(End.FINISHED, 1), RunEnd(End.HALTED, 0, "vanishing"))
    ]
    assert len(set(drawn)) == 3
