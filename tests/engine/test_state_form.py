"""Damaged states of a guard: an error in one sentence, and the guard stays as it was."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard import Guard, NormClip, SpikeClip
from lightning_gradguard.engine.state_form import check_state

JUNK = [
    *(None, True, -1, 7, 0.5, float("nan"), "x", [], [1], ["x"], [[]], {}, {"a": 1}, (), object(), b"x"),
    *(
        torch.zeros(0),
        torch.zeros(3),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor(True),
        torch.eye(2).to_sparse(),
    ),
]


CLIPPER = SpikeClip()


def trained(lag=None, steps=20, clipper=CLIPPER):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    guard = Guard(model.named_parameters(), optimizer=optimizer, clipper=clipper, lag=lag)

    def step():
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        return guard.step(loss=loss)

    for _ in range(steps):
        step()
    return guard, step


def places(state, path=()):
    """Yield the path of each part of a state."""
    yield path
    for key, part in state.items() if isinstance(state, dict) else []:
        yield from places(part, (*path, key))
    for index, part in enumerate(state) if isinstance(state, (list, tuple)) else []:
        yield from places(part, (*path, index))


def damaged(state, path, value, *, remove=False):
    """Return a copy with one part replaced or removed."""
    if not path:
        return value
    copied = list(state) if isinstance(state, (list, tuple)) else dict(state)
    if remove and len(path) == 1:
        del copied[path[0]]
    else:
        copied[path[0]] = damaged(state[path[0]], path[1:], value, remove=remove)
    return copied


STATES = {lag: trained(lag)[0].state_dict() for lag in (0, 1)}
PLACES = {lag: list(places(state)) for lag, state in STATES.items()}


@pytest.mark.filterwarnings("ignore::lightning_gradguard.GradientWarning")
@given(st.data())
def test_a_damaged_state_is_refused_or_can_be_trained_on(data):
    lag = data.draw(st.sampled_from((0, 1)))
    path = data.draw(st.sampled_from(PLACES[lag]))
    remove = data.draw(st.booleans()) and bool(path)
    state = damaged(STATES[lag], path, data.draw(st.sampled_from(JUNK)), remove=remove)
    guard, step = trained(lag, steps=3)
    before = copy.deepcopy(guard.state_dict())
    refusal = None
    try:
        guard.load_state_dict(state)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert "\n" not in refusal
        assert repr(guard.state_dict()) == repr(before)
    for _ in range(12):
        step()
    guard.state_dict()
    guard.close()


@pytest.mark.parametrize("lag", [0, 1])
def test_a_whole_state_is_accepted(lag):
    check_state(STATES[lag], trained(lag, steps=0)[0].state_dict())


def test_the_message_names_the_place():
    guard, _ = trained()
    state = guard.state_dict()
    state["watch"]["order"] = [99, 98]
    with pytest.raises(ValueError, match=r"\['watch'\]\['order'\] must be each index .* got \[99, 98\]"):
        guard.load_state_dict(state)


def test_a_state_without_a_field_of_this_version_keeps_the_rest():
    guard, _ = trained()
    state = copy.deepcopy(guard.state_dict())
    del state["states"][0]["slow_loss"]
    fresh, _ = trained(steps=0)
    fresh.load_state_dict(state)
    assert fresh.state.trends.steps == guard.state.trends.steps
    assert fresh.state.trends.slow_loss == 0


def test_a_state_of_another_clipper_is_refused():
    with pytest.raises(ValueError, match="same detectors and clipper"):
        trained(clipper=NormClip(1.0))[0].load_state_dict(STATES[0])
