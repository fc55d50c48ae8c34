import threading

import pytest

from lightning_gradguard.loggers.base import PATIENCE, LogRecord
from lightning_gradguard.loggers.pictures import Picture, Pictures

PNG = b"\x89PNG\r\n\x1a\n and so on"


def panel_of(*draws):
    return LogRecord(images={f"a/{i}": draw for i, draw in enumerate(draws)}, notes={"a/0": "how to read it"})


def test_pictures_come_in_order_with_their_step_and_note():
    pictures = Pictures("a wall")
    pictures.start(3, panel_of(lambda: PNG, lambda: PNG + b"1"))
    pictures.start(4, panel_of(lambda: PNG + b"2"))
    assert list(pictures.done(wait=True)) == [
        Picture(3, "a/0", "how to read it", PNG),
        Picture(3, "a/1", "", PNG + b"1"),
        Picture(4, "a/0", "how to read it", PNG + b"2"),
    ]
    pictures.close()


def test_nobody_waits_for_a_picture():
    may_go_on = threading.Event()
    pictures = Pictures("a wall")
    pictures.start(0, panel_of(lambda: may_go_on.wait(60) and PNG))
    assert list(pictures.done()) == []
    may_go_on.set()
    assert len(list(pictures.done(wait=True))) == 1
    pictures.close()


def test_it_can_be_used_again_after_closing():
    pictures, before = Pictures("a wall"), threading.active_count()
    for step in range(2):
        pictures.start(step, panel_of(lambda: PNG))
        assert [picture.step for picture in pictures.done(wait=True)] == [step]
        pictures.close()
        assert threading.active_count() == before


def test_nothing_to_draw_starts_no_thread():
    pictures, before = Pictures("a wall"), threading.active_count()
    pictures.start(0, LogRecord(scalars={"a/b": 1.0}))
    assert threading.active_count() == before


@pytest.mark.parametrize("broken", [lambda: 1 / 0, lambda: b"", lambda: b"GIF89a", lambda: None])
def test_a_failed_drawing_is_warned_of_once_and_given_up(broken):
    pictures, drawn = Pictures("a wall"), []

    def draw():
        drawn.append(1)
        return broken()

    with pytest.warns(UserWarning, match="Drawing for a wall failed") as caught:
        for step in range(20):
            pictures.start(step, panel_of(draw))
            assert list(pictures.done(wait=True)) == []
    pictures.close()
    assert len(caught) == 1
    assert len(drawn) == PATIENCE
