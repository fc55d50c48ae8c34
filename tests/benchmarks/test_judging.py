"""Recording and scoring of alarms."""

import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.judging import scoring, tables
from benchmarks.judging.watching import OURS, watch
from benchmarks.zoo import case
from benchmarks.zoo.case import Case
from lightning_gradguard import Cause, Fault, GradGuard
from lightning_gradguard.detectors.base import NoState, reading

FAULTY = Case("Z", "", lambda seed: None, 0.5, Fault.VANISHING, Cause.UNKNOWN, ("net.layers.0.*",), onset=20)


@dataclasses.dataclass(frozen=True)
class At:
    """Detector that raises from one step on and names the largest gradients."""

    step: int
    fault: ClassVar[Fault] = Fault.STALLED
    measures: ClassVar[tuple[str, ...]] = ("steps",)

    def init(self, stats):
        return NoState()

    def update(self, stats, state):
        steps = stats.trends.steps
        return reading(stats, steps > self.step, steps, self.step, score=stats.norms), state


def test_runner_records_findings_of_a_known_detector():
    subject = dataclasses.replace(case("O01"), steps=80)
    run = watch(subject, 0, lambda: GradGuard(detectors=[At(12)]))
    ours = run["alarms"][OURS]
    assert [(f["fault"], f["severity"], f["step"], f["onset"]) for f in ours] == [
        ("stalled", 1, 12, 12),
        ("stalled", 2, 62, 12),
    ]
    training = subject.make(0)
    training.loss(*training.batch(12), 12).backward()  # at a rate of 1e-9 the weights have not changed
    norms = {n: p.grad.norm().item() for n, p in training.named_parameters()}
    assert ours[0]["parameters"][:3] == sorted(norms, key=norms.get, reverse=True)[:3]
    statistic = run["statistics"]["At: steps"]
    assert statistic["all"] == [1.0, 80.0]
    assert statistic["stuck"] == [31.0, 80.0]
    assert (statistic["raised"], statistic["limit"]) == (68, 12.0)
    scored = scoring.score_run(subject, run)[OURS]
    assert (scored.alarmed, scored.right_first, scored.right_layer, scored.delay) == (True, True, True, 12)


def test_runner_records_nan_step_without_halt():
    run = watch(case("E07"), 0)
    first = run["alarms"][OURS][0]
    assert (first["fault"], first["step"]) == ("nonfinite", 150)
    assert run["halted"] is None
    assert scoring.score_run(case("E07"), run)[OURS].right_first
    assert all(rival and rival[0]["step"] <= 150 for rival in run["alarms"].values())


def test_runner_records_halt():
    run = watch(case("E10"), 0)
    assert run["halted"] == "nonfinite"
    assert run["alarms"][OURS][-1]["severity"] == scoring.CRITICAL


def test_healthy_run_has_no_alarms_on_page():
    subject = case("H14")
    run = watch(subject, 0)
    assert not scoring.score_run(subject, run)[OURS].false_alarm
    page = tables.report([subject], [run])
    assert f"| {OURS} | 0 / 0 | 0 / 0 | 0 / 0 | 0 / 1 | - |" in page
    assert "| H14 | linear regression, to a loss of nothing | healthy | - | - | - | - | 1 / 1 |" in page


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
    scored = scoring.score(FAULTY, alarms, ours=True)
    assert (scored.alarmed, scored.right_first, scored.right) == (alarmed, right_first, right)
    assert (scored.right_layer, scored.delay) == (right_layer, delay)


def test_event_must_not_become_critical_or_halt():
    event = dataclasses.replace(FAULTY, kind="event", fault=Fault.SPIKE)
    assert scoring.score(event, [_alarm("spike", 20)], ours=True).right_first
    assert not scoring.score(event, [_alarm("spike", 20), _alarm("spike", 70, 2)], ours=True).right_first
    assert not scoring.score(event, [_alarm("spike", 20)], ours=True, halted="nonfinite").right_first


def test_spike_on_healthy_run_is_false_alarm_but_info_is_not():
    healthy = dataclasses.replace(FAULTY, fault=None, cause=None, culprits=())
    assert scoring.score(healthy, [_alarm("spike", 20)], ours=True).false_alarm
    assert not scoring.score(healthy, [_alarm("nonfinite", 20, severity=0)], ours=True).false_alarm


def test_any_alarm_of_a_rivals_first_step_may_be_right():
    alarms = [_alarm("dead", 30), _alarm("vanishing", 30)]
    assert scoring.score(FAULTY, alarms, ours=False).right_first
    assert not scoring.score(FAULTY, alarms, ours=True).right_first
    in_time = dataclasses.replace(FAULTY, fault=Fault.VANISHING_IN_TIME)
    assert scoring.score(in_time, [_alarm("vanishing", 30)], ours=False).right_first
    assert not scoring.score(in_time, [_alarm("vanishing", 30)], ours=True).right_first


def test_totals_count_runs():
    scores = [
        scoring.score(FAULTY, [_alarm("vanishing", 50)], ours=True),
        scoring.score(FAULTY, [_alarm("vanishing", 30)], ours=True),
        scoring.score(FAULTY, [], ours=True),
        scoring.Score(False, false_alarm=True),
    ]
    assert scoring.total(scores) == scoring.Total(3, 1, 2, 2, 2, 2, 1, 20.0)
