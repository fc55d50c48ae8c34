"""Held-out collection: its cases build and train, their truth is known, and its helpers work."""

import dataclasses
import fnmatch
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import zoo
from benchmarks.held_out import CASES, TRUTH, case
from benchmarks.held_out.data import templates
from benchmarks.held_out.training import Trial
from benchmarks.judging import tables
from benchmarks.judging.watching import OURS
from benchmarks.zoo.establish import establish
from benchmarks.zoo.recipes import sgd
from benchmarks.zoo.running import fit
from benchmarks.zoo.truth import right_names, truth
from lightning_gradguard import Fault

#: Cases on which the guard was wrong once; they must stay.
ONCE_WRONG = {"SD3", "SE2", "SE7", "SEE", "SO4", "SS3", "ST4", "SVH", "HB14", "HC17", "HC28", "HF05"}


def test_ids_are_unique_and_hard_cases_are_kept():
    ids = [c.id for c in CASES]
    assert len(set(ids)) == len(ids) >= 100
    assert not set(ids) & {c.id for c in zoo.CASES}
    assert set(ids) >= ONCE_WRONG
    assert {c.fault for c in CASES} == {None, *Fault}


@pytest.mark.parametrize("subject", CASES, ids=lambda c: c.id)
def test_case_trains_one_step_and_has_its_culprits(subject):
    training = subject.make(0)
    names = [name for name, p in training.named_parameters() if p.requires_grad]
    for pattern in subject.culprits:
        assert fnmatch.filter(names, pattern), f"{pattern} matches none of {names}"
    fit(dataclasses.replace(subject, steps=1), training)
    assert training.trainer.global_step >= 1


def test_truth_covers_current_cases_and_holds():
    assert set(truth(TRUTH)) == {c.id for c in CASES}
    for subject in CASES:
        entry = truth(TRUTH)[subject.id]
        assert entry["names"] == [f.value for f in subject.names], subject.id
        assert (entry["level"], entry["onset"]) == (subject.level, subject.onset), subject.id
        assert len(entry["seeds"]) >= 2, subject.id
        assert all(seed["holds"] for seed in entry["seeds"].values()), subject.id


@pytest.mark.parametrize("id", ["SD7", "HA13"])
def test_truth_is_reproducible(id):
    assert establish(case(id), 0)["holds"]


def test_names_come_from_the_collections_own_truth():
    subject = case("SVH")
    borne_out = truth(TRUTH)["SVH"]["seeds"]["0"]["borne_out"]
    expected = tuple(n for n in subject.names if n == subject.fault or borne_out[n.value])
    assert right_names(subject, 0, TRUTH) == expected
    assert right_names(dataclasses.replace(subject, id="unknown"), 0, TRUTH) == subject.names


def test_page_states_that_it_is_no_longer_blind():
    run = {"case": "HA13", "seed": 0, "alarms": {OURS: []}, "halted": None, "statistics": {}, "trace": []}
    page = tables.report([case("HA13")], [run], opening=tables.HELD_OUT, truth=TRUTH)
    assert "no longer a blind one" in page
    assert f"| {OURS} | 0 / 0 | 0 / 0 | 0 / 0 | 0 / 1 | - |" in page


def _small(**options):
    torch.manual_seed(0)
    return Trial(nn.Linear(64, 10), templates(0), sgd(0.1), 0, **options)


def _custom_loss(net, batch, number):
    return F.cross_entropy(net(batch[0]), batch[1])


def _trained(training, steps=20):
    fit(dataclasses.replace(case("HA13"), steps=steps), training)
    return training


def test_custom_objective_trains_like_task_loss():
    plain, own = _trained(_small()), _trained(_small(objective=_custom_loss))
    for one, other in zip(plain.parameters(), own.parameters(), strict=True):
        assert torch.equal(one, other)


def test_default_quality_is_relative_decrease_of_objective():
    training = _small(objective=_custom_loss)
    before = training.examine()
    _trained(training)
    assert training.quality() == pytest.approx(1 - training.examine() / before)
    assert 0 < training.quality() < 1


def test_quality_uses_unseen_examples_and_leaves_net_unchanged():
    training = _small(objective=_custom_loss).train()
    state, seen = torch.get_rng_state(), training.batch(0)[0]
    training.examine()
    assert training.training
    assert torch.equal(torch.get_rng_state(), state)
    drawn = training.task.draw(torch.Generator().manual_seed(999_999_000), 64)[0]
    assert not torch.isclose(seen[:, None, 0], drawn[None, :, 0], rtol=0, atol=0).any()


def test_hooks_wrap_each_batch_and_pool_ends_with_smaller_batch():
    numbers, sizes, after = [], [], []

    def spoil(number, x, y):
        sizes.append(len(x))
        return x, y

    _trained(
        _small(
            pool=50,
            batch_size=20,
            spoil=spoil,
            before=lambda net, number: numbers.append(number),
            after=after.append,
        ),
        steps=6,
    )
    assert numbers == list(range(6))
    assert sizes == [20, 20, 10, 20, 20, 10]
    assert len(after) == 6
