"""Signs are sentences of what was measured, and say nothing that was not."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.symptoms import find_symptoms
from lightning_gradguard.results import Fault, Finding, Severity


def case_with(fault=Fault.VANISHING, **known):
    facts = {
        "finding": Finding(
            fault, Severity.CRITICAL, 30, (), 8.2, 3.0, "DepthTilt", measure="depth tilt in decades"
        ),
        "names": ("net.0.weight", "net.1.weight", "net.2.weight"),
        "shapes": ((8, 8), (8, 8), (8, 8)),
        "gradients_log10": (-2.0, -2.0, -2.0),
        "weight_norms": (3.0, 3.0, 3.0),
        "update_ratios": (1e-3, 1e-3, 1e-3),
        "loss_start": 2.31,
        "loss_now": 1.0,
        "loss_last": 1.0,
        "steps": 80,
    }
    return DiagnosticContext(**{**facts, **known})


def test_the_number_of_the_verdict_leads():
    assert find_symptoms(case_with())[0] == "Depth tilt in decades: 8.2; the limit is 3."
    bare = Finding(Fault.SPIKE, Severity.CRITICAL, 3, (), 7.0, 6.0, "Spike")
    assert find_symptoms(case_with(finding=bare))[0].startswith("Spike: 7")


@pytest.mark.parametrize(
    ("start", "now", "word"),
    [
        (2.31, 2.30, "stands still"),
        (2.31, 2.0, "still falls"),
        (2.31, 9.0, "rises"),
        (-1.0, -0.95, "stands still"),
    ],
)
def test_the_course_of_the_loss(start, now, word):
    (sentence,) = [s for s in find_symptoms(case_with(loss_start=start, loss_now=now)) if "loss" in s]
    assert sentence == f"The loss {word}: from {start:.3g} to {now:.3g} in 80 steps."


@given(log=st.floats(-1e6, 1e6), start=st.floats(0.1, 10), part=st.floats(0, 3))
def test_the_scale_of_the_loss_changes_no_word(log, start, part):
    factor = 10.0 ** max(min(log, 200), -200)
    plain, scaled = (
        find_symptoms(case_with(loss_start=start * f, loss_now=start * part * f)) for f in (1.0, factor)
    )
    assert plain[1].split(":")[0] == scaled[1].split(":")[0]


def test_a_loss_that_is_not_finite():
    assert any(
        s == "The loss is not finite; it had run from 2.31 to 1."
        for s in find_symptoms(case_with(loss_last=math.nan))
    )
    unknown = case_with(loss_last=math.inf, loss_now=math.nan)
    assert "The loss is not finite." in find_symptoms(unknown)
    without = case_with(loss_last=math.nan, loss_start=math.nan, loss_now=math.nan, has_loss=False)
    assert not any("loss" in sign for sign in find_symptoms(without))


def test_gradients_over_depth():
    case = case_with(gradients_log10=(-10.9208, -5.0, math.log10(3.4e-3)))
    assert any(
        s == "Early layers' gradients are 8.5 decades (powers of ten) below late ones': "
        "norm 1.2e-11 in `net.0.weight` against 0.0034 in `net.2.weight`."
        for s in find_symptoms(case)
    )
    flipped = dataclasses.replace(case, gradients_log10=case.gradients_log10[::-1])
    assert any("8.5 decades (powers of ten) above" in s for s in find_symptoms(flipped))
    assert not any("decades (" in s for s in find_symptoms(case_with()))


def test_the_first_gradient_in_backward_order_is_named():
    case = case_with(Fault.NONFINITE, gradients_log10=(math.nan, math.inf, -1.0))
    assert any(
        "2 of 3 gradients are not finite" in s and "`net.1.weight` is the first" in s
        for s in find_symptoms(case)
    )


def test_gradients_of_zero():
    case = case_with(gradients_log10=(-math.inf, -2.0, -2.0))
    assert "1 of 3 layers got no gradient, or one of zero: `net.0.weight`." in find_symptoms(case)


def test_weights_that_stand_or_leap():
    assert any(
        "hardly change: update ratio 1e-09" in s for s in find_symptoms(case_with(update_ratios=(1e-9,) * 3))
    )
    leaping = find_symptoms(case_with(update_ratios=(1e-3, 0.5, 1e-3)))
    assert (
        "The weights change by up to 50 % of their size a step (`net.1.weight`), where 0.1 % is usual."
        in leaping
    )
    assert any(
        "by up to 12 times their size" in s
        for s in find_symptoms(case_with(update_ratios=(12.0, 1e-3, 1e-3)))
    )
    unknown = find_symptoms(case_with(update_ratios=(math.nan,) * 3))
    assert not any("weights" in sign for sign in unknown)
    assert any(
        "`net.2.weight` are not finite" in s
        for s in find_symptoms(case_with(weight_norms=(1.0, 1.0, math.inf)))
    )


def test_what_else_was_found_is_named_once():
    others = tuple(Finding(Fault.SPIKE, Severity.INFO, step, (), 7.0, 6.0, "Spike") for step in (12, 14))
    case = case_with(findings=others)
    assert find_symptoms(case)[-1] == "Also found: spike (step 12)."
    assert not any(
        "Also" in sign for sign in find_symptoms(dataclasses.replace(case, findings=(case.finding,)))
    )
