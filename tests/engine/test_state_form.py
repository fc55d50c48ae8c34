"""Damaged states of a guard: an error in one sentence, and the guard stays as it was."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard import (
    AGC,
    AdaGC,
    AutoClip,
    GradientHalt,
    Guard,
    NormClip,
    Policy,
    SpikeClip,
    SteadyClip,
    ZClip,
)
from lightning_gradguard.engine.parameter_tracker import StateError
from lightning_gradguard.engine.state_form import check_state
from tests.damage import JUNK, damaged_tensor, damaged_value, part_of, places, replaced

many = settings(max_examples=4 * settings.default.max_examples)

CLIPPER = SpikeClip()
CLIPPERS = [
    *(None, CLIPPER, NormClip(1.0), AGC(), AutoClip(), AutoClip(percentile=90), AdaGC(warmup_steps=4)),
    *(ZClip(warmup_steps=3), ZClip(max_grad_norm=None), SpikeClip(exclude=("0.bias",)), SteadyClip()),
]
#: Numbers that a state may hold by damage.
WHOLE = [0, -1, 1, 2**31, 2**62, -(2**63), 10**30]
REAL = [float("nan"), float("inf"), -float("inf"), -1.0, 1e308, 0.0]


def trained(lag=None, steps=20, clipper=CLIPPER):
    """Return a guard with all detectors, a function that takes a step and returns its report, and the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    guard = Guard(model.named_parameters(), optimizer=optimizer, clipper=clipper, lag=lag)
    inputs = torch.Generator().manual_seed(1)

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(3, 4, generator=inputs)).square().mean()
        loss.backward()
        report = guard.step(loss=loss)
        if not report.skip:
            optimizer.step()
        return report

    for _ in range(steps):
        step()
    return guard, step, model


def is_number(value):
    return isinstance(value, (torch.Tensor, int, float))


def with_other_numbers(state, source, times):
    """Return a state in which some numbers are extreme, at most of the right form."""
    own = [path for path in places(state) if is_number(part_of(state, path))]
    for path in [source.choice(own) for _ in range(times)]:
        number = part_of(state, path)
        if isinstance(number, torch.Tensor):
            other = damaged_tensor(number, source)
        elif isinstance(number, bool):
            other = not number
        else:
            other = source.choice(WHOLE if isinstance(number, int) else REAL)
        state = replaced(state, path, other)
    return state


def is_same(a, b):
    """Return True for equal states; NaN is equal to NaN."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and repr(a.tolist()) == repr(b.tolist())
    if isinstance(a, dict):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return repr(a) == repr(b)


STATES = {
    (place, lag): trained(lag, clipper=clipper)[0].state_dict()
    for place, clipper in enumerate(CLIPPERS)
    for lag in (0, 1)
}


@many
@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
@given(st.integers(0, len(CLIPPERS) - 1), st.sampled_from((0, 0, 1)), st.integers(0, 2**32))
def test_a_damaged_state_is_refused_or_can_be_trained_on(place, lag, seed):
    source = random.Random(seed)
    how = source.choice(["parts", "numbers", "detectors"])
    state = STATES[place, lag]
    if how == "parts":
        state = damaged_value(state, source, source.choice([1, 1, 2, 4]))
    elif how == "numbers":
        state = with_other_numbers(state, source, source.choice([1, 1, 20]))
    else:  # of the detectors, the clipper and the running statistics
        state = {**state, "states": with_other_numbers(state["states"], source, source.choice([1, 3]))}
    guard, step, model = trained(lag, steps=3, clipper=CLIPPERS[place])
    before = copy.deepcopy(guard.state_dict())
    refusal = None
    try:
        guard.load_state_dict(state)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.isprintable()
        assert is_same(guard.state_dict(), before)
    try:
        for _ in range(12):
            assert 0 <= step().scale <= 1
            assert all(parameter.isfinite().all() for parameter in model.parameters())
        trained(lag, steps=0, clipper=CLIPPERS[place])[0].load_state_dict(guard.state_dict())
        guard.close()
    except GradientHalt:
        assert refusal is None, "a guard that refused a state halts for its own reasons only"


@pytest.mark.parametrize("value", JUNK, ids=lambda value: type(value).__name__)
def test_what_is_no_state_is_refused_in_one_sentence(value):
    guard, _, _ = trained(steps=3)
    for state in (
        value,
        {"version": value},
        {"version": 5, "kinds": value},
        {**STATES[1, 0], "kinds": value},
    ):
        with pytest.raises(ValueError, match="state") as caught:
            guard.load_state_dict(state)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) <= 1000


@pytest.mark.parametrize("lag", [0, 1])
def test_a_whole_state_is_accepted(lag):
    check_state(STATES[1, lag], trained(lag, steps=0)[0].state_dict())


def test_the_message_names_the_place():
    guard, *_ = trained()
    state = guard.state_dict()
    state["watch"]["order"] = [99, 98]
    with pytest.raises(ValueError, match=r"\['watch'\]\['order'\] must be each index .* got \[99, 98\]"):
        guard.load_state_dict(state)


def test_a_state_without_a_field_of_this_version_keeps_the_rest():
    guard, *_ = trained()
    state = copy.deepcopy(guard.state_dict())
    del state["states"][0]["slow_loss"]
    fresh, *_ = trained(steps=0)
    fresh.load_state_dict(state)
    assert fresh.state.trends.steps == guard.state.trends.steps
    assert fresh.state.trends.slow_loss == 0


def test_a_state_of_another_clipper_is_refused():
    with pytest.raises(ValueError, match="same detectors and clipper"):
        trained(clipper=NormClip(1.0))[0].load_state_dict(STATES[1, 0])


@pytest.mark.parametrize("clipper", [c for c in CLIPPERS if c is not None], ids=repr)
@pytest.mark.parametrize("number", [-1.0, -1e38, float("-inf")])
def test_a_clipper_scales_by_no_less_than_zero_whatever_its_state_holds(clipper, number):
    guard, *_ = trained(clipper=clipper)
    state = guard.state_dict()
    state["states"][-1] = {
        name: torch.full_like(part, number) if part.is_floating_point() else part
        for name, part in state["states"][-1].items()
    }
    guard, step, model = trained(clipper=clipper)
    guard.load_state_dict(state)
    for _ in range(5):
        report = step()
        assert 0 <= report.scale <= 1
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("in_force", 1),
        ("left", None),
        ("left", True),
        ("faults", "spike"),
        ("newest", 1.5),
        ("spans", [[1, 2]]),
        ("spans", [[1, "2", ["spike"]]]),
        ("spans", [[None, None, []]]),
    ],
)
def test_a_damaged_clip_response_is_refused(part, value):
    guard = Guard([("a", nn.Parameter(torch.ones(2)))], policy=Policy(respond={"spike": "clip"}))
    state = guard.state_dict()
    state["judge"]["clip_response"][part] = value
    with pytest.raises(StateError, match=rf"clip_response'\]\['{part}'\]"):
        guard.load_state_dict(state)
    assert guard.state_dict()["judge"]["clip_response"][part] != value
