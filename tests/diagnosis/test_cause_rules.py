"""The rule of each cause, on plain numbers."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.diagnosis.causes import RULES, find_causes
from lightning_gradguard.diagnosis.context import CERTAIN, TOO_LARGE, TOO_SMALL, DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause
from lightning_gradguard.diagnosis.fixes import PROBLEMS, find_fixes
from lightning_gradguard.introspection.autograd_graph import GraphSummary
from lightning_gradguard.introspection.graph_problems import GraphProblem, Problem
from lightning_gradguard.results import Fault, Finding, Severity

NAMES = tuple(f"{i}.weight" for i in range(6))


def case_with(
    fault=Fault.VANISHING, *, value=5.0, kinds=None, gain=1.0, step=30, parameters=NAMES[:1], **known
):
    """Return the context of six healthy layers."""
    graph_summary = GraphSummary(
        names=NAMES,
        order=tuple(range(6)),
        kinds={NAMES[0]: kinds if kinds is not None else {"product": 6, "tanh": 5}},
        nodes=50,
        **known.pop("graph", {}),
    )
    facts = {
        "finding": Finding(fault, Severity.CRITICAL, step, parameters, value, 3.0, "Detector"),
        "names": NAMES,
        "shapes": ((16, 16),) * 6,
        "gradients_log10": (-2.0,) * 6,
        "weight_norms": (gain * 4.0,) * 6,
        "update_ratios": (1e-3,) * 6,
        "graph_summary": graph_summary,
        "tilt": 0.0,
        "loss_start": 2.0,
        "loss_now": 1.9,
        "loss_last": 1.9,
        "optimizer": "SGD",
        "learning_rates": (0.01,),
        "defaults": {"momentum": 0.0},
        "steps": 100,
        "dtypes": ("float32",),
    }
    return DiagnosticContext(**{**facts, **known})


def weights(case):
    """Return the weight of each cause's strongest evidence."""
    found = {cause: [evidence.weight for evidence in rule(case)] for cause, rule in RULES.items()}
    return {cause: max(weights) for cause, weights in found.items() if weights}


def test_each_cause_has_the_rule_of_its_name():
    shown_by_the_graph = {cause for cause, _ in PROBLEMS.values()}
    assert set(RULES) | shown_by_the_graph == set(Cause) - {Cause.UNKNOWN}
    assert all(rule.__name__ == cause.value for cause, rule in RULES.items())


@pytest.mark.parametrize(
    "fault",
    [f for f in Fault if f not in (Fault.DEAD, Fault.UNDERFLOW, Fault.SPIKE, Fault.VANISHING_IN_TIME)],
)
def test_a_healthy_context_has_no_cause(fault):
    assert find_causes(case_with(fault, value=0.0, steps=3))[0][0] in (
        Cause.UNKNOWN,
        Cause.LEARNING_RATE_TOO_LOW,
    )


@given(sigmoids=st.integers(1, 30), norms=st.integers(0, 40))
def test_sigmoids_weigh_what_their_slopes_cost(sigmoids, norms):
    case = case_with(kinds={"product": 6, "sigmoid": sigmoids, "normalisation": norms})
    expected = max(0, sigmoids - norms) * math.log10(4)
    assert weights(case)[Cause.SATURATING_ACTIVATION] == pytest.approx(expected)


def test_softmax_units_are_flat_and_attention_is_not_blamed_for_them():
    hidden = case_with(tilt=9.0, kinds={"product": 6, "attention": 5})
    assert find_causes(hidden)[0][0] == Cause.SATURATING_ACTIVATION
    assert Cause.BAD_INITIALIZATION not in weights(hidden)
    in_blocks = case_with(tilt=9.0, kinds={"product": 12, "attention": 2})
    assert Cause.SATURATING_ACTIVATION not in weights(in_blocks)


@pytest.mark.parametrize(
    ("above", "by_zero"), [(("Mul",), True), (("Mul", "Gelu"), False), (("Mul", "Softmax"), False)]
)
def test_a_factor_is_zero_only_if_no_smooth_activation_may_be_flat(above, by_zero):
    zero = case_with(
        Fault.DEAD,
        value=1.0,
        gradients_log10=(-math.inf,) * 5 + (-2.0,),
        graph={"above": {NAMES[4]: above}},
        parameters=NAMES[4:5],
    )
    assert (Cause.DETACHED_GRAPH in weights(zero)) == by_zero


@given(tilt=st.floats(0, 40), gain=st.floats(0.01, 1))
def test_flat_activations_weigh_what_the_weights_leave_unexplained(tilt, gain):
    case = case_with(tilt=tilt, gain=gain)
    assert weights(case)[Cause.SATURATING_ACTIVATION] == pytest.approx(
        max(0, tilt + 6 * math.log10(gain)), abs=1e-6
    )


@given(gain=st.floats(0.01, 100), fault=st.sampled_from(sorted(TOO_SMALL + TOO_LARGE)))
def test_gains_weigh_their_decades_times_the_layers_in_the_right_direction(gain, fault):
    found = weights(case_with(fault, gain=gain)).get(Cause.BAD_INITIALIZATION, 0.0)
    decades = math.log10(gain) * (1 if fault in TOO_LARGE else -1)
    least = 0.15 if fault in (Fault.VANISHING, *TOO_LARGE) else 0.6
    assert found == pytest.approx(6 * decades if decades > least + 1e-9 else 0.0, abs=1e-6)


def test_weights_that_were_ruined_before_the_first_step():
    case = case_with(Fault.NONFINITE, initial_weight_norms=(4.0, math.nan, 4.0, 4.0, 4.0, 4.0))
    cause, evidence = find_causes(case)[0]
    assert cause == Cause.BAD_INITIALIZATION
    assert "`1.weight` were NaN or Inf before the first step" in evidence
    later = case_with(Fault.NONFINITE, initial_weight_norms=(4.0,) * 6, weight_norms=(math.inf,) * 6)
    assert weights(later).get(Cause.BAD_INITIALIZATION) is None


@pytest.mark.parametrize("graph", [{"skips": True}, {"recurrent": frozenset({"0.weight"})}, {"opaque": True}])
def test_depth_is_blamed_only_without_skip_connections(graph):
    deep = {"product": 30, "relu": 29}
    assert Cause.TOO_DEEP in weights(case_with(kinds=deep))
    assert Cause.TOO_DEEP not in weights(case_with(kinds=deep, graph=graph))
    assert Cause.TOO_DEEP not in weights(case_with(kinds={**deep, "normalisation": 29}))
    assert Cause.TOO_DEEP not in weights(case_with(kinds={"product": 9, "relu": 8}))


@given(gain=st.floats(0.3, 3), steps=st.integers(4, 200))
def test_recurrences_weigh_their_gain_for_each_step(gain, steps):
    graph = {"recurrent": frozenset({"3.weight"}), "recurrences": steps}
    decades = math.log10(gain) * steps
    fading, growing = (
        weights(case_with(f, gain=gain, graph=graph)) for f in (Fault.VANISHING, Fault.EXPLODING)
    )
    assert fading.get(Cause.RECURRENCE, 0.0) == pytest.approx(max(0.0, -decades), abs=1e-6)
    assert growing.get(Cause.RECURRENCE, 0.0) == pytest.approx(max(0.0, decades), abs=1e-6)


def test_time_tilt_is_evidence_in_any_fault():
    assert weights(case_with(Fault.STALLED, time_tilt=9.0))[Cause.RECURRENCE] == 9.0
    assert Cause.RECURRENCE not in weights(case_with(Fault.STALLED, time_tilt=0.4))


@given(ratio=st.floats(1e-6, 1e4))
def test_oversized_updates_weigh_decades_above_a_hundredth(ratio):
    found = weights(case_with(Fault.EXPLODING, update_ratios=(1e-3,) * 5 + (ratio,)))
    expected = math.log10(ratio / 0.01) if ratio > 0.1 else None
    assert found.get(Cause.LEARNING_RATE_TOO_HIGH) == (None if expected is None else pytest.approx(expected))


def test_adam_with_a_rate_that_makes_its_first_steps_too_large():
    case = case_with(
        Fault.EXPLODING, optimizer="Adam", learning_rates=(0.3,), initial_weight_norms=(1.6,) * 6
    )
    cause, evidence = find_causes(case)[0]
    assert cause == Cause.LEARNING_RATE_TOO_HIGH
    assert "first steps of Adam change the median layer by 300% of its size, 30 times the" in evidence
    assert weights(dataclasses.replace(case, learning_rates=(1e-3,), initial_weight_norms=(4.0,) * 6)) == {}


@given(momentum=st.floats(0, 0.999))
def test_momentum_takes_its_part_from_the_learning_rate(momentum):
    case = case_with(Fault.EXPLODING, update_ratios=(5.0,) * 6, defaults={"momentum": momentum}, step=3)
    found = weights(case)
    left = math.log10(500) - max(0.0, math.log10(0.1 / (1 - momentum)))
    assert found[Cause.LEARNING_RATE_TOO_HIGH] == pytest.approx(left if left > 0 else 1.0)
    assert (Cause.MOMENTUM in found) == (momentum >= 0.95)


def test_momentum_is_blamed_once_its_velocity_has_built_up():
    case = case_with(Fault.EXPLODING, update_ratios=(5.0,) * 6, defaults={"momentum": 0.99}, step=40)
    found = find_causes(case)
    assert [cause for cause, _ in found[:2]] == [Cause.MOMENTUM, Cause.LEARNING_RATE_TOO_HIGH]


@given(eps=st.floats(1e-12, 1e6), log=st.floats(-12, 2))
def test_epsilon_weighs_the_decades_by_which_it_exceeds_the_gradient(eps, log):
    case = case_with(
        Fault.STALLED,
        optimizer="Adam",
        learning_rates=(1e-3,),
        defaults={"eps": eps},
        gradients_log10=(log,) * 6,
    )
    decades = math.log10(eps) - (log - math.log10(16))
    assert weights(case).get(Cause.OPTIMIZER_EPSILON, 0.0) == pytest.approx(max(0.0, decades), abs=1e-6)
    sgd = dataclasses.replace(case, optimizer="SGD")
    assert Cause.OPTIMIZER_EPSILON not in weights(sgd)
    vanishing = dataclasses.replace(case, finding=dataclasses.replace(case.finding, fault=Fault.VANISHING))
    assert weights(vanishing).get(Cause.OPTIMIZER_EPSILON, 0.0) <= 1.0


@pytest.mark.parametrize(
    ("grown", "found", "first"),
    [
        (2.0, False, Cause.LOSS_FUNCTION),
        (50.0, False, Cause.LEARNING_RATE_TOO_HIGH),
        (2.0, True, Cause.LEARNING_RATE_TOO_HIGH),
    ],
)
def test_the_learning_rate_is_blamed_if_the_loss_overflows_after_oversized_steps(grown, found, first):
    before = (Finding(Fault.EXPLODING, Severity.WARNING, 20, (), 5.0, 3.0, "Exploding"),) if found else ()
    case = case_with(
        Fault.NONFINITE,
        graph={"loss_ops": {"Exp": 1}},
        update_ratios=(0.5,) * 6,
        loss_now=grown,
        loss_last=math.inf,
        findings=before,
        bad_rows=(),
    )
    assert find_causes(case)[0][0] == first


def test_the_learning_rate_is_blamed_only_for_what_nothing_else_explains():
    wild = {"fault": Fault.EXPLODING, "update_ratios": (1e5,) * 6}
    plain = weights(case_with(**wild))[Cause.LEARNING_RATE_TOO_HIGH]
    heavy = case_with(**wild, initial_weight_norms=(40.0,) * 6)
    assert weights(heavy)[Cause.LEARNING_RATE_TOO_HIGH] == pytest.approx(plain - 6.0)
    assert find_causes(heavy)[0][0] == Cause.BAD_INITIALIZATION
    large = case_with(**wild, input_rms=100.0)
    assert weights(large)[Cause.LEARNING_RATE_TOO_HIGH] == pytest.approx(plain - 4.0)
    adam = dataclasses.replace(large, optimizer="Adam", learning_rates=(1e-3,))
    assert weights(adam)[Cause.LEARNING_RATE_TOO_HIGH] == pytest.approx(plain)


def test_a_sudden_nan_points_at_the_batch_unless_it_was_examined():
    unseen = case_with(Fault.NONFINITE, loss_last=math.nan, loss_now=math.nan)
    assert find_causes(unseen)[0][0] == Cause.BAD_DATA
    assert Cause.BAD_DATA not in weights(dataclasses.replace(unseen, bad_rows=()))
    assert Cause.BAD_DATA not in weights(dataclasses.replace(unseen, loss_last=1.0))


def test_bad_rows_are_proof():
    case = case_with(
        Fault.NONFINITE, graph={"loss_ops": {"Log": 1}}, loss_last=math.nan, bad_rows=tuple(range(20))
    )
    assert weights(case) == {Cause.BAD_DATA: CERTAIN}
    assert find_causes(case)[0][1].endswith("rows 0, 1, 2, 3, 4, 5, 6, 7 and 12 more.")


def test_a_nonfinite_batch_in_a_healthy_run_may_be_an_outlier():
    assert Cause.OUTLIER_BATCH in weights(case_with(Fault.NONFINITE, loss_last=math.nan))
    assert Cause.OUTLIER_BATCH not in weights(case_with(Fault.NONFINITE, loss_last=math.nan, loss_now=9.0))
    spike = weights(case_with(Fault.SPIKE, value=100.0))
    assert spike[Cause.OUTLIER_BATCH] == pytest.approx(3.0)


def test_low_precision():
    assert weights(case_with(Fault.UNDERFLOW, value=0.97, dtypes=("bfloat16",)))[Cause.LOW_PRECISION] == 10.0
    assert Cause.LOW_PRECISION in weights(case_with(Fault.NONFINITE, dtypes=("float16", "float32")))
    assert Cause.LOW_PRECISION not in weights(case_with(Fault.NONFINITE, dtypes=("bfloat16",)))


@pytest.mark.parametrize("operation", ["MseLoss", "Pow"])
def test_a_squared_loss_tells_the_scale_of_its_targets(operation):
    case = case_with(Fault.EXPLODING, graph={"loss_ops": {operation: 1}}, loss_start=1e8)
    assert weights(case)[Cause.TARGET_SCALE] == pytest.approx(4.0)
    assert Cause.TARGET_SCALE not in weights(dataclasses.replace(case, loss_start=50.0))
    assert Cause.TARGET_SCALE not in weights(case_with(Fault.EXPLODING, loss_start=1e8))
    seen = find_causes(dataclasses.replace(case, target_rms=1e4))
    assert seen[0][0] == Cause.TARGET_SCALE
    assert "RMS of 10000" in seen[0][1] or "RMS of 1e+04" in seen[0][1]
    # Targets of typical size: the outputs are large.
    assert find_causes(dataclasses.replace(case, target_rms=1.0))[0][0] == Cause.BAD_INITIALIZATION


def test_a_first_loss_that_only_large_outputs_give():
    graph = {"loss_ops": {"NllLoss": 1, "LogSoftmax": 1}}
    large = case_with(Fault.EXPLODING, graph=graph, loss_start=3000.0)
    assert weights(large)[Cause.BAD_INITIALIZATION] == pytest.approx(3.0)
    assert not weights(dataclasses.replace(large, loss_start=9.0))
    names = tuple(f"{i}.weight" for i in range(40))
    deep = dataclasses.replace(
        large,
        names=names,
        shapes=((16, 16),) * 40,
        gradients_log10=(-2.0,) * 40,
        weight_norms=(4.0,) * 40,
        update_ratios=(1e-3,) * 40,
    )
    assert find_causes(deep)[0][0] == Cause.TOO_DEEP


def test_weights_shrunk_by_decay_blame_the_decay():
    known = {"initial_weight_norms": (4.0,) * 6, "weight_norms": (0.1,) * 6, "tilt": 0.0}
    shrunk = case_with(
        Fault.OVERSIZED_UPDATE, defaults={"weight_decay": 1.0}, update_ratios=(0.2,) * 6, **known
    )
    ((cause, evidence),) = find_causes(shrunk)
    assert cause == Cause.WEIGHT_DECAY
    assert "2.5%" in evidence
    assert "weight decay of 1 is too strong" in evidence
    undecayed = dataclasses.replace(shrunk, defaults={"weight_decay": 0.0})
    assert find_causes(undecayed)[0][0] == Cause.LEARNING_RATE_TOO_HIGH


def test_units_that_died_while_weights_grew_were_killed_by_the_steps():
    born = case_with(Fault.DEAD, value=1.0, kinds={"product": 6, "relu": 5}, initial_weight_norms=(4.0,) * 6)
    assert find_causes(born)[0][0] == Cause.DEAD_ACTIVATION
    killed = dataclasses.replace(born, weight_norms=(12.0,) * 6)
    assert [cause for cause, _ in find_causes(killed)] == [
        Cause.LEARNING_RATE_TOO_HIGH,
        Cause.DEAD_ACTIVATION,
    ]
    signed = dataclasses.replace(born, weight_means=(0.2,) * 6)
    assert find_causes(signed)[0][0] == Cause.BAD_INITIALIZATION
    assert find_causes(dataclasses.replace(born, weight_means=(0.01,) * 6))[0][0] == Cause.DEAD_ACTIVATION


def test_a_path_through_rounding_has_no_slope():
    rounded = case_with(Fault.DEAD, value=1.0, kinds={"product": 6, "relu": 5, "step": 1})
    assert find_causes(rounded)[0][0] == Cause.DETACHED_GRAPH
    assert find_fixes(rounded, [Cause.DETACHED_GRAPH])[0].name == "Straight-through gradient"


def test_an_unbounded_loss_and_a_flat_one():
    falls = case_with(Fault.EXPLODING, loss_start=-1.0, loss_now=-1e6, update_ratios=(5.0,) * 6)
    assert find_causes(falls)[0][0] == Cause.LOSS_FUNCTION
    assert find_causes(dataclasses.replace(falls, loss_now=-50.0))[0][0] == Cause.LEARNING_RATE_TOO_HIGH
    graph = {"loss_ops": {"Softplus": 1, "Mean": 1, "Neg": 1}}
    flat = case_with(Fault.STALLED, graph=graph, loss_start=-1e-9, loss_now=-1e-9, update_ratios=(0.0,) * 6)
    assert find_causes(flat)[0][0] == Cause.LOSS_FUNCTION
    assert find_causes(dataclasses.replace(flat, loss_start=-0.5))[0][0] == Cause.LEARNING_RATE_TOO_LOW


def test_biases_that_move_activations_to_where_they_are_flat():
    shapes, norms = ((16, 16), (16,)) * 3, (4.0, 20.0) * 3
    shifted = case_with(kinds={"product": 6, "soft relu": 5}, shapes=shapes, weight_norms=norms, tilt=15.0)
    assert find_causes(shifted)[0][0] == Cause.SATURATING_ACTIVATION
    centred = dataclasses.replace(shifted, weight_norms=(4.0, 0.1) * 3)
    assert Cause.SATURATING_ACTIVATION not in weights(centred)


@pytest.mark.parametrize(("apart", "outlier"), [(0, True), (10, False)])
def test_an_outlier_batch_stalls_adagrad_for_good(apart, outlier):
    spike = Finding(Fault.SPIKE, Severity.WARNING, 30 - apart, NAMES[:1], 900.0, 20.0, "Spike")
    stalled = case_with(Fault.STALLED, findings=(spike,), optimizer="Adagrad", learning_rates=(0.02,))
    assert (find_causes(stalled)[0][0] == Cause.OUTLIER_BATCH) == outlier


def test_missing_parameters_are_blamed_only_if_they_are_affected():
    graph = {"missing": frozenset({"5.weight"})}
    assert Cause.DETACHED_GRAPH not in weights(case_with(graph=graph))
    assert weights(case_with(graph=graph, parameters=("5.weight",)))[Cause.DETACHED_GRAPH] == CERTAIN
    assert weights(case_with(Fault.DISCONNECTED, graph=graph))[Cause.DETACHED_GRAPH] == CERTAIN


def test_zero_gradients_although_a_path_leads_there():
    dead = case_with(
        Fault.STALLED, kinds={"product": 6, "relu": 5}, gradients_log10=(-math.inf,) * 5 + (-2.0,)
    )
    assert find_causes(dead)[0][0] == Cause.DEAD_ACTIVATION


@given(rms=st.floats(1e-4, 1e4))
def test_inputs_weigh_by_their_distance_from_one(rms):
    found = weights(case_with(Fault.EXPLODING, input_rms=rms)).get(Cause.UNNORMALIZED_INPUT, 0.0)
    decades = abs(math.log10(rms))
    assert found == pytest.approx(2 * decades if decades >= 0.7 else 0.0)


@given(st.data())
def test_causes_are_ranked_by_weight_and_few(data):
    case = case_with(
        data.draw(st.sampled_from(Fault)),
        value=data.draw(st.floats(0, 50)),
        gain=data.draw(st.floats(0, 100)),
        kinds=data.draw(
            st.dictionaries(
                st.sampled_from(["product", "sigmoid", "relu", "normalisation"]), st.integers(1, 40)
            )
        ),
        update_ratios=(data.draw(st.floats(0, 10)),) * 6,
        tilt=data.draw(st.floats(-20, 40)),
        input_rms=data.draw(st.floats(0, 1e5)),
        defaults={"momentum": data.draw(st.floats(0, 1)), "eps": data.draw(st.floats(0, 1e3))},
        optimizer=data.draw(st.sampled_from(["SGD", "Adam", ""])),
        bad_rows=data.draw(st.sampled_from([None, (), (1, 2)])),
    )
    causes, found = find_causes(case), weights(case)
    assert 1 <= len(causes) <= 4
    ranks = [found[cause] for cause, _ in causes if cause != Cause.UNKNOWN]
    assert ranks == sorted(ranks, reverse=True)
    assert all(evidence.endswith(".") and "nan" not in evidence for _, evidence in causes)


@pytest.mark.parametrize(
    ("operation", "rms", "start", "now", "blamed"),
    [
        ("Maximum", 1e5, 1.1e5, 1.1e5, True),
        ("Abs", 3e3, 2.5e3, 2.4e3, True),
        ("MseLoss", 1e4, 1e8, 1e8, True),
        ("SmoothL1Loss", 1e4, 8e3, 8e3, True),
        ("Maximum", 1e5, 1.1e5, 5e4, False),  # it learns
        ("MseLoss", 1e4, 3.0, 3.0, False),  # the loss is of targets that were scaled
        ("Abs", 1.0, 0.8, 0.8, False),
        ("Abs", None, 1e5, 1e5, False),
    ],
)
def test_targets_out_of_reach_explain_gradients_that_vanish(operation, rms, start, now, blamed):
    graph = {"loss_ops": {operation: 1}, "recurrent": frozenset(NAMES[:1])}
    case = case_with(graph=graph, target_rms=rms, loss_start=start, loss_now=now, tilt=3.2)
    assert (find_causes(case)[0][0] == Cause.TARGET_SCALE) == blamed


def test_a_softmax_that_starves_layers():
    kinds = {n: {"product": 3, **({"attention": 1} if i in (1, 2) else {})} for i, n in enumerate(NAMES)}
    graph = GraphSummary(names=NAMES, order=tuple(range(6)), kinds=kinds, nodes=50)
    for low, fault, named in ((-6.0, Fault.OVERSIZED_UPDATE, True), (-4.0, Fault.OVERSIZED_UPDATE, False)):
        case = case_with(fault, graph_summary=graph, gradients_log10=(-2.0, low, low, -2.0, -2.0, -2.0))
        causes = [cause for cause, _ in find_causes(case)]
        assert (causes[0] == Cause.SATURATING_ACTIVATION) == named
        assert ("0.5" in find_fixes(case, causes)[0].how) == named


def test_zero_factors_beside_other_layers():
    start = (4.0, 4.0, 0.0, 0.0, 4.0, 4.0)
    logs = (-2.0, -2.0, -math.inf, -math.inf, -2.0, -2.0)
    case = case_with(Fault.DEAD, weight_norms=start, initial_weight_norms=start, gradients_log10=logs)
    causes = [cause for cause, _ in find_causes(case)]
    assert causes[0] == Cause.BAD_INITIALIZATION
    assert "two factors" in find_fixes(case, causes)[0].name
    one = (4.0, 4.0, 0.0, 4.0, 4.0, 4.0)
    case = case_with(Fault.DEAD, weight_norms=one, initial_weight_norms=one, gradients_log10=logs)
    assert not case.zero_factors


@pytest.mark.parametrize(
    ("loss", "operation", "named"), [(9e3, "Abs", True), (9e7, "MseLoss", True), (10.0, "Abs", False)]
)
def test_targets_beside_which_the_outputs_are_nothing(loss, operation, named):
    case = case_with(
        Fault.VANISHING_IN_TIME,
        target_rms=1e4,
        loss_start=loss,
        loss_now=loss,
        graph={"loss_ops": {operation: 1}},
    )
    assert (find_causes(case)[0][0] == Cause.TARGET_SCALE) == named


def test_inputs_of_zero_and_rows_far_larger_than_others():
    unfed = {"gradients_log10": (-math.inf, -2.0, -2.0, -2.0, -2.0, -2.0)}
    assert find_causes(case_with(Fault.DEAD, input_rms=0.0, **unfed))[0][0] == Cause.BAD_DATA
    # The batch is a placeholder: the first layer gets a gradient, so its input is something else.
    assert Cause.BAD_DATA not in weights(case_with(Fault.DEAD, input_rms=0.0))
    assert Cause.OUTLIER_BATCH in weights(case_with(Fault.EXPLODING, input_rms=1.0, outlying_rows=200.0))
    assert Cause.OUTLIER_BATCH not in weights(case_with(Fault.EXPLODING, input_rms=1.0, outlying_rows=3.0))


def test_a_doubtful_mistake_yields_to_stronger_evidence():
    doubtful = GraphProblem(Problem.STALE_OPTIMIZER, "Some tensors are in no optimizer.", (), certain=False)
    logs = (-math.inf, -2.0, -2.0, -2.0, -2.0, -2.0)
    case = case_with(Fault.DEAD, input_rms=0.0, gradients_log10=logs, graph={"problems": (doubtful,)})
    assert find_causes(case)[0][0] == Cause.BAD_DATA
    assert find_causes(case_with(Fault.DEAD, graph={"problems": (doubtful,)}))[0][0] == Cause.STALE_OPTIMIZER


RESIDUAL = {"skips": True, "normalizations": 8}


def test_a_single_tanh_beside_skip_connections_explains_no_loss_over_depth():
    kinds = {"product": 6, "tanh": 1}
    assert weights(case_with(kinds=kinds, tilt=4.0))[Cause.SATURATING_ACTIVATION] == pytest.approx(4.0)
    found = weights(case_with(kinds=kinds, tilt=4.0, graph=RESIDUAL))
    assert found.get(Cause.SATURATING_ACTIVATION, 0.0) < 0.5


@pytest.mark.parametrize(("post", "blamed"), [(8, True), (5, False), (1, False)])
def test_deep_post_norm_is_blamed_and_gets_pre_norm(post, blamed):
    case = case_with(kinds={"product": 6}, tilt=4.0, graph={**RESIDUAL, "post_norms": post})
    causes = find_causes(case)
    assert (causes[0][0] == Cause.NORMALIZATION) == blamed
    if blamed:
        assert "post-norm" in causes[0][1]
        assert "pre-norm" in find_fixes(case, [Cause.NORMALIZATION])[0].name


@pytest.mark.parametrize(
    ("lost", "ratio", "blamed"), [(3.0, 0.3, True), (1.0, 0.3, False), (3.0, 1e-3, False)]
)
def test_steps_that_made_gradients_vanish_are_blamed_before_the_start(lost, ratio, blamed):
    case = case_with(tilt=4.0, lost_since_start=lost, update_ratios=(ratio,) * 6)
    causes = [cause for cause, _ in find_causes(case)]
    assert (causes[0] == Cause.LEARNING_RATE_TOO_HIGH) == blamed
    if blamed:
        assert "from 0.01 to 0.001" in find_fixes(case, causes)[0].name


@pytest.mark.parametrize(("padding", "first"), [(0.8, True), (0.1, False)])
def test_a_padded_sequence_is_read_at_its_end(padding, first):
    case = case_with(Fault.VANISHING_IN_TIME, value=9.0, padding=padding, kinds={"recurrent": 1})
    (cause, text), *_ = find_causes(case)
    assert cause == Cause.RECURRENCE
    assert ("padding" in text) == first
    assert ("padding" in find_fixes(case, [cause])[0].name) == first


@pytest.mark.parametrize(("certain", "from_graph"), [(True, True), (False, False)])
def test_of_a_rule_and_the_graph_the_stronger_evidence_is_shown(certain, from_graph):
    problem = GraphProblem(Problem.WRONG_SIGN, "The loss has the wrong sign.", certain=certain)
    losses = {"loss_start": 1.0, "loss_now": -1e6}  # a loss without a lower bound, more than a doubt
    case = case_with(Fault.EXPLODING, graph={"problems": (problem,)}, **losses)
    assert (dict(find_causes(case))[Cause.LOSS_FUNCTION] == problem.text) == from_graph


@pytest.mark.parametrize(
    ("start", "now", "found"), [(2.0, -201.0, True), (2.0, -199.0, False), (1e-6, -50.0, False)]
)
def test_a_loss_has_to_fall_far_below_zero_to_have_no_lower_bound(start, now, found):
    """By its size at the start, and by that of 1 if it began near zero."""
    case = case_with(Fault.EXPLODING, loss_start=start, loss_now=now)
    assert (Cause.LOSS_FUNCTION in weights(case)) == found


@pytest.mark.parametrize(("step", "found"), [(29, True), (30, True), (31, False)])
def test_a_fault_of_the_same_step_was_found_before(step, found):
    other = Finding(Fault.OVERSIZED_UPDATE, Severity.WARNING, step, NAMES[:1], 1.0, 0.1, "UpdateRatio")
    assert case_with(Fault.EXPLODING, findings=(other,)).found_before(Fault.OVERSIZED_UPDATE) == found
