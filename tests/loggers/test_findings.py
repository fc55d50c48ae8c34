import json
import math

import pytest
import torch

from lightning_gradguard.loggers.findings import (
    DIAGNOSES,
    FINDINGS,
    SPANS,
    FindingLog,
    FoundRecord,
    LoggedFinding,
)
from lightning_gradguard.results import ClipSpan, Fault, Finding, Severity

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


def flushed(*findings, diagnoses=()):
    log = FindingLog()
    for found in findings:
        log.add(found)
    for diagnosis in diagnoses:
        log.add_diagnosis(diagnosis)
    return log.flush()


@pytest.mark.parametrize("fault", [*Fault, Fault.custom("quantized")])
@pytest.mark.parametrize("severity", list(Severity))
def test_a_finding_is_the_same_after_a_round_trip_through_json(fault, severity):
    _, record = flushed(finding(12_345, fault, severity))
    (logged,) = FoundRecord.from_json(record.to_json()).findings
    assert logged == LoggedFinding(
        12_345, fault.value, severity, NAMES, 4.256, 3.0, measure="depth tilt, decades"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -0.0])
def test_any_number_survives_strict_json(value):
    _, record = flushed(finding(value=value))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(record.to_json(), parse_constant=refuse)
    (logged,) = FoundRecord.from_json(record.to_json()).findings
    assert repr(logged.value) == repr(value)


def test_evidence_names_the_worst_three_tensors():
    assert LoggedFinding.of(finding()).evidence == (
        "Depth tilt, decades: 4.26 (limit 3), worst in `net.0.weight`, `net.1.weight`, `a, in `b`` and 1 more"
    )
    assert LoggedFinding.of(finding(names=())).evidence == "Depth tilt, decades: 4.26 (limit 3)"


def test_a_detector_without_a_measure_is_named():
    assert LoggedFinding.of(finding(measure="")).measure == "DepthTilt"


def test_only_what_is_new_is_recorded_and_the_text_holds_all():
    log = FindingLog()
    assert log.flush() is None
    log.add(finding(1))
    log.add_diagnosis("### one")
    text, record = log.flush()
    assert [f.step for f in record.findings] == [1]
    assert record.diagnoses == ("### one",)
    assert log.flush() is None
    log.add(finding(2))
    log.add(finding(3))
    log.add_diagnosis("### two")
    text, record = log.flush()
    assert [f.step for f in record.findings] == [2, 3]
    assert record.diagnoses == ("### two",)
    places = [text.index(part) for part in ("### two", "### one", "step 3.", "step 2.", "step 1.")]
    assert places == sorted(places)


@pytest.mark.parametrize(("fault", "count"), [(Fault.VANISHING, 1), (Fault.SPIKE, 0)])
def test_our_terms_are_explained_once_where_they_are_used(fault, count):
    text, _ = flushed(finding(0, fault), finding(1, fault))
    assert text.count("factors of ten") == count


def test_text_and_record_are_bounded():
    text, record = flushed(*map(finding, range(1000)), diagnoses=map(str, range(10)))
    assert [f.step for f in record.findings] == list(range(1000 - FINDINGS, 1000))
    assert record.diagnoses == ("7", "8", "9")[-DIAGNOSES:]
    assert text.count("\n* **vanishing**") == FINDINGS


def test_a_resumed_log_repeats_everything_once(tmp_path):
    log, resumed = FindingLog(), FindingLog()
    log.add(finding(1, value=math.nan))
    log.add_diagnosis("### one")
    text, record = log.flush()
    torch.save(log.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert str(resumed.flush()) == str((text, record))
    assert resumed.flush() is None


def test_findings_that_an_older_checkpoint_holds_as_text_are_left_out():
    log = FindingLog()
    log.load_state_dict({"findings": ["* step 1: **spike** (info), a 1, limit 2"], "diagnoses": ["### one"]})
    # No heading stands above an empty list of findings.
    assert log.flush() == ("### one", FoundRecord((), ("### one",)))


def test_spans_of_clipping_are_news_when_they_begin_and_end():
    log = FindingLog()
    log.set_spans([])
    assert log.flush() is None
    begun, ended = ClipSpan(7, None, ("spike",)), ClipSpan(7, 1200, ("spike", "exploding"))
    for span in (begun, ended):
        log.set_spans([span])
        text, record = log.flush()
        assert text == f"### Clipped for a fault, newest first\n\n* {span}"
        assert FoundRecord.from_json(record.to_json()) == FoundRecord(spans=(span,))
        log.set_spans([span])
        assert log.flush() is None


def test_the_newest_spans_are_kept():
    log = FindingLog()
    spans = [ClipSpan(2 * i, 2 * i, ("spike",)) for i in range(SPANS + 5)]
    log.set_spans(spans)
    text, record = log.flush()
    assert record.spans == tuple(spans[5:])
    assert text.splitlines()[2] == f"* {spans[-1]}"


def test_a_record_of_an_older_version_has_no_spans():
    assert FoundRecord.from_json('{"findings":[],"diagnoses":["a"]}') == FoundRecord(diagnoses=("a",))
