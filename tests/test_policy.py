import dataclasses

import pytest

from lightning_gradguard.policy import Policy
from lightning_gradguard.results import Fault


def test_default_warns_and_skips_only_nonfinite():
    assert {f: Policy().response(f) for f in Fault if f != Fault.NONFINITE} == {
        f: "warn" for f in Fault if f != Fault.NONFINITE
    }
    assert Policy().response(Fault.NONFINITE) == "skip"
    assert Policy.watch() == Policy()


def test_strict_halts_on_everything():
    assert all(Policy.strict().response(f) == "halt" for f in Fault)


def test_protect_halts_on_exploding_only():
    policy = Policy.protect()
    assert [f for f in Fault if policy.response(f) == "halt"] == [Fault.EXPLODING]
    assert policy.response("nonfinite") == "skip"


def test_keys_are_faults_or_their_values():
    assert Policy(respond={Fault.DEAD: "halt"}).response("dead") == "halt"
    assert Policy(respond={"dead": "halt"}).response(Fault.DEAD) == "halt"


def test_policy_is_frozen_and_printable():
    assert "patience=7" in repr(Policy(patience=7))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().patience = 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"respond": {"vanishin": "warn"}}, ["'vanishin'", "did you mean 'vanishing'"]),
        ({"respond": {"banana": "warn"}}, ["'banana'", "'exploding'"]),
        ({"respond": {"dead": "stop"}}, ["'stop'", "'halt'"]),
        ({"patience": -1}, ["patience", "-1", "0 or more"]),
        ({"patience": True}, ["patience"]),
        ({"patience": 1.5}, ["patience", "1.5"]),
        ({"max_consecutive_skips": -2}, ["max_consecutive_skips", "-2"]),
    ],
)
def test_errors_name_argument_value_and_fix(arguments, words):
    with pytest.raises(ValueError, match=r".") as caught:
        Policy(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_respond_must_be_a_mapping():
    with pytest.raises(TypeError, match=r"respond must map"):
        Policy(respond=["halt"])


def test_a_custom_fault_that_no_one_named_halts_only_where_every_fault_does():
    quantized = Fault.custom("quantized")
    assert Policy.strict().response(quantized) == "halt"
    assert Policy.protect().response(quantized) == "warn"
    assert Policy(respond={"quantized": "halt"}).response(quantized) == "halt"


def test_clip_is_for_faults_that_clipping_can_end():
    own = Fault.custom("quantized")
    policy = Policy(respond={"exploding": "clip", Fault.SPIKE: "clip", own: "clip"})
    assert [f for f in Fault.known() if policy.response(f) == "clip"] == [Fault.EXPLODING, Fault.SPIKE, own]
    assert policy.clips
    assert not any(policy.clips for policy in (Policy.watch(), Policy.protect(), Policy.strict()))


@pytest.mark.parametrize("fault", [f for f in Fault if f not in (Fault.EXPLODING, Fault.SPIKE)])
def test_other_faults_cannot_be_clipped(fault):
    fix = "use 'skip'" if fault == Fault.NONFINITE else "use 'warn'"
    with pytest.raises(ValueError, match=rf"respond\['{fault}'\] must not be 'clip', .*{fix}$"):
        Policy(respond={fault: "clip"})
