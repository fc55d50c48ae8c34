"""Which passes show which fault."""

import math

import pytest

from lightning_gradguard.detectors.depth import DepthTilt, TimeTilt
from lightning_gradguard.detectors.explosion import Exploding, Spike
from lightning_gradguard.detectors.inactivity import DeadUnits
from lightning_gradguard.flight_recorder.replay_session import Pass
from lightning_gradguard.flight_recorder.symptom import Symptom


def symptom(fault, measure="", value=1.0, limit=0.0, parameters=(), total_norm=2.0):
    target = {
        "fault": fault,
        "measure": measure,
        "value": value,
        "limit": limit,
        "parameters": list(parameters),
    }
    return Symptom({"target": target, "message": "GradientHalt: ...", "report": {"total_norm": total_norm}})


@pytest.mark.parametrize(
    ("fault", "measure", "value", "limit", "sick", "well"),
    [
        ("nonfinite", "losses that are not finite", 1.0, 0.0, Pass(finite=False), Pass()),
        ("vanishing", DepthTilt.measures[0], 4.0, 3.0, Pass(tilt=2.6), Pass(tilt=2.4)),
        ("vanishing", DepthTilt.measures[1], 4.0, 3.0, Pass(gap=3.5), Pass(gap=0.5, tilt=5.0)),
        ("exploding", Exploding.measures[0], -2.0, -1.8, Pass(tilt=-1.7), Pass(tilt=1.9)),
        ("vanishing_in_time", TimeTilt.measures[0], 7.0, 6.0, Pass(time_tilt=6.5), Pass(time_tilt=3.0)),
        ("dead", DeadUnits.measures[0], 0.95, 0.9, Pass(dead=1.0), Pass(dead=0.2)),
        ("spike", Spike.measures[0], 40.0, 4.0, Pass(total=1.0), Pass(total=0.1)),
        ("stalled", "median applied update over weight", 1e-9, 1e-6, Pass(total=2.1), Pass(total=3.0)),
        ("exploding", Exploding.measures[2], 5.0, 3.0, Pass(total=1.9), Pass(total=1.0)),
    ],
)
def test_each_fault_is_seen_where_it_is_and_only_there(fault, measure, value, limit, sick, well):
    asked = symptom(fault, measure, value, limit)
    assert asked.shows(sick)
    assert not asked.shows(well)
    assert asked.tell(sick)
    if fault != "nonfinite":
        assert not asked.shows(Pass(finite=False, total=math.nan))
        assert asked.tell(Pass(finite=False)) == "loss or gradients are not finite"


def test_the_measures_are_those_of_the_detectors():
    faults = {
        "vanishing": DepthTilt.measures,
        "vanishing_in_time": TimeTilt.measures,
        "dead": DeadUnits.measures,
        "exploding": Exploding.measures[:1],
    }
    for fault, measures in faults.items():
        for measure in measures:
            assert symptom(fault, measure).splits, measure
    assert not symptom("exploding", Exploding.measures[1]).splits
    assert not symptom("stalled", "median applied update over weight").splits


def test_tensors_without_a_path_get_no_gradient():
    asked = symptom("disconnected", "tensors without a path from the loss", parameters=["a", "b"])
    assert asked.shows(Pass(norms={"c": 1.0}))
    assert not asked.shows(Pass(norms={"b": 1.0}))
    assert asked.tell(Pass(norms={"c": 1.0})) == "no gradient arrives at what had none"


def test_an_error_is_known_by_its_class():
    asked = Symptom({"target": None, "message": "KeyError: 'a'", "report": None})
    assert asked.name == "KeyError"
    assert asked.shows(Pass(raised="KeyError"))
    assert not asked.shows(Pass())
    assert not asked.shows(Pass(raised="ValueError"))


def test_what_cannot_be_measured_does_not_count():
    asked = symptom("vanishing", DepthTilt.measures[0], 4.0, 3.0)
    assert not asked.shows(Pass(tilt=None))
    assert "not measurable" in asked.tell(Pass(tilt=None))
