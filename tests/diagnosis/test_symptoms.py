"""Symptoms say what was measured, nothing else."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.symptoms import find_symptoms
from lightning_gradguard.introspection.autograd_graph import GraphSummary
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


def test_the_value_that_the_finding_rests_on_comes_first():
    assert (
        find_symptoms(case_with())[0] == "Depth tilt in decades: 8.2 (limit 3; a decade is a factor of ten)."
    )
    bare = Finding(Fault.SPIKE, Severity.CRITICAL, 3, (), 7.0, 6.0, "Spike")
    assert find_symptoms(case_with(finding=bare))[0] == "Spike: 7 (limit 6)."


@pytest.mark.parametrize(
    ("start", "now", "word"),
    [
        (2.31, 2.30, "has plateaued"),
        (2.31, 2.0, "is still falling"),
        (2.31, 9.0, "has risen"),
        (-1.0, -0.95, "has plateaued"),
    ],
)
def test_the_trend_of_the_loss(start, now, word):
    (sentence,) = [s for s in find_symptoms(case_with(loss_start=start, loss_now=now)) if "loss" in s]
    assert sentence == f"The loss {word}: from {start:.3g} to {now:.3g} in 80 steps."


@given(log=st.floats(-1e6, 1e6), start=st.floats(0.1, 10), part=st.floats(0, 3))
def test_the_scale_of_the_loss_does_not_change_its_trend(log, start, part):
    factor = 10.0 ** max(min(log, 200), -200)
    plain, scaled = (
        find_symptoms(case_with(loss_start=start * f, loss_now=start * part * f)) for f in (1.0, factor)
    )
    assert plain[1].split(":")[0] == scaled[1].split(":")[0]


def test_a_nonfinite_loss():
    assert any(
        s == "The loss is NaN or Inf. Before, it went from 2.31 to 1."
        for s in find_symptoms(case_with(loss_last=math.nan))
    )
    unknown = case_with(loss_last=math.inf, loss_now=math.nan)
    assert "The loss is NaN or Inf." in find_symptoms(unknown)
    without = case_with(loss_last=math.nan, loss_start=math.nan, loss_now=math.nan, has_loss=False)
    assert not any("loss" in sign for sign in find_symptoms(without))


def test_gradients_over_depth():
    case = case_with(gradients_log10=(-10.9208, -5.0, math.log10(3.4e-3)))
    assert any(
        s == "From the last layer to the first, gradients shrink by a factor of 10^8.5: "
        "norm 0.0034 in `net.2.weight`, 1.2e-11 in `net.0.weight`."
        for s in find_symptoms(case)
    )
    flipped = dataclasses.replace(case, gradients_log10=case.gradients_log10[::-1])
    assert any("gradients grow by a factor of 10^8.5" in s for s in find_symptoms(flipped))
    assert not any("factor of 10^" in s for s in find_symptoms(case_with()))


def test_the_first_gradient_in_backward_order_is_named():
    case = case_with(Fault.NONFINITE, gradients_log10=(math.nan, math.inf, -1.0))
    assert any(
        "2 of 3 tensors have NaN or Inf gradients" in s and "`net.1.weight` is the first" in s
        for s in find_symptoms(case)
    )


def test_zero_gradients():
    case = case_with(gradients_log10=(-math.inf, -2.0, -2.0))
    assert "1 of 3 layers gets a gradient of exactly zero, or none: `net.0.weight`." in find_symptoms(case)


def test_weights_that_do_not_change_or_change_too_much():
    assert any(
        "hardly change: a step changes the median layer by 1e-07% of its size" in s
        for s in find_symptoms(case_with(update_ratios=(1e-9,) * 3))
    )
    leaping = find_symptoms(case_with(update_ratios=(1e-3, 0.5, 1e-3)))
    assert "A step changes `net.1.weight` by up to 50% of its size, where 0.1% is typical." in leaping
    assert any(
        "`net.0.weight` by up to 12 times its size" in s
        for s in find_symptoms(case_with(update_ratios=(12.0, 1e-3, 1e-3)))
    )
    unknown = find_symptoms(case_with(update_ratios=(math.nan,) * 3))
    assert not any("weights" in symptom or "A step" in symptom for symptom in unknown)
    assert any(
        "`net.2.weight` are NaN or Inf" in s
        for s in find_symptoms(case_with(weight_norms=(1.0, 1.0, math.inf)))
    )


def test_other_faults_are_named_once():
    others = tuple(Finding(Fault.SPIKE, Severity.INFO, step, (), 7.0, 6.0, "Spike") for step in (12, 14))
    case = case_with(findings=others)
    assert "Also found: spike (since step 12)." in find_symptoms(case)
    assert not any(
        "Also" in sign for sign in find_symptoms(dataclasses.replace(case, findings=(case.finding,)))
    )


def test_nonfinite_gradients_need_no_value_and_limit():
    """Other sentences count the tensors and describe the loss."""
    finding = Finding(Fault.NONFINITE, Severity.CRITICAL, 3, (), 2.0, 0.0, "NonFinite", measure="bad tensors")
    case = case_with(finding=finding, gradients_log10=(math.nan, math.inf, -1.0))
    assert not any("limit" in symptom for symptom in find_symptoms(case))
    unknown = DiagnosticContext(finding, has_loss=False)
    assert find_symptoms(unknown)[0] == "Bad tensors: 2 (limit 0)."


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (None, "graph was not seen"),
        (GraphSummary(), "graph was not seen"),
        (GraphSummary(nodes=9, opaque=True), "could not be read; of these"),
        (GraphSummary(nodes=9, hidden=("MyFunction",)), "could not be read (`MyFunction`)"),
        (GraphSummary(nodes=9), ""),
    ],
)
def test_it_is_said_if_the_graph_was_not_seen(graph, words):
    sentences = [s for s in find_symptoms(case_with(graph_summary=graph)) if "autograd graph" in s]
    assert len(sentences) == bool(words)
    assert all(words in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("detector", "limit", "explained"), [("TimeTilt", 6.0, 1), ("Exploding", -1.8, 1), ("Exploding", 3.0, 0)]
)
def test_decades_are_explained_where_the_value_is_in_decades(detector, limit, explained):
    finding = Finding(Fault.EXPLODING, Severity.CRITICAL, 3, (), 7.0, limit, detector)
    assert find_symptoms(case_with(finding=finding))[0].count("a decade is a factor of ten") == explained


def test_the_trend_of_the_loss_needs_five_steps_when_a_step_is_not_finite():
    early = case_with(Fault.NONFINITE, steps=1, loss_start=5.13, loss_now=5.13, loss_last=5.13)
    assert "The loss is finite: 5.13." in find_symptoms(early)
    assert not any("plateaued" in symptom for symptom in find_symptoms(early))


def test_a_custom_fault_has_symptoms():
    finding = Finding(
        Fault.custom("mixed_up"),
        Severity.CRITICAL,
        3,
        (),
        0.9,
        0.5,
        "MixedUp",
        measure="share of mixed-up rows",
    )
    assert find_symptoms(case_with(finding=finding))[:2] == (
        "Share of mixed-up rows: 0.9 (limit 0.5).",
        "The loss is still falling: from 2.31 to 1 in 80 steps.",
    )
