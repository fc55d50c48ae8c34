"""Benchmark of clippers: it runs, injects the listed accidents, and its page matches its records."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import clipping
from benchmarks.clipping_tasks import long_runs, page
from benchmarks.clipping_tasks.accidents import CORRUPTIONS, RATE, REGIMES, Accidents
from benchmarks.clipping_tasks.data import VOCABULARY, digits, library, windows
from benchmarks.clipping_tasks.models import CONTEXT, LanguageModel
from benchmarks.clipping_tasks.pairs import difference
from benchmarks.clipping_tasks.tasks import TASKS
from benchmarks.clipping_tasks.training import ARMS, BARE, OURS, train
from lightning_gradguard import NormClip
from lightning_gradguard.stats.moments import is_adaptive


def test_quick_run_writes_page_and_picture(tmp_path, capsys):
    out, raw = tmp_path / "page.md", tmp_path / "raw"
    options = ["--quick", "--jobs", "1", "--out", str(out), "--raw", str(raw)]
    assert clipping.main([*options, "--long"]) == 0
    assert clipping.main(options) == 0
    text = out.read_text()
    assert text in capsys.readouterr().out
    assert all(f" {arm} " in text for arm in [*ARMS, *BARE])
    assert all(f"### {task}, {regime}" in text for task in TASKS for regime in REGIMES)
    assert "## Fine-tuning" in text
    assert "## What it costs" in text
    assert out.with_suffix(".png").stat().st_size > 1000
    # What is recorded is not run again.
    assert clipping.main(options) == 0
    assert "0 runs in" in capsys.readouterr().out


def test_records_survive_an_end_in_the_middle(tmp_path):
    named = [Job(n) for n in range(3)]
    file = tmp_path / "records.jsonl"
    assert clipping.run_all(named[:2], 1, file) == 2
    assert clipping.run_all(named, 1, file) == 1
    assert [run["number"] for run in clipping.records(file)] == [0, 1, 2]


class Job:
    """A job as `functools.partial` makes them."""

    def __init__(self, number):
        self.func, self.args, self.keywords = type(self), (number,), {}

    def __call__(self):
        return {"number": self.args[0]}


def test_every_part_of_the_work_is_in_the_whole():
    whole, sample = set(clipping.work("", 5)), set(clipping.work("sample", 5))
    assert sample < whole
    assert len(whole) == len(clipping.work("", 5))
    assert {work[4] for work in whole} == set(clipping.SEEDS)
    assert {TASKS[work[0]].adaptive for work in sample} == {True, False}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_say_what_their_optimizer_is(name):
    task = TASKS[name]
    assert is_adaptive(task.optimizer(task.problem().model.parameters(), lr=0.1)) == task.adaptive
    assert list(task.rates) == sorted(task.rates)
    assert [round(task.factor(step), 2) for step in (round(task.warm_up * task.steps), task.steps)] == [
        1,
        0.1,
    ]


@pytest.mark.parametrize("name", TASKS)
def test_models_have_a_last_layer_to_leave_out_and_batches_of_any_size(name):
    problem = TASKS[name].problem()
    assert any(n.startswith("head.") for n, _ in problem.model.named_parameters())
    inputs, targets = problem.batch(6, torch.Generator().manual_seed(0))
    assert len(inputs) == len(targets) == 6
    assert problem.loss(inputs, targets).shape == ()
    with torch.no_grad():
        assert problem.exam() == problem.exam()


def test_text_is_standard_library_and_test_split_is_held_out():
    text = library()
    assert len(text.train) > 5 * len(text.held_out) > 100_000
    assert text.train.min() >= 0
    assert text.train.max() < VOCABULARY
    readable = "".join(map(chr, text.train.tolist()))
    assert "class Thread:" in readable or "class JSONEncoder" in readable
    window = windows(text.train, torch.tensor([5, 9]), 3)
    assert torch.equal(window[1], text.train[9:13])


def test_no_held_out_image_is_learnt():
    (train_x, held_x), (train_y, held_y) = digits()
    assert (len(train_x), len(held_x)) == (len(train_y), len(held_y)) == (1437, 360)
    assert train_x.min() == -1
    assert train_x.max() == 1


def test_attention_is_causal():
    model, tokens = LanguageModel(), torch.randint(VOCABULARY, (1, CONTEXT))
    before = model(tokens)
    tokens[0, 20] = (tokens[0, 20] + 1) % VOCABULARY
    changed = (model(tokens) - before).abs().amax(-1)[0] > 0
    assert changed.tolist() == [False] * 20 + [True] * (CONTEXT - 20)


@pytest.mark.parametrize("regime", REGIMES)
def test_accidents_follow_seed_and_rate(regime):
    first, again, other = (Accidents(regime, 400, seed) for seed in (0, 0, 1))
    assert first.hit == again.hit
    assert len(first.hit) == (0 if regime == "clean" else RATE * 400)
    assert first.hit != other.hit or regime == "clean"
    if regime != "clean":
        kinds = list(first.hit.values())
        assert {kinds.count(kind) for kind in range(len(CORRUPTIONS))} == {2}


@pytest.mark.parametrize("name", TASKS)
def test_only_chosen_batches_are_corrupt(name):
    accidents, problem = Accidents("corrupt", 100, 0), TASKS[name].problem()
    inputs, targets = problem.batch(8, torch.Generator().manual_seed(0))
    for step in range(100):
        a, b, factor = accidents.batch(step, inputs, targets)
        intact = torch.equal(a, inputs) and torch.equal(b, targets) and factor == 1
        assert intact == (step not in accidents.hit)
        assert (a.shape, b.shape) == (inputs.shape, targets.shape)


def test_nan_enters_one_element_at_chosen_steps():
    accidents, model = Accidents("nan", 100, 0), LanguageModel()
    for step in range(100):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        accidents.gradients(step, model)
        bad = sum(p.grad.isnan().sum().item() for p in model.parameters())
        assert bad == (step in accidents.hit)


def test_run_is_repeatable_and_learns():
    work = ("heavy-adam", "NormClip(1.0)", "clean", 0.032, 0)
    first, again = train(work), train(work)
    assert first == again
    assert first["loss"] < 0.8 * first["start"]
    assert 0 < first["clipped"] <= 1
    assert train(work, clipper=NormClip(1e9))["clipped"] == 0


def test_a_run_that_came_apart_counts_as_one_that_did_not_learn():
    found = train(("heavy-sgd", "none", "corrupt", 1.3, 0))
    assert found["loss"] == found["start"]


def test_nan_ends_only_unguarded_runs():
    bare, guarded = (
        train(("heavy-adam", arm, "nan", 0.016, 0)) for arm in ("clip_grad_norm_(1.0), no guard", OURS)
    )
    assert bare["loss"] == bare["start"]
    assert guarded["loss"] < 0.8 * guarded["start"]
    assert guarded["skipped"] == len(Accidents("nan", TASKS["heavy-adam"].steps, 0).hit)


def test_fine_tuning_begins_where_training_ended():
    runs = [long_runs.fine_tuning("mixer-adamw", arm, 0, kept=True) for arm in ("none", OURS)]
    assert runs[0]["course"][0] == runs[1]["course"][0]
    assert all(len(run["course"]) == 1 + len(long_runs.LOOKS) for run in runs)
    assert all(run["course"][-1] < run["course"][0] for run in runs)


def test_an_interval_is_that_of_students_t():
    found = difference([1.1, 1.3, 1.2], [1.0, 1.0, 1.0])
    assert found.mean == pytest.approx(0.2)
    # Standard deviation 0.1, three seeds: 4.303 * 0.1 / sqrt(3).
    assert found.half == pytest.approx(0.2484, abs=1e-4)
    assert found.is_noise
    assert not difference([1.1, 1.11, 1.12], [1.0, 1.0, 1.0]).is_noise
    assert math.isinf(difference([1.1], [1.0]).half)
    assert str(difference([1.1], [1.0])) == "+10.0%"


def fake(task, arm, regime, rate, seed, loss):
    return {"task": task, "arm": arm, "regime": regime, "rate": rate, "seed": seed, "loss": loss} | {
        "start": 9.0,
        "clipped": 0.25,
        "skipped": 0,
        "halted": False,
    }


def test_page_compares_each_arm_at_its_own_best_rate():
    def loss(arm, regime, rate, seed):
        if arm == OURS:  # best at the higher rate
            return (2.0 if rate == 0.3 else 2.5) + 0.01 * seed
        if arm == "none" and regime == "corrupt":
            return 4.0 + 0.01 * seed
        return 2.2 + 0.1 * (arm != "AGC") + (1.0 if rate == 0.3 else 0) + 0.01 * seed

    runs = [
        fake("mixer-adamw", arm, regime, rate, seed, loss(arm, regime, rate, seed))
        for arm in ARMS
        for regime in REGIMES
        for rate in (0.1, 0.3)
        for seed in (0, 1)
    ]
    text = page.report(runs)
    # At 2.005 and 2.205: 9.1 % lower, at each seed by the same.
    assert "| mixer-adamw | clean | 2.005 | AGC 2.205 | -9.1% ± 0.0% |" in text
    assert "+8.7% ± 0.0% at 0.1 |" in text
    assert "within seed noise of it, in 3 of 3 pairs of task and regime." in text
    assert "significantly better than no clipper in 1 of 1 tasks with corrupt batches." in text
    assert "in 1 of 1 tasks (mixer-adamw clean)" in text
    assert f"| {OURS} | 2.505 | **2.005** |" in text
    # Its gap is widest at the lower rate: 2.505 beside 2.205.
    assert "its worst gap to the best arm is 14%" in text
    assert json.loads(json.dumps(runs)) == runs
