"""Models of other packages: the cases, their selection, and the page. None of the packages is needed."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import real, real_models
from benchmarks.real import case, page
from benchmarks.real.case import EndsBelow, Falls, FallsBy, Model, Reaches, in_order, is_installed
from benchmarks.real.plain import Numbered, Plain, adam, train
from benchmarks.real.watching import watch
from lightning_gradguard import Cause, Fault

REQUIREMENTS = (Path(real.__file__).parent / "requirements.txt").read_text()
PINNED = dict(re.findall(r"^([\w-]+)==(\S+)$", REQUIREMENTS, re.MULTILINE))


def build(seed):
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

    def batches(number):
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(number))
        return x, x[:, :1] - x[:, 1:2]

    loss = lambda net, batch: nn.functional.mse_loss(net(batch[0]), batch[1])  # noqa: E731
    return train(Plain(net, loss, adam(0.01)), Numbered(batches), 60)


SMALL = Model("small", "Two layers", "torch", "toy", build, Falls(0.5), ("net.0.weight", "net.2.weight"))


def test_ids_are_unique_and_kinds_are_covered():
    ids = [c.id for c in real.CASES]
    assert len(set(ids)) == len(ids)
    assert len(real.HEALTHY) >= 12
    assert len(real.BROKEN) >= 6
    wanted = {
        "language",
        "encoder",
        "forecasting",
        "graph",
        "diffusion",
        "flow",
        "variational",
        "adversarial",
    }
    wanted |= {
        "single cell",
        "state space",
        "metric learning",
        "vision",
        "speech",
        "reinforcement",
        "tabular",
    }
    assert {c.family for c in real.HEALTHY} >= wanted
    fusion = {c.package for c in real.HEALTHY if "emporal fusion" in c.title}
    assert len(fusion) >= 2


def test_every_package_is_pinned():
    assert PINNED["torch"] == "2.13.0"
    for subject in real.CASES:
        for package in (subject.package, *subject.needs):
            assert package in PINNED, package


@pytest.mark.parametrize("subject", real.CASES, ids=lambda c: c.id)
def test_case_runs_here_or_says_what_is_missing(subject):
    reason = subject.missing()
    if reason is None:
        assert subject.version
    else:
        assert subject.id in reason
        assert subject.package in reason or any(need in reason for need in subject.needs)
        assert "pip install -r benchmarks/real/requirements.txt" in reason


def test_healthy_case_has_no_fault_and_a_broken_one_has_both():
    with pytest.raises(ValueError, match="no fault and no cause"):
        dataclasses.replace(SMALL, faults=(Fault.DEAD,))
    with pytest.raises(ValueError, match="its fault and its cause"):
        dataclasses.replace(SMALL, broken="changed", faults=(Fault.DEAD,))
    for subject in real.BROKEN:
        assert subject.broken, subject.id
        assert subject.id not in [c.id for c in real.HEALTHY]


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [("gpt2", {"gpt2"}), ("flow", {"nsf", "maf"}), ("peft,gc*", {"lora", "prompts", "gcn"})],
)
def test_cases_are_selected_by_id_package_and_family(pattern, chosen):
    assert {c.id for c in real.select(real.CASES, pattern)} == chosen


def test_selection_without_a_case_is_an_error():
    assert real.select(real.CASES, None) == list(real.CASES)
    with pytest.raises(ValueError, match="at least one case"):
        real.select(real.CASES, "nothing-like-this")


def test_distribution_counts_as_installed_if_it_can_be_imported():
    assert is_installed("torch")
    assert not is_installed("no-such-package-of-ours")


@pytest.mark.parametrize(
    ("criterion", "learned", "not_learned"),
    [
        (Falls(0.5), (2.0, 1.0), (2.0, 1.1)),
        (FallsBy(0.5), (0.2, -0.4), (0.2, -0.2)),
        (EndsBelow(0.3), (1.0, 0.3), (1.0, 0.4)),
        (Reaches(0.8), (0.2, 0.8), (0.9, 0.95)),
    ],
    ids=lambda value: str(value) if not isinstance(value, tuple) else "",
)
def test_criterion_tells_learned_from_not_learned(criterion, learned, not_learned):
    assert criterion(*learned)
    assert not criterion(*not_learned)
    assert not criterion(learned[0], float("nan"))


@pytest.mark.parametrize(
    ("patterns", "right"),
    [(("a.*", "b.*"), True), (("b.*", "a.*"), False), (("a.0", "c"), True), ((), None)],
)
def test_order_holds_if_all_of_one_pattern_come_before_the_next(patterns, right):
    assert in_order(["a.0", "a.1", "b.0", "c"], patterns) is right


def test_order_without_a_match_is_an_error():
    with pytest.raises(ValueError, match="matches none"):
        in_order(["a"], ("z*",))


@pytest.fixture(scope="module")
def runs():
    """Runs of a small case with a guard and without."""
    return watch(SMALL, 0), watch(SMALL, 0, strict=False)


def test_healthy_run_is_quiet_learned_in_order_and_the_same_without_a_guard(runs):
    guarded, bare = runs
    assert guarded["error"] is None
    assert guarded["learned"]
    assert bare["learned"]
    assert guarded["ordered"]
    assert page.alarms(guarded) == 0
    assert guarded["steps"] == 60
    assert guarded["losses"] == bare["losses"]


def test_page_states_totals_and_skipped_cases(runs):
    other = dataclasses.replace(SMALL, id="absent")
    text = page.page([SMALL, other], runs)
    assert "1 models of 1 packages: 1 learned, 0 with a false alarm, 0 halted; order right in 1 of 1" in text
    assert "Not run here: absent." in text
    row = next(line for line in text.splitlines() if line.startswith("| small |"))
    assert row.endswith("| 0 | no | yes | yes |")


def test_page_scores_a_broken_run(runs):
    broken = dataclasses.replace(
        SMALL, broken="rate", faults=(Fault.EXPLODING,), causes=(Cause.LEARNING_RATE_TOO_HIGH,)
    )
    finding = {"fault": "exploding", "severity": 1, "step": 3}
    right = runs[0] | {
        "findings": [finding],
        "causes": ["learning_rate_too_high"],
        "said": ["GradGuard: exploding"],
    }
    assert page.right_fault(broken, right)
    assert page.right_cause(broken, right)
    silent = runs[0]
    assert not page.right_fault(broken, silent)
    assert not page.right_cause(broken, silent)
    named = silent | {"said": ["Likely cause: learning rate too high"]}
    assert page.right_cause(broken, named)
    assert "fault or mistake named in 1, cause first in 1" in page.page([broken], [right])


def test_failed_run_is_shown_as_failed():
    def fails(seed):
        raise RuntimeError("no such model")

    failed = dataclasses.replace(SMALL, build=fails)
    assert "failed: RuntimeError: no such model" in page.page([failed], [watch(failed, 0)])


def test_run_without_the_packages_skips_with_a_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(case, "is_installed", lambda distribution: False)
    raw = tmp_path / "raw.json"
    assert real_models.main(["--cases", "gpt2,gcn", "--raw", str(raw)]) == 0
    shown = capsys.readouterr().out
    assert "skipped: gpt2 trains a model of transformers, which is not installed" in shown
    assert "Not run here: gpt2, gcn." in shown


def test_records_are_replaced_by_newer_ones(tmp_path):
    store = real_models.Store(tmp_path / "raw.json")
    run = {"case": "a", "seed": 0, "strict": True, "to": 1.0}
    for new in (run, run | {"strict": False}, run | {"to": 2.0}):
        store.add(new)
    again = real_models.Store(tmp_path / "raw.json").runs
    assert sorted(r["to"] for r in again) == [1.0, 2.0]
    assert len(again) == 2
