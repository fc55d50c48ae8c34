"""How the word about a replay reads."""

import dataclasses
import math

import pytest

from lightning_gradguard.flight_recorder.replay_result import Recurrence, Replay

PLAIN = Replay(
    verdict=Recurrence.REPRODUCIBLE, fault="nonfinite", step=7, shown="loss or gradients are not finite", rank=None,
    number=5, rows=(), together=False, every=False, other_random=None, origin=None, recorded_loss=math.nan,
    loss=math.nan, passes=9,
)  # fmt: skip


def told(**changes):
    return " ".join(str(dataclasses.replace(PLAIN, **changes)).split())


def test_the_whole_text():
    assert str(PLAIN) == (
        "REPRODUCIBLE: nonfinite at step 7 comes again.\n"
        "  shown   Loss or gradients are not finite.\n"
        "  random  No random numbers are drawn.\n"
        "  so      look at the model, its weights and the loss.\n"
        "  cost    9 passes."
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": (3,)}, "Row 3 of batch 5 brings it; without it the batch is without fault."),
        ({"rows": (3, 9)}, "Rows 3, 9 of batch 5 bring it; without them"),
        (
            {"rows": tuple(range(20)), "rank": 2},
            "6, 7 and 12 more of batch 5 of rank 2 bring it",
        ),
        ({"rows": (3, 9), "together": True}, "bring it, together or in part; without them"),
        ({"together": True}, "No part of batch 5 brings it alone: it takes rows of both halves."),
        ({"every": True}, "Each row of batch 5 brings it."),
        ({"rank": 1}, "It is the batch of rank 1."),
        ({"other_random": 1}, "With 1 of 3 other seeds it comes, too."),
        ({"loss": 0.5, "recorded_loss": 0.25}, "0.25 recorded, 0.5 replayed."),
        ({"notes": ("Mind the step.",)}, "note Mind the step."),
        ({"verdict": Recurrence.DATA_DEPENDENT}, "DATA-DEPENDENT: nonfinite at step 7 comes again."),
        (
            {"verdict": Recurrence.TRANSIENT, "number": None},
            "TRANSIENT: nonfinite at step 7 does not come again.",
        ),
    ],
)
def test_each_thing_is_said(changes, words):
    assert words in told(**changes)


def test_a_verdict_prints_as_its_word():
    assert [str(verdict) for verdict in Recurrence] == ["reproducible", "data-dependent", "transient"]
