"""Ground truth: each case, its facts, and its established truth."""

import dataclasses
import fnmatch
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.zoo import CASES, case
from benchmarks.zoo.case import Case, select
from benchmarks.zoo.establish import establish
from benchmarks.zoo.facts import OVERFLOW, Facts, is_right_name, supports
from benchmarks.zoo.running import fit
from benchmarks.zoo.truth import right_names, truth
from lightning_gradguard import Cause, Fault

LISTED = [
    *(f"V{i:02d}" for i in range(1, 10)),
    *(f"D{i:02d}" for i in range(1, 5)),
    "X01",
    *(f"E{i:02d}" for i in range(1, 11)),
    *("O01", "O02"),
    *(f"H{i:02d}" for i in range(1, 28)),
]


def test_ids_are_unique_and_complete():
    ids = [c.id for c in CASES]
    assert len(set(ids)) == len(ids) >= 70
    assert set(LISTED) <= set(ids)


def test_each_kind_of_net_has_faulty_and_healthy_cases():
    for kin in (
        "convolutional",
        "residual",
        "transformer",
        "recurrent",
        "generative",
        "graph",
        "mixed precision",
    ):
        assert {c.faulty for c in CASES if kin in c.kin} == {True, False}, kin
    assert {c.fault for c in CASES} == {None, *Fault}


@pytest.mark.parametrize("subject", CASES, ids=lambda c: c.id)
def test_case_trains_one_step_and_has_its_culprits(subject):
    training = subject.make(0)
    names = [name for name, p in training.named_parameters() if p.requires_grad]
    for pattern in subject.culprits:
        assert fnmatch.filter(names, pattern), f"{pattern} matches none of {names}"
    fit(dataclasses.replace(subject, steps=2), training)
    assert training.trainer.global_step == 2


def test_truth_covers_current_cases_and_holds():
    assert set(truth()) == {c.id for c in CASES}
    for subject in CASES:
        entry = truth()[subject.id]
        assert entry["names"] == [f.value for f in subject.names], subject.id
        assert (entry["level"], entry["onset"]) == (subject.level, subject.onset), subject.id
        assert len(entry["seeds"]) >= 3, subject.id
        assert all(seed["holds"] for seed in entry["seeds"].values()), subject.id


@pytest.mark.parametrize("id", ["D01", "E04", "V09", "H14"])
def test_truth_is_reproducible(id):
    assert establish(case(id), 0)["holds"]


def test_false_claim_does_not_hold():
    healthy = case("H13")
    wrong = dataclasses.replace(
        healthy,
        fault=Fault.DEAD,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("net.*",),
        fixed=healthy.build,
    )
    assert not establish(wrong, 0)["holds"]


def test_healthy_run_supports_no_fault():
    subject = case("H13")
    facts = Facts(dataclasses.replace(subject, fault=Fault.DEAD, cause=Cause.UNKNOWN, culprits=("*",)))
    fit(subject, subject.make(0), [facts])
    summary = facts.summary()
    assert not [fault for fault in Fault if supports(fault, summary, 0)]


def test_overflow_is_another_name_only_soon_after_onset():
    subject = case("E03")
    assert is_right_name(Fault.NONFINITE, subject, {"nonfinite_step": OVERFLOW})
    assert not is_right_name(Fault.NONFINITE, subject, {"nonfinite_step": OVERFLOW + 1})
    assert not is_right_name(Fault.NONFINITE, subject, {"nonfinite_step": None})
    assert is_right_name(Fault.NONFINITE, case("E07"), {"nonfinite_step": 170})


def test_other_names_need_support_by_the_run():
    for subject in CASES:
        for seed, entry in truth()[subject.id]["seeds"].items():
            names = right_names(subject, int(seed))
            assert names[:1] == subject.names[:1]
            assert all(entry["borne_out"][name.value] for name in names)
    unknown = dataclasses.replace(case("D01"), id="Z", also=(Fault.STALLED,), why="unknown")
    assert right_names(unknown, 0) == (Fault.DEAD, Fault.STALLED)


def test_facts_match_a_handmade_run():
    subject = dataclasses.replace(case("H14"), steps=3)
    facts = Facts(subject)
    fit(subject, subject.make(0), [facts])
    training = subject.make(0)
    optimizer = training.make_optimizer(training.parameters())
    for number in range(3):
        optimizer.zero_grad()
        loss = training.loss(*training.batch(number), number)
        loss.backward()
        assert facts.losses[number] == pytest.approx(loss.item())
        weight = training.net.head.weight
        assert facts.norms[number] == pytest.approx(
            math.hypot(weight.grad.norm().item(), training.net.head.bias.grad.norm().item())
        )
        before = weight.detach().clone()
        optimizer.step()
        moved = (weight.detach() - before).norm().item()
        assert facts.ratios[number] == pytest.approx(moved / before.norm().item())


def test_case_validates_its_fields():
    with pytest.raises(ValueError, match="culprits"):
        Case("Z1", "", lambda seed: None, 0.5, Fault.DEAD, Cause.UNKNOWN)
    with pytest.raises(ValueError, match="healthy"):
        Case("Z2", "", lambda seed: None, 0.5, culprits=("*",))
    with pytest.raises(ValueError, match="why"):
        Case("Z3", "", lambda seed: None, 0.5, Fault.DEAD, Cause.UNKNOWN, ("*",), also=(Fault.STALLED,))
    with pytest.raises(ValueError, match="at least one case"):
        select(CASES, "nothing of the kind")
    assert {c.id for c in select(CASES, "V0*, graph")} > {"V01", "D10", "H42"}


def test_data_depend_on_the_seed_only():
    for id in ("H01", "H36", "H12", "H42", "H14"):
        first, again, other = case(id).make(0), case(id).make(0), case(id).make(1)
        for one, two in zip(first.batch(3), again.batch(3), strict=True):
            assert torch.equal(one, two)
        assert not torch.equal(first.batch(3)[0], first.batch(4)[0])
        assert not torch.equal(first.batch(3)[0], other.batch(3)[0])
