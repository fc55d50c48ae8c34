"""Public reports: each builds and trains, its truth is on file and holds, and its points are scored."""

import dataclasses
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import public_reports, reports
from benchmarks.reports.case import CURED, REPORTED, Case
from benchmarks.reports.establish import holds
from benchmarks.reports.parts import Fit, batches, generator, mlp, r2
from benchmarks.reports.playing import (
    FIRST_SIGHT,
    POINTS,
    TRUTH,
    play,
    read,
    score_of,
    score_with_change,
    train,
    write,
)
from lightning_gradguard import Cause, Fault
from lightning_gradguard.diagnosis.trials.change import Change

_X = torch.randn(256, 4, generator=generator(1))
_Y = _X[:, :1] - _X[:, 1:2]


def _build(variant: str) -> tuple[L.LightningModule, object]:
    module = Fit(mlp(4, 16, 1), lr={CURED: 1e-2, "slower": 1e-6}.get(variant, 10.0))
    return module, batches(_X, _Y)


def _case(**changed: object) -> Case:
    parts = {
        "id": "T01",
        "title": "A rate far too high",
        "address": "nowhere #1",
        "build": _build,
        "score": r2(_X, _Y),
        "level": 0.5,
        "faults": (Fault.OVERSIZED_UPDATE,),
        "causes": (Cause.LEARNING_RATE_TOO_HIGH,),
        "fixes": {"standardize": "slower", "lower the learning rate": CURED},
        "steps": 60,
    }
    return Case(**{**parts, **changed})


def test_ids_and_addresses_are_unique():
    assert len({c.id for c in reports.CASES}) == len(reports.CASES) >= 20
    assert len({c.address for c in reports.CASES}) == len(reports.CASES)


@pytest.mark.parametrize("subject", reports.CASES, ids=lambda c: c.id)
def test_each_variant_trains_one_step(subject):
    subject = dataclasses.replace(subject, steps=1)
    for variant in subject.variants:
        module, loader = subject.make(variant, 0)
        _, _, error = train(subject, variant, module, loader)
        assert not error or variant != CURED, f"{variant}: {error}"
        subject.quality(module)


@pytest.mark.parametrize("subject", reports.CASES, ids=lambda c: c.id)
def test_truth_is_on_file_and_holds(subject):
    entry = read(TRUTH)[subject.id]
    assert entry["level"] == subject.level
    for scores in entry["seeds"].values():
        assert set(scores) == set(subject.variants)
        assert holds(scores, subject.level)


def test_truth_is_reproducible():
    subject = next(c for c in reports.CASES if c.id == "R02")
    known = read(TRUTH)["R02"]["seeds"]["0"]
    assert score_of(subject, CURED, 0) == pytest.approx(float(known[CURED]), abs=0.05)
    assert not score_of(subject, REPORTED, 0) >= subject.level


def test_first_sight_is_on_file():
    kept = read(FIRST_SIGHT)
    assert set(kept) <= {c.id for c in reports.CASES}
    assert len(kept) >= 20
    assert all(isinstance(entry[key], bool) for entry in kept.values() for key in POINTS)


def test_a_right_first_fix_is_applied_and_seen_to_cure():
    run = play(_case(), 0)
    assert run["points"] == {"fault": True, "cause": True, "fix": True, "quiet": True}
    assert run["applied"] == CURED
    assert run["scores"]["reported"] is None or run["scores"]["reported"] < 0.5


def test_a_fix_without_an_entry_is_applied_by_its_change():
    run = play(_case(fixes={"no such fix": "slower"}), 0)
    assert run["applied"] == "change"
    assert run["quality"] is None or run["quality"] < 10


def test_wrong_truth_makes_no_point():
    run = play(_case(faults=(Fault.UNDERFLOW,), causes=(Cause.BAD_DATA,), fixes={".": "slower"}), 0)
    assert run["points"] == {"fault": False, "cause": False, "fix": False, "quiet": True}


@pytest.mark.parametrize(
    "change", [Change(rate=1e-3), Change(rate=1e-3, activation="gelu"), Change(initialise="he", rate=1e-3)]
)
def test_changes_are_applied_to_the_reported_training(change):
    assert score_with_change(_case(), 0, change) > 0.5


def test_scores_leave_modes_and_random_numbers_alone():
    subject = _case(score=lambda module: torch.rand(()) + float(module.eval().training))
    module, _ = subject.make(CURED, 0)
    module.net[0].eval()
    state = torch.get_rng_state()
    subject.quality(module)
    assert module.training
    assert not module.net[0].training
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_variants_and_empty_truths_are_refused():
    with pytest.raises(ValueError, match="variant of case T01 must be one of"):
        _case().make("other", 0)
    with pytest.raises(ValueError, match="faults or said"):
        _case(faults=())
    with pytest.raises(ValueError, match="must not be empty"):
        _case(fixes={})


def test_page_has_a_row_for_each_case_and_rule_set(tmp_path):
    subject, run = _case(), play(_case(), 0)
    kept = public_reports.first_results([run])
    write(tmp_path / "first.json", kept)
    page = public_reports.report([subject], [run], read(tmp_path / "first.json"))
    assert "| T01 | A rate far too high | nowhere #1 | oversized_update | learning_rate_too_high |" in page
    assert page.count("| 1 / 1 |") >= 2
    for name in ("AutoTrainer", "SageMaker Debugger", "TheDeepChecker", "BTTackler"):
        assert f"| {name}, all |" in page
    assert "| all 1 |" in public_reports.first_sight_table([subject], kept)
