"""Quick part of the zoo: each fault is found first and at the right layer, and healthy runs have no alarm."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.judging.scoring import score
from benchmarks.judging.watching import Listener
from benchmarks.zoo import CASES, case
from benchmarks.zoo.running import fit
from benchmarks.zoo.truth import right_names
from lightning_gradguard import Fault, GradGuard

#: Case to a number of steps that is enough to find its fault.
FAULTY = {
    "V01": 40,
    "V12": 40,
    "V18": 110,
    "V08": 60,
    "D01": 30,
    "D04": 30,
    "X01": 45,
    "X05": 45,
    "E02": 30,
    "E15": 120,
    "E06": 160,
    "E07": 160,
    "E10": 5,
    "N08": 20,
    "U04": 30,
    "O04": 45,
    "O08": 40,
    "V09": 20,
}

#: Condition that must not cause an alarm, to a healthy training that has it.
IMMUNE = {
    "overflows of a gradient scaler and changes of its scale": "H25",
    "warm-up": "H52",
    "cosine schedule": "H50",
    "warm restarts": "H51",
    "a sudden drop of the learning rate": "H22",
    "one cycle down to nothing": "H53",
    "a frozen layer": "H20",
    "layers that thaw": "H27",
    "residual branches that start at zero": "H03",
    "experts that get no token": "H11",
    "embeddings with rare tokens": "H12",
    "batch size changed mid-run": "H21",
    "accumulation with a smaller last window": "H26",
    "convergence to nothing": "H14",
    "fine-tuning that starts at a low loss": "H54",
    "harder data on a net that has learned": "H56",
    "pure label noise": "H17",
    "a long plateau before learning": "H18",
    "a loss times 65,536": "H23",
    "a loss times a millionth": "H24",
    "dropout": "H61",
    "an adversary, whose losses do not fall": "H70",
    "a policy gradient, whose loss is about zero": "H80",
    "batches of four": "H19",
    "a head that is trained now and then": "H84",
}


#: Cases that run outside `make test-long` too: short ones, each of another kind.
QUICK = {"H25", "H51", "H27", "H14", "H17", "H23", "H19", "H84"}

#: Seeds other than 0: under torch 2.4 V18 trains differently and gets no finding within 200 steps.
SEEDS = {"V18": 1}


def found(id, steps=None):
    """Return the guard's findings for a case, in full or cut short."""
    subject = case(id)
    listener = Listener(guard := GradGuard())
    subject = subject if steps is None else dataclasses.replace(subject, steps=steps)
    fit(subject, subject.make(SEEDS.get(id, 0)), [guard, listener])
    return subject, listener.findings


def test_each_fault_has_a_case():
    assert {case(id).fault for id in FAULTY} == set(Fault)
    assert {c.id for c in CASES} >= {*FAULTY, *IMMUNE.values()}


#: Long ones that are left to `make test-long`; tests/recorded has each of these faults, too.
LONG = {"V08", "V18", "E06", "E07", "E15"}


@pytest.mark.parametrize(
    "id", [pytest.param(id, marks=pytest.mark.slow) if id in LONG else id for id in FAULTY]
)
def test_faulty_training_gets_right_fault_and_layer(id):
    subject, findings = found(id, FAULTY[id])
    seen = score(subject, findings, ours=True, names=right_names(subject, SEEDS.get(id, 0)))
    assert seen.right_first, findings
    assert seen.right_layer, findings


@pytest.mark.parametrize(
    "what",
    [what if id in QUICK else pytest.param(what, marks=pytest.mark.slow) for what, id in IMMUNE.items()],
)
def test_healthy_training_has_no_alarm(what):
    _, findings = found(IMMUNE[what])
    assert not [f for f in findings if f["severity"] > 0]
