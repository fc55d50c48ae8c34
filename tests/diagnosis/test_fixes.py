"""Fixes run, come once each, and fit the training."""

import ast
import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.fixes import CLIP, find_fixes, round_down
from lightning_gradguard.introspection.autograd_graph import GraphSummary
from lightning_gradguard.introspection.operations import RISKY
from lightning_gradguard.results import Fault, Finding, Severity

CAUSES = list(Cause)


def case_with(fault=Fault.VANISHING, rank=2, **known):
    facts = {
        "finding": Finding(fault, Severity.CRITICAL, 30, ("0.weight",), 5.0, 3.0, "Detector"),
        "names": ("0.weight", "0.bias", "2.weight"),
        "shapes": ((8,) * rank, (8,), (8,) * rank),
        "gradients_log10": (-9.0, -9.0, -1.0),
        "weight_norms": (3.0, 40.0, 3.0),
        "update_ratios": (math.nan, math.nan, math.nan),
        "optimizer": "Adam",
        "learning_rates": (0.01,),
        "defaults": {"eps": 1e-8, "momentum": 0.99},
    }
    return DiagnosticContext(**{**facts, **known})


def anatomy_with(**known):
    return GraphSummary(names=("0.weight", "0.bias", "2.weight"), order=(0, 1, 2), nodes=9, **known)


CASES = [
    case_with(fault, rank, graph_summary=graph_summary)
    for fault, rank, graph_summary in itertools.product(
        (Fault.VANISHING, Fault.EXPLODING, Fault.NONFINITE),
        (2, 3, 4, 5),
        (
            None,
            anatomy_with(kinds={"0.weight": {"tanh": 3, "product": 4}}, loss_ops=dict.fromkeys(RISKY, 1)),
            anatomy_with(kinds={"0.weight": {"relu": 19, "product": 20}}, loss_ops={"Log": 1, "Softmax": 1}),
            anatomy_with(skips=True, recurrent=frozenset({"2.weight"}), loss_ops={"Log": 1, "Sigmoid": 1}),
        ),
    )
]


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_has_a_fix_that_parses_and_fits_on_a_line(cause):
    for case in CASES:
        remedies = find_fixes(case, [cause])
        assert remedies
        for remedy in remedies:
            ast.parse(remedy.how)
            assert len(remedy.how) <= 98
            assert len(remedy.name) <= 70
            assert "nan" not in remedy.name
            assert not remedy.tried


@given(
    causes=st.lists(st.sampled_from(CAUSES), unique=True, min_size=1, max_size=4), case=st.sampled_from(CASES)
)
def test_fixes_are_few_and_distinct_and_those_of_the_likeliest_cause_come_first(causes, case):
    remedies = find_fixes(case, causes)
    assert len(remedies) <= 6
    assert len({remedy.name for remedy in remedies}) == len(remedies)
    alone = find_fixes(case, causes[:1])
    assert remedies[: len(alone)] == alone


@pytest.mark.parametrize(
    ("rank", "module", "batch"),
    [(2, nn.Linear, (4, 8)), (3, nn.Conv1d, (4, 8, 9)), (4, nn.Conv2d, (4, 8, 9, 9))],
)
def test_normalization_fits_the_kind_of_layer(rank, module, batch):
    """The block of the fix accepts the layer's output."""
    layer = module(8, 8) if rank == 2 else module(8, 8, 3)
    remedies = find_fixes(case_with(rank=rank), [Cause.SATURATING_ACTIVATION])
    blocks = [remedy.how for remedy in remedies if remedy.how.startswith("block")]
    assert len(blocks) == 2
    for how in blocks:
        scope = {"nn": nn, "layer": layer, "activation": nn.Tanh(), "width": 8, "channels": 8}
        exec(how, scope)
        assert scope["block"](torch.randn(batch)).shape[1] == 8


def test_what_the_model_already_has_is_no_fix():
    skipping = find_fixes(case_with(graph_summary=anatomy_with(skips=True)), [Cause.TOO_DEEP])
    assert not any("residual" in remedy.name for remedy in skipping)
    kinds = {"0.weight": {"product": 2, "normalisation": 2}}
    normalised = find_fixes(case_with(graph_summary=anatomy_with(kinds=kinds)), [Cause.TOO_DEEP])
    assert not any("Normalization" in remedy.name for remedy in normalised)
    clipping = case_with(Fault.SPIKE, clipper="SpikeClip()")
    assert CLIP not in find_fixes(clipping, [Cause.OUTLIER_BATCH])
    assert CLIP in find_fixes(dataclasses.replace(clipping, clipper=""), [Cause.OUTLIER_BATCH])


@pytest.mark.parametrize(("rows", "gated"), [(8, False), (24, True), (32, True)])
def test_gates_are_no_fix_for_a_gated_model(rows, gated):
    graph_summary = anatomy_with(recurrent=frozenset({"2.weight"}))
    case = case_with(shapes=((8, 8), (8,), (rows, 8)), graph_summary=graph_summary)
    names = [remedy.name for remedy in find_fixes(case, [Cause.RECURRENCE])]
    assert ("LSTM or GRU" in names) != gated


@given(log=st.floats(-28, -1), rate=st.floats(1e-6, 1.0))
def test_epsilon_is_set_below_every_gradient(log, rate):
    case = case_with(gradients_log10=(log, -1.0, -1.0), learning_rates=(rate,))
    parameter = nn.Parameter(torch.ones(1))
    scope = {"torch": torch, "model": nn.ParameterList([parameter])}
    exec(find_fixes(case, [Cause.OPTIMIZER_EPSILON])[0].how, scope)
    settings = scope["optimizer"].defaults
    assert settings["eps"] < 10 ** (case.gradient_rms_log10(0) - 1)
    assert 1e-30 <= settings["eps"] <= 1e-8
    assert settings["lr"] == pytest.approx(rate, rel=1e-2)


@given(ratio=st.floats(0.11, 100), rate=st.floats(1e-6, 1e3))
def test_the_learning_rate_is_lowered_by_the_measured_factor_and_at_least_by_ten(ratio, rate):
    case = case_with(
        Fault.EXPLODING, optimizer="SGD", update_ratios=(ratio, 999.0, 0.0), learning_rates=(rate,)
    )
    scope = {}
    exec(find_fixes(case, [Cause.LEARNING_RATE_TOO_HIGH])[0].how, scope)
    factor = max(ratio / 0.1, 10)
    assert 0.4 * rate / factor <= scope["lr"] <= rate / factor * (1 + 1e-2)


def test_an_unbounded_ratio_divides_the_rate_by_at_most_1000():
    case = case_with(Fault.EXPLODING, optimizer="SGD", update_ratios=(1e12, 0.0, 0.0), learning_rates=(5.0,))
    scope = {}
    exec(find_fixes(case, [Cause.LEARNING_RATE_TOO_HIGH])[0].how, scope)
    assert scope["lr"] == pytest.approx(0.005)


@given(value=st.floats(1e-30, 1e30))
def test_round_down_has_one_digit_and_is_never_larger(value):
    rounded = round_down(value)
    assert value / 2 < rounded <= value * (1 + 1e-6)
    assert float(f"{rounded:.0e}") == rounded


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_round_down_returns_zero_and_infinity_unchanged(value):
    assert round_down(value) == value
