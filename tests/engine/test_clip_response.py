"""When the response "clip" is in force, and its spans, on plain numbers."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.engine.clip_response import CLIP_FORM, KEPT_SPANS, ClipResponse
from lightning_gradguard.forms import check_form
from lightning_gradguard.results import ClipSpan

FAULTS = st.lists(
    st.sampled_from([(), (), (), ("spike",), ("exploding",), ("exploding", "spike")]), max_size=60
)
HOLDS = st.integers(0, 8)


def run(response, verdicts, first=0):
    """Return at which steps it is in force; each verdict counts for its own step."""
    forced = []
    for step, faults in enumerate(verdicts, first):
        response.follow(faults)
        forced.append(response.act(step))
    return forced


@given(FAULTS, HOLDS)
def test_it_is_in_force_at_a_fault_and_for_the_hold_after_it(verdicts, hold):
    forced = run(ClipResponse(hold), verdicts)
    for step in range(len(verdicts)):
        assert forced[step] == any(verdicts[max(step - hold, 0) : step + 1])


@given(FAULTS, HOLDS)
def test_spans_are_the_steps_at_which_it_was_in_force(verdicts, hold):
    response = ClipResponse(hold)
    forced = run(response, verdicts)
    steps = set()
    for span in response.spans:
        last = len(verdicts) - 1 if span.last is None else span.last
        steps |= set(range(span.first, last + 1))
        found = [fault for faults in verdicts[span.first : last + 1] for fault in faults]
        assert span.faults == tuple(dict.fromkeys(found))
    assert steps == {step for step, is_forced in enumerate(forced) if is_forced}
    assert [span.last is None for span in response.spans].count(True) == bool(forced and forced[-1])
    assert response.since == (response.spans[-1].first if forced and forced[-1] else None)


@given(FAULTS, FAULTS, HOLDS)
def test_it_goes_on_from_its_state(before, after, hold):
    whole, part, resumed = (ClipResponse(hold) for _ in range(3))
    expected = run(whole, [*before, *after])
    run(part, before)
    state = part.state_dict()
    check_form(state, CLIP_FORM, "the state")
    resumed.load_state_dict(state)
    assert run(resumed, after, len(before)) == expected[len(before) :]
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.spans == whole.spans


def test_old_spans_are_dropped():
    response = ClipResponse(0)
    run(response, [("spike",), ()] * (KEPT_SPANS + 10))
    assert len(response.spans) == KEPT_SPANS
    assert response.spans[0] == ClipSpan(20, 20, ("spike",))


def test_a_fault_of_a_step_that_is_not_taken_still_names_the_span():
    response = ClipResponse(3)
    response.follow(["spike"])
    run(response, [()], first=8)
    assert response.spans == (ClipSpan(8, None, ("spike",)),)


def test_spans_that_are_kept_over_a_rollback_end_unless_it_is_still_in_force():
    before, healthy = ClipResponse(3), ClipResponse(3)
    run(before, [("spike",), (), ()], first=5)
    healthy.keep_spans(before.spans, before.newest)
    assert healthy.spans == (ClipSpan(5, 7, ("spike",)),)
    assert not healthy.act(8)

    state = before.state_dict()
    run(before, [()], first=8)
    again = ClipResponse(3)
    again.load_state_dict(state)
    again.keep_spans(before.spans, before.newest)
    assert run(again, [(), ()], first=9) == [True, False]
    assert again.spans == (ClipSpan(5, 9, ("spike",)),)


def test_a_span_in_words():
    assert str(ClipSpan(1200, None, ("spike",))) == "from step 1,200 on because of spike"
    assert str(ClipSpan(7, 7, ("spike",))) == "at step 7 because of spike"
    both = ClipSpan(120, 4800, ("spike", "exploding"))
    assert str(both) == "from step 120 to 4,800 because of spike and exploding"
