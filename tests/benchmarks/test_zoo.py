"""The ground truth, and the instrument that measures detectors against it."""

import dataclasses
import fnmatch
import math
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.judging import peers, scoring, tables
from benchmarks.judging.snapshot import take
from benchmarks.judging.watching import OURS, watch
from benchmarks.zoo import CASES, case
from benchmarks.zoo.case import Case, select
from benchmarks.zoo.establish import establish
from benchmarks.zoo.facts import OVERFLOW, Facts, bears_out, stands
from benchmarks.zoo.running import fit
from benchmarks.zoo.truth import right_names, truth
from lightning_gradguard import Cause, Fault, GradGuard
from lightning_gradguard.signals.reading import Nothing, reading
from lightning_gradguard.signals.trends import trends_of

LISTED = [
    *(f"V{i:02d}" for i in range(1, 10)),
    *(f"D{i:02d}" for i in range(1, 5)),
    "X01",
    *(f"E{i:02d}" for i in range(1, 11)),
    *("O01", "O02"),
    *(f"H{i:02d}" for i in range(1, 28)),
]


def test_ids_are_unique_and_those_of_the_design_are_all_there():
    ids = [c.id for c in CASES]
    assert len(set(ids)) == len(ids) >= 70
    assert set(LISTED) <= set(ids)


def test_every_kind_of_net_has_sick_and_healthy_cases():
    for kin in (
        "convolutional",
        "residual",
        "transformer",
        "recurrent",
        "generative",
        "graph",
        "mixed precision",
    ):
        assert {c.sick for c in CASES if kin in c.kin} == {True, False}, kin
    assert {c.fault for c in CASES} == {None, *Fault}


@pytest.mark.parametrize("subject", CASES, ids=lambda c: c.id)
def test_a_case_builds_takes_a_step_and_its_culprits_exist(subject):
    training = subject.make(0)
    names = [name for name, p in training.named_parameters() if p.requires_grad]
    for pattern in subject.culprits:
        assert fnmatch.filter(names, pattern), f"{pattern} matches none of {names}"
    fit(dataclasses.replace(subject, steps=2), training)
    assert training.trainer.global_step == 2


def test_the_truth_covers_all_cases_as_they_are_now_and_holds():
    assert set(truth()) == {c.id for c in CASES}
    for subject in CASES:
        entry = truth()[subject.id]
        assert entry["names"] == [f.value for f in subject.names], subject.id
        assert (entry["level"], entry["onset"]) == (subject.level, subject.onset), subject.id
        assert len(entry["seeds"]) >= 3, subject.id
        assert all(seed["holds"] for seed in entry["seeds"].values()), subject.id


@pytest.mark.parametrize("id", ["D01", "E04", "V09", "H14"])
def test_the_truth_can_be_established_again(id):
    assert establish(case(id), 0)["holds"]


def test_a_claim_that_is_not_so_does_not_hold():
    healthy = case("H13")
    wrong = dataclasses.replace(
        healthy,
        fault=Fault.DEAD,
        cause=Cause.DEAD_ACTIVATION,
        culprits=("net.*",),
        mended=healthy.build,
    )
    assert not establish(wrong, 0)["holds"]


def test_a_healthy_run_bears_out_no_fault():
    subject = case("H13")
    facts = Facts(dataclasses.replace(subject, fault=Fault.DEAD, cause=Cause.UNKNOWN, culprits=("*",)))
    fit(subject, subject.make(0), [facts])
    summary = facts.summary()
    assert not [fault for fault in Fault if bears_out(fault, summary, 0)]


def test_an_overflow_is_another_name_only_while_nothing_else_can_be_seen():
    subject = case("E03")
    assert stands(Fault.NONFINITE, subject, {"nonfinite_step": OVERFLOW})
    assert not stands(Fault.NONFINITE, subject, {"nonfinite_step": OVERFLOW + 1})
    assert not stands(Fault.NONFINITE, subject, {"nonfinite_step": None})
    assert stands(Fault.NONFINITE, case("E07"), {"nonfinite_step": 170})


def test_other_names_are_right_only_for_runs_that_bear_them_out():
    for subject in CASES:
        for seed, entry in truth()[subject.id]["seeds"].items():
            names = right_names(subject, int(seed))
            assert names[:1] == subject.names[:1]
            assert all(entry["borne_out"][name.value] for name in names)
    assert right_names(SICK, 0) == SICK.names


def test_facts_are_those_of_a_run_by_hand():
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


def test_a_case_says_what_it_must():
    with pytest.raises(ValueError, match="culprits"):
        Case("Z1", "", lambda seed: None, 0.5, Fault.DEAD, Cause.UNKNOWN)
    with pytest.raises(ValueError, match="healthy"):
        Case("Z2", "", lambda seed: None, 0.5, culprits=("*",))
    with pytest.raises(ValueError, match="why"):
        Case("Z3", "", lambda seed: None, 0.5, Fault.DEAD, Cause.UNKNOWN, ("*",), also=(Fault.STALLED,))
    with pytest.raises(ValueError, match="at least one case"):
        select(CASES, "nothing of the kind")
    assert {c.id for c in select(CASES, "V0*, graph")} > {"V01", "D10", "H42"}


def test_data_are_the_same_for_the_same_seed_and_differ_for_others():
    for id in ("H01", "H36", "H12", "H42", "H14"):
        first, again, other = case(id).make(0), case(id).make(0), case(id).make(1)
        for one, two in zip(first.batch(3), again.batch(3), strict=True):
            assert torch.equal(one, two)
        assert not torch.equal(first.batch(3)[0], first.batch(4)[0])
        assert not torch.equal(first.batch(3)[0], other.batch(3)[0])


@dataclasses.dataclass(frozen=True)
class At:
    """Raises from one step on, and names the largest gradients."""

    step: int
    fault: ClassVar[Fault] = Fault.STALLED
    measures: ClassVar[tuple[str, ...]] = ("steps",)

    def init(self, stats):
        return Nothing()

    def update(self, stats, state):
        steps = trends_of(stats).steps
        return reading(stats, steps > self.step, steps, self.step, score=stats.norms), state


def test_the_runner_reports_what_a_detector_of_known_behaviour_says():
    subject = dataclasses.replace(case("O01"), steps=80)
    run = watch(subject, 0, lambda: GradGuard(detectors=[At(12)]))
    ours = run["alarms"][OURS]
    assert [(f["fault"], f["severity"], f["step"], f["onset"]) for f in ours] == [
        ("stalled", 1, 12, 12),
        ("stalled", 2, 62, 12),
    ]
    training = subject.make(0)
    training.loss(
        *training.batch(12), 12
    ).backward()  # at a rate of 1e-9 the weights are still the first ones
    norms = {n: p.grad.norm().item() for n, p in training.named_parameters()}
    assert ours[0]["parameters"][:3] == sorted(norms, key=norms.get, reverse=True)[:3]
    statistic = run["statistics"]["At: steps"]
    assert statistic["all"] == [1.0, 80.0]
    assert statistic["stuck"] == [31.0, 80.0]
    assert (statistic["raised"], statistic["raised_below"], statistic["limit"]) == (68, 0, 12.0)
    scored = scoring.score_run(subject, run)[OURS]
    assert (scored.alarmed, scored.right_first, scored.right_layer, scored.delay) == (True, True, True, 12)


def test_the_runner_hears_a_nan_at_its_step_and_that_it_did_not_halt():
    run = watch(case("E07"), 0)
    first = run["alarms"][OURS][0]
    assert (first["fault"], first["step"]) == ("nonfinite", 150)
    assert run["halted"] is None
    assert scoring.score_run(case("E07"), run)[OURS].right_first
    assert all(rival and rival[0]["step"] <= 150 for rival in run["alarms"].values())


def test_the_runner_hears_a_halt():
    run = watch(case("E10"), 0)
    assert run["halted"] == "nonfinite"
    assert run["alarms"][OURS][-1]["severity"] == scoring.CRITICAL


def test_a_healthy_run_is_quiet_and_its_page_says_so():
    subject = case("H14")
    run = watch(subject, 0)
    assert not scoring.score_run(subject, run)[OURS].false_alarm
    page = tables.report([subject], [run])
    assert f"| {OURS} | 0 / 0 | 0 / 0 | 0 / 0 | 0 / 1 | - |" in page
    assert "| H14 | linear regression, to a loss of nothing | healthy | - | - | - | - | 1 / 1 |" in page


SICK = Case("Z", "", lambda seed: None, 0.5, Fault.VANISHING, Cause.UNKNOWN, ("net.layers.0.*",), onset=20)


def _alarm(fault, step, severity=1, parameters=("net.layers.0.weight",)):
    return {"fault": fault, "severity": severity, "step": step, "parameters": list(parameters)}


@pytest.mark.parametrize(
    ("alarms", "alarmed", "right_first", "right", "right_layer", "delay"),
    [
        ([], False, False, False, False, None),
        ([_alarm("vanishing", 50)], True, True, True, True, 30),
        ([_alarm("vanishing", 50, severity=0)], False, False, False, False, None),
        ([_alarm("vanishing", 10)], False, False, False, False, None),
        ([_alarm("exploding", 10), _alarm("vanishing", 50)], True, False, True, True, 30),
        ([_alarm("stalled", 40), _alarm("vanishing", 50)], True, False, True, True, 30),
        ([_alarm("spike", 30)], False, False, False, False, None),
        ([_alarm("spike", 30), _alarm("vanishing", 50)], True, True, True, True, 30),
        (
            [_alarm("vanishing", 50, parameters=("a", "b", "c", "net.layers.0.weight"))],
            True,
            True,
            True,
            False,
            30,
        ),
        ([_alarm("vanishing", 50, parameters=())], True, True, True, False, 30),
    ],
)
def test_scores(alarms, alarmed, right_first, right, right_layer, delay):
    scored = scoring.score(SICK, alarms, ours=True)
    assert (scored.alarmed, scored.right_first, scored.right) == (alarmed, right_first, right)
    assert (scored.right_layer, scored.delay) == (right_layer, delay)


def test_an_event_must_neither_become_critical_nor_halt():
    event = dataclasses.replace(SICK, kind="event", fault=Fault.SPIKE)
    assert scoring.score(event, [_alarm("spike", 20)], ours=True).right_first
    assert not scoring.score(event, [_alarm("spike", 20), _alarm("spike", 70, 2)], ours=True).right_first
    assert not scoring.score(event, [_alarm("spike", 20)], ours=True, halted="nonfinite").right_first


def test_a_spike_on_a_healthy_run_is_a_false_alarm_and_a_record_is_not():
    healthy = dataclasses.replace(SICK, fault=None, cause=None, culprits=())
    assert scoring.score(healthy, [_alarm("spike", 20)], ours=True).false_alarm
    assert not scoring.score(healthy, [_alarm("nonfinite", 20, severity=0)], ours=True).false_alarm


def test_a_rival_may_be_right_with_any_alarm_of_its_first_step_and_has_coarser_classes():
    alarms = [_alarm("dead", 30), _alarm("vanishing", 30)]
    assert scoring.score(SICK, alarms, ours=False).right_first
    assert not scoring.score(SICK, alarms, ours=True).right_first
    in_time = dataclasses.replace(SICK, fault=Fault.VANISHING_IN_TIME)
    assert scoring.score(in_time, [_alarm("vanishing", 30)], ours=False).right_first
    assert not scoring.score(in_time, [_alarm("vanishing", 30)], ours=True).right_first


def test_totals_count_runs():
    scores = [
        scoring.score(SICK, [_alarm("vanishing", 50)], ours=True),
        scoring.score(SICK, [_alarm("vanishing", 30)], ours=True),
        scoring.score(SICK, [], ours=True),
        scoring.Score(False, false_alarm=True),
    ]
    assert scoring.total(scores) == scoring.Total(3, 1, 2, 2, 2, 2, 1, 20.0)


def _tensors(*gradients, weights=None):
    """Named parameters with these gradients, weights all one unless given."""
    named = []
    for i, gradient in enumerate(gradients):
        gradient = torch.tensor(gradient)
        parameter = torch.nn.Parameter(
            torch.ones_like(gradient) if weights is None else torch.tensor(weights[i])
        )
        parameter.grad = gradient
        named.append((f"layers.{i}.weight", parameter))
    return named


def _look(rules, named, *, step=0, score=0.0, before=None):
    return {a.fault: a.parameters for a in rules.look(take(step, score, named, before or {}))}


def test_a_snapshot_holds_the_numbers_of_hand_made_gradients():
    named = _tensors([[3.0, 0.0], [0.0, 0.0]], [4.0, -2.0])
    named.append(("untouched", torch.nn.Parameter(torch.ones(2))))
    before = {"layers.0.weight": torch.full((2, 2), 0.5)}
    shot = take(7, 0.25, named, before)
    assert shot.names == ("layers.0.weight", "layers.1.weight")
    assert (shot.step, shot.score, shot.weights, shot.nonfinite) == (7, 0.25, (0,), ())
    assert shot.mean_abs == (0.75, 3.0)
    assert shot.norms == pytest.approx((3.0, math.sqrt(20)))
    assert shot.zeros == (0.75, 0.0)
    assert shot.zero_rows == (0.5, 0.0)
    assert shot.updates[0] == shot.update_norms[0] == 1.0
    assert math.isnan(shot.updates[1])


@pytest.mark.parametrize(
    ("first", "last", "score", "expected"),
    [
        (0.9e-4, 0.1, 0.0, {Fault.VANISHING}),  # ratio 0.9e-3
        (1.1e-4, 0.2, 0.0, set()),  # ratio small, but the norm is above 1e-4
        (0.9e-4, 0.08, 0.0, set()),  # norm small, but the ratio is above 1e-3
        (71.0, 1.0, 0.0, {Fault.EXPLODING}),
        (69.0, 1.0, 0.0, set()),
        (0.0, 0.0, 0.0, {Fault.DEAD}),
        (math.inf, 1.0, 0.9, {Fault.NONFINITE}),
    ],
)
def test_autotrainer(first, last, score, expected):
    rules, said = peers.AutoTrainer(100), {}
    for step in range(40):
        said = said or _look(rules, _tensors([[first]], [[last]]), step=step, score=score)
    assert set(said) == expected


def test_autotrainer_is_silent_while_accuracy_is_good_and_before_a_third_of_training():
    rules = peers.AutoTrainer(100)
    for step in range(40):
        # From 0.5 to 0.9, a gain of 0.4 at once.
        said = _look(rules, _tensors([[71.0]], [[1.0]]), step=step, score=0.5 if step < 10 else 0.9)
        assert not said
    rules = peers.AutoTrainer(100)
    assert not any(_look(rules, _tensors([[71.0]], [[1.0]]), step=step) for step in range(30))


@pytest.mark.parametrize(
    ("gradients", "moved", "expected"),
    [
        ([[0.9e-7]], 1e-3, {Fault.VANISHING}),
        ([[1.1e-7]], 1e-3, set()),
        ([[1.0], [0.0], [0.0]], 1e-3, {Fault.DEAD}),
        ([[1.0], [0.0]], 1e-3, set()),
        ([[1.0]], 10.5, {Fault.OVERSIZED_UPDATE}),
        ([[1.0]], 9.5, set()),
        ([[1.0]], 0.0, {Fault.STALLED}),
        ([[math.nan]], 1e-3, {Fault.NONFINITE}),
    ],
)
def test_sagemaker(gradients, moved, expected):
    named = _tensors(gradients)
    before = {name: p.detach() / (1 + moved) for name, p in named}
    assert set(_look(peers.SageMaker(), named, before=before)) == expected


@pytest.mark.parametrize(
    ("course", "moved", "expected"),
    [
        ([0.9e-6], 1e-3, {Fault.VANISHING}),
        ([1.1e-6], 1e-3, set()),
        ([1.0, 0.5, 0.25, 0.125, 0.0625], 1e-3, {Fault.VANISHING}),
        ([1.0, 0.5, 0.25, 0.125, 0.07], 1e-3, set()),
        ([1.1e6], 1e-3, {Fault.EXPLODING}),
        ([1.0, 2.0, 4.0, 8.0, 16.0], 1e-3, {Fault.EXPLODING}),
        ([1.0], 0.11, {Fault.OVERSIZED_UPDATE}),
        ([1.0], 0.09, set()),
        ([1.0], 0.9e-4, {Fault.STALLED}),
        ([1.0], 0.0, {Fault.STALLED}),
    ],
)
def test_thedeepchecker(course, moved, expected):
    rules = peers.TheDeepChecker()
    for step in range(11):
        value = course[max(0, step - 11 + len(course))]
        named = _tensors([[value]])
        weight = named[0][1].detach().double()
        named[0] = (named[0][0], torch.nn.Parameter(weight))
        named[0][1].grad = torch.tensor([[value]], dtype=torch.float64)
        said = _look(rules, named, step=step, before={"layers.0.weight": weight.float() / (1 + moved)})
        assert not said or step == 10
    assert set(said) == expected


@pytest.mark.parametrize(
    ("means", "zero_share", "epochs", "expected"),
    [
        ([1e-4, 1e-1, 1e2], 0.0, 1, {Fault.VANISHING}),  # each layer is 0.001 of the next
        ([1.0, 50.0, 2500.0], 0.0, 1, {Fault.EXPLODING}),  # median 50
        ([1.0, 9.0, 81.0], 0.0, 1, set()),
        ([0.9e-7, 0.9e-7, 0.9e-7], 0.0, 1, {Fault.VANISHING}),
        ([1.0, 0.0009, 0.0000008], 0.0, 1, {Fault.EXPLODING}),  # each layer is more than 1,000 times the next
        ([1.0, 1.0, 1.0], 0.25, 5, {Fault.DEAD}),
        ([1.0, 1.0, 1.0], 0.25, 4, set()),
        ([1.0, 1.0, 1.0], 0.0, 5, set()),
    ],
)
def test_bttackler(means, zero_share, epochs, expected):
    rules = peers.BTTackler(300)
    rows = int(4 * zero_share)
    named = _tensors(*[[[4 * m / (4 - rows)] if i >= rows else [0.0] for i in range(4)] for m in means])
    said = {}
    for step in range(10 * epochs):
        said = said or _look(rules, named, step=step)
    assert set(said) == expected


def test_bttackler_calls_nothing_vanishing_in_the_second_half():
    rules = peers.BTTackler(20)
    said = [_look(rules, _tensors([[1e-9]], [[1e-9]]), step=step) for step in range(10, 30)]
    assert not any(said)
