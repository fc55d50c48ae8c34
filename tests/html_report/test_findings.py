import pytest

from lightning_gradguard.html_report.findings import by_fault, diagnoses_of, findings_of, words
from lightning_gradguard.loggers.overview import Overview
from lightning_gradguard.results import Fault, Finding, Report, Severity

NAMES = ("net.0.weight", "net.1.weight", "a, in `b`", "d")


def finding(
    step=0,
    fault=Fault.VANISHING,
    severity=Severity.WARNING,
    value=4.256,
    names=NAMES,
    measure="depth tilt, decades",
):
    return Finding(fault, severity, step, names, value, 3.0, "DepthTilt", measure=measure)


def texts_of(*steps, diagnoses=()):
    """The texts that are written when some findings are made at each step, a text a step."""
    view, texts = Overview(["a"], [1]), []
    for step, found in enumerate(steps):
        report = Report(step, 1.0, 1.0, 1.0, None, 1.0, skip=False, findings=tuple(found), norms={"a": 1.0})
        view.observe(report)
        for diagnosis in diagnoses[step : step + 1]:
            view.diagnose(diagnosis)
        texts += view.panel(report).texts.values()
    return texts


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("severity", list(Severity))
def test_a_finding_comes_back_from_the_text(fault, severity):
    (line,) = findings_of(texts_of([finding(12_345, fault, severity)]))
    assert (line.step, line.fault, line.severity) == (12_345, fault, severity)
    assert (line.measure, line.value, line.limit) == ("depth tilt, decades", "4.26", "3")
    assert line.where.startswith("`net.0.weight`, `net.1.weight`, ")
    assert line.where.endswith(" and 1 more")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -0.0])
def test_odd_numbers_and_no_names_come_back(value):
    (line,) = findings_of(texts_of([finding(value=value, names=(), measure="")]))
    assert (line.value, line.where, line.measure) == (f"{value:.3g}", "", "DepthTilt")


def test_all_texts_together_hold_more_than_the_newest_fifty():
    lines = findings_of(texts_of(*[[finding(step)] for step in range(200)]))
    assert [line.step for line in lines] == list(range(200))


def test_findings_by_fault_the_most_severe_first():
    found = [
        finding(5, Fault.SPIKE, Severity.INFO),
        finding(9),
        finding(30, severity=Severity.CRITICAL),
        finding(2, Fault.STALLED),
    ]
    groups = by_fault(findings_of(texts_of(found)))
    assert [group.fault for group in groups] == [Fault.VANISHING, Fault.STALLED, Fault.SPIKE]
    assert (groups[0].first, groups[0].last, groups[0].count, groups[0].worst.step) == (9, 30, 2, 30)


def test_diagnoses_newest_first_and_each_once():
    texts = texts_of([finding()], [finding(1)], [finding(2)], diagnoses=["### one\n\n* a", "### two"])
    assert diagnoses_of(texts) == ["### two", "### one\n\n* a"]
    assert len(findings_of(texts)) == 3


@pytest.mark.parametrize("text", ["", "words", "* step x: **spike** (info), a 1, limit 2", "---\n\n* step"])
def test_other_text_is_no_finding(text):
    assert findings_of([text]) == []


def test_words():
    assert words(Fault.VANISHING_IN_TIME) == "vanishing in time"
