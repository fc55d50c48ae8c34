import threading
import warnings

import pytest

from lightning_gradguard.loggers.base import PATIENCE, FailSafe, LogRecord, Picture, PictureQueue

PNG = b"\x89PNG\r\n\x1a\n and so on"


class Output:
    def __init__(self, fails):
        self.fails = list(fails)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.fails[self.calls - 1]:
            raise OSError("no space left")


def repeat(fail_safe, output):
    for _ in output.fails:
        fail_safe.run(output)


def test_warns_once_and_says_what_failed():
    output, fail_safe = Output([True, False, True]), FailSafe("The file")
    with pytest.warns(UserWarning, match=r"The file failed: OSError: no space left") as caught:
        repeat(fail_safe, output)
    assert len(caught) == 1
    assert output.calls == 3


def test_is_switched_off_after_errors_in_a_row():
    output, fail_safe = Output([True] * 100), FailSafe("The file")
    with pytest.warns(UserWarning, match="it is switched off"):
        repeat(fail_safe, output)
    assert output.calls == PATIENCE
    assert fail_safe.is_off


def test_a_success_resets_the_count():
    output, fail_safe = Output(([True] * (PATIENCE - 1) + [False]) * 5), FailSafe("The file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        repeat(fail_safe, output)
    assert output.calls == len(output.fails)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_does_not_catch_a_request_to_stop(stop):
    def action():
        raise stop

    with pytest.raises(stop):
        FailSafe("The file").run(action)


def record_of(*draws):
    return LogRecord(images={f"a/{i}": draw for i, draw in enumerate(draws)}, notes={"a/0": "how to read it"})


def test_pictures_come_in_order_with_their_step_and_note():
    pictures = PictureQueue("a file")
    pictures.start(3, record_of(lambda: PNG, lambda: PNG + b"1"))
    pictures.start(4, record_of(lambda: PNG + b"2"))
    assert list(pictures.take(wait=True)) == [
        Picture(3, "a/0", "how to read it", PNG),
        Picture(3, "a/1", "", PNG + b"1"),
        Picture(4, "a/0", "how to read it", PNG + b"2"),
    ]
    pictures.close()


def test_training_does_not_wait_for_a_picture():
    may_go_on = threading.Event()
    pictures = PictureQueue("a file")
    pictures.start(0, record_of(lambda: may_go_on.wait(60) and PNG))
    assert list(pictures.take()) == []
    may_go_on.set()
    assert len(list(pictures.take(wait=True))) == 1
    pictures.close()


def test_a_queue_can_be_used_again_after_closing():
    pictures, before = PictureQueue("a file"), threading.active_count()
    for step in range(2):
        pictures.start(step, record_of(lambda: PNG))
        assert [picture.step for picture in pictures.take(wait=True)] == [step]
        pictures.close()
        assert threading.active_count() == before


def test_nothing_to_draw_starts_no_thread():
    pictures, before = PictureQueue("a file"), threading.active_count()
    pictures.start(0, LogRecord(scalars={"a/b": 1.0}))
    assert threading.active_count() == before


@pytest.mark.parametrize("broken", [lambda: 1 / 0, lambda: b"", lambda: b"GIF89a", lambda: None])
def test_a_failed_drawing_warns_once_and_is_switched_off(broken):
    pictures, drawn = PictureQueue("a file"), []

    def draw():
        drawn.append(1)
        return broken()

    with pytest.warns(UserWarning, match="Drawing for a file failed") as caught:
        for step in range(20):
            pictures.start(step, record_of(draw))
            assert list(pictures.take(wait=True)) == []
    pictures.close()
    assert len(caught) == 1
    assert len(drawn) == PATIENCE
