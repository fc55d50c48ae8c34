"""Faults, findings and reports as plain data; a custom fault is a fault in every respect."""

import copy
import pickle
import subprocess
import sys

import pytest

from lightning_gradguard import Fault, Finding, Policy, Severity

QUANTIZED = Fault.custom("quantized")


def test_a_custom_fault_is_one_object_under_its_name():
    assert Fault.custom("quantized") is QUANTIZED
    assert Fault("quantized") is QUANTIZED
    assert isinstance(QUANTIZED, Fault)
    assert (QUANTIZED, str(QUANTIZED), QUANTIZED.name) == ("quantized", "quantized", "QUANTIZED")
    assert {QUANTIZED: 1}["quantized"] == 1


def test_built_in_faults_are_those_that_are_iterated_over():
    assert QUANTIZED not in list(Fault)
    assert len(Fault) == 10
    assert Fault.known()[:10] == tuple(Fault)
    assert QUANTIZED in Fault.known()
    assert [f.is_custom for f in Fault] == [False] * 10
    assert QUANTIZED.is_custom


def test_custom_faults_come_last():
    assert [f.precedence for f in Fault] == list(range(10))
    assert QUANTIZED.precedence == Fault.custom("another_one").precedence == 10


@pytest.mark.parametrize("fault", [QUANTIZED, Fault.SPIKE])
def test_copies_are_the_fault_itself(fault):
    assert copy.deepcopy(fault) is fault
    assert copy.copy(fault) is fault
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(fault, protocol)) is fault


def test_another_process_reads_a_finding_of_a_fault_it_has_not_made():
    finding = Finding(QUANTIZED, Severity.WARNING, 3, ("a",), 2.0, 1.0, "Quantized")
    code = "import pickle, sys; print(repr(pickle.loads(bytes.fromhex(sys.argv[1])).fault))"
    done = subprocess.run(
        [sys.executable, "-c", code, pickle.dumps(finding).hex()], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "<Fault.QUANTIZED: 'quantized'>", done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spike", "use Fault.SPIKE"),
        ("Quantized", "lower-case"),
        ("", "lower-case"),
        ("two words", "lower-case"),
        ("3d", "lower-case"),
        (None, "got None"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Fault.custom(name)
    with pytest.raises(ValueError, match="is not a valid Fault"):
        Fault("never_made")


def test_a_policy_knows_custom_faults():
    assert Policy().response("quantized") == "warn"
    assert Policy(respond={"quantized": "halt"}).response(QUANTIZED) == "halt"
    assert Policy(respond={QUANTIZED: "skip"}) == Policy(respond={"quantized": "skip"})
    with pytest.raises(ValueError, match="did you mean 'quantized'"):
        Policy(respond={"quantised": "halt"})


def test_a_strict_policy_halts_on_custom_faults_also_on_those_made_later():
    strict = Policy.strict()
    assert strict.response(Fault.custom("made_after_the_policy")) == "halt"
    assert Policy.protect().response(QUANTIZED) == "warn"
    assert repr(strict) == repr(Policy.strict())


def test_another_process_reads_a_policy_with_a_fault_it_has_not_made():
    policy = Policy(respond={"quantized": "skip"})
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).response('quantized'))"
    done = subprocess.run(
        [sys.executable, "-c", code, pickle.dumps(policy).hex()], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "skip", done.stderr
