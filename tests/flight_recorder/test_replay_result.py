"""The text of a replay's result."""

import dataclasses
import math

import pytest

from lightning_gradguard.flight_recorder.replay_result import Recurrence, Replay

PLAIN = Replay(
    verdict=Recurrence.REPRODUCIBLE, fault="nonfinite", step=7, shown="The loss or a gradient is NaN or Inf.",
    rank=None, number=5, rows=(), together=False, every=False, other_random=None, origin=None, recorded_loss=math.nan,
    loss=math.nan, passes=9,
)  # fmt: skip


def text_of(**changes):
    return " ".join(str(dataclasses.replace(PLAIN, **changes)).split())


def test_the_whole_text():
    assert str(PLAIN) == (
        "REPRODUCIBLE: nonfinite at step 7 occurs again, from the recorded weights and data.\n"
        "  result  The loss or a gradient is NaN or Inf.\n"
        "  random  The step draws no random numbers.\n"
        "  next    Look at the model, its weights and the loss.\n"
        "  cost    9 forward and backward passes."
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": (3,)}, "Row 3 of batch 5 causes it; without it the fault does not occur."),
        ({"rows": (3, 9)}, "Rows 3, 9 of batch 5 each cause it; without them the fault"),
        (
            {"rows": tuple(range(20)), "rank": 2},
            "6, 7 and 12 more of batch 5 of rank 2 each cause it",
        ),
        ({"rows": (3, 9), "together": True}, "cause it, together or some of them; without them"),
        ({"together": True}, "The rows of batch 5 cause it only together, or could not be separated"),
        ({"every": True}, "Each row of batch 5 causes it by itself."),
        ({"rank": 1}, "The batch of rank 1 causes it."),
        ({"other_random": 1}, "The fault occurs with 1 of 3 other random seeds."),
        ({"loss": 0.5, "recorded_loss": 0.25}, "0.25 recorded, 0.5 replayed."),
        ({"notes": ("Mind the step.",)}, "note Mind the step."),
        (
            {"verdict": Recurrence.DATA_DEPENDENT},
            "DATA-DEPENDENT: nonfinite at step 7 occurs again, but not with other data.",
        ),
        (
            {"verdict": Recurrence.DATA_DEPENDENT, "rows": (3, 9)},
            "DATA-DEPENDENT: nonfinite at step 7 occurs again, but only with rows 3, 9 of batch 5.",
        ),
        (
            {"verdict": Recurrence.TRANSIENT, "number": None},
            "TRANSIENT: nonfinite at step 7 does not occur again; the flight record does not hold its cause.",
        ),
    ],
)
def test_each_field_is_in_the_text(changes, words):
    assert words in text_of(**changes)


def test_a_verdict_prints_as_its_value():
    assert [str(verdict) for verdict in Recurrence] == ["reproducible", "data-dependent", "transient"]
