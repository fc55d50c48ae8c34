"""A pass shows a fault, or does not."""

import math

import pytest

from lightning_gradguard.detectors.depth import DepthTilt, TimeTilt
from lightning_gradguard.detectors.explosion import Exploding, Spike
from lightning_gradguard.detectors.inactivity import DeadUnits
from lightning_gradguard.flight_recorder.replay_session import Pass
from lightning_gradguard.flight_recorder.symptom import Symptom
from lightning_gradguard.results import Quantity


def symptom(fault, quantity=None, value=1.0, limit=0.0, parameters=(), total_norm=2.0):
    target = {
        "fault": fault,
        "measure": "worded in any way",
        "quantity": quantity,
        "value": value,
        "limit": limit,
        "parameters": list(parameters),
    }
    return Symptom({"target": target, "message": "GradientHalt: ...", "report": {"total_norm": total_norm}})


@pytest.mark.parametrize(
    ("fault", "quantity", "value", "limit", "sick", "well"),
    [
        ("nonfinite", None, 1.0, 0.0, Pass(finite=False), Pass()),
        ("vanishing", "depth_tilt", 4.0, 3.0, Pass(tilt=2.6), Pass(tilt=2.4)),
        ("vanishing", "layer_gap", 4.0, 3.0, Pass(gap=3.5), Pass(gap=0.5, tilt=5.0)),
        ("exploding", "depth_tilt", -2.0, -1.8, Pass(tilt=-1.7), Pass(tilt=1.9)),
        ("vanishing_in_time", "time_tilt", 7.0, 6.0, Pass(time_tilt=6.5), Pass(time_tilt=3.0)),
        ("dead", "dead_units", 0.95, 0.9, Pass(dead=1.0), Pass(dead=0.2)),
        ("spike", None, 40.0, 4.0, Pass(total=1.0), Pass(total=0.1)),
        ("stalled", None, 1e-9, 1e-6, Pass(total=2.1), Pass(total=3.0)),
        ("exploding", None, 5.0, 3.0, Pass(total=1.9), Pass(total=1.0)),
    ],
)
def test_each_fault_is_found_where_it_is_and_only_there(fault, quantity, value, limit, sick, well):
    asked = symptom(fault, quantity, value, limit)
    assert asked.is_shown_by(sick)
    assert not asked.is_shown_by(well)
    assert asked.describe(sick)
    if fault != "nonfinite":
        assert not asked.is_shown_by(Pass(finite=False, total=math.nan))
        assert asked.describe(Pass(finite=False)) == "The loss or a gradient is NaN or Inf."


@pytest.mark.parametrize("quantity", Quantity)
def test_every_quantity_can_be_measured_in_part_of_a_batch(quantity):
    assert symptom("vanishing", quantity.value).is_divisible
    assert not symptom("vanishing").is_divisible
    assert not symptom("vanishing", "made_by_a_later_version").is_divisible


def test_detectors_declare_a_quantity_for_each_measure_or_none_at_all():
    for detector in (DepthTilt, TimeTilt, DeadUnits, Exploding):
        assert len(detector.quantities) == len(detector.measures) == len(set(detector.measures))
    assert not hasattr(Spike, "quantities")


@pytest.mark.parametrize(
    ("sentence", "sick"),
    [
        ("depth tilt in decades from input to output", Pass(tilt=4.0)),
        ("decades by which a layer lies below the middle one", Pass(gap=4.0)),
        ("decades lost from the last to the first steps of the sequence", Pass(time_tilt=4.0)),
        ("share of a layer's units without any gradient", Pass(dead=4.0)),
    ],
)
def test_bundles_from_before_quantities_still_replay(sentence, sick):
    target = {"fault": "vanishing", "measure": sentence, "value": 4.0, "limit": 3.0, "parameters": []}
    asked = Symptom({"target": target, "message": "", "report": {"total_norm": 2.0}})
    assert asked.is_divisible
    assert asked.is_shown_by(sick)
    assert not asked.is_shown_by(Pass())


def test_a_disconnected_tensor_gets_no_gradient():
    asked = symptom("disconnected", parameters=["a", "b"])
    assert asked.is_shown_by(Pass(norms={"c": 1.0}))
    assert not asked.is_shown_by(Pass(norms={"b": 1.0}))
    assert asked.describe(Pass(norms={"c": 1.0})) == "Again no gradient reaches the tensors that had none."


def test_an_error_is_recognized_by_its_class():
    asked = Symptom({"target": None, "message": "KeyError: 'a'", "report": None})
    assert asked.name == "KeyError"
    assert asked.is_shown_by(Pass(raised="KeyError"))
    assert not asked.is_shown_by(Pass())
    assert not asked.is_shown_by(Pass(raised="ValueError"))


def test_a_value_that_cannot_be_measured_does_not_count():
    asked = symptom("vanishing", "depth_tilt", 4.0, 3.0)
    assert not asked.is_shown_by(Pass(tilt=None))
    assert "not measurable" in asked.describe(Pass(tilt=None))
