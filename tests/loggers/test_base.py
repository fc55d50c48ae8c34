import threading
import warnings
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.loggers.base import (
    FIRST,
    PATIENCE,
    REST,
    SOON,
    URGENT,
    FailSafe,
    LogRecord,
    Picture,
    PictureQueue,
    merge_records,
)

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


class Clock:
    """Clock that a test sets. A drawing takes as long as it is told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def drawing(self, seconds, png=PNG):
        def draw():
            self.now += seconds
            return png

        return draw


class Writes:
    """A queue as a sink uses it, and the steps of the pictures that it gave by the second of the write."""

    def __init__(self):
        self.clock = Clock()
        self.pictures = PictureQueue("a file", self.clock)
        self.shown = []

    def write(self, step, draws=(), urgent=False):
        record = LogRecord(images={f"a/{i}": draw for i, draw in enumerate(draws)}, is_urgent=urgent)
        self.pictures.start(step, record)
        if self.pictures._current is not None:  # a real training goes on; here the thread is waited for
            self.pictures._current[1].exception()
        self.shown += [(picture.step, self.clock.now - 1000) for picture in self.pictures.take()]

    def close(self):
        self.shown += [(picture.step, None) for picture in self.pictures.take(wait=True)]
        self.pictures.close()


def test_pictures_come_in_order_with_their_step_and_note():
    pictures = PictureQueue("a file")
    pictures.start(3, record_of(lambda: PNG, lambda: PNG + b"1"))
    pictures.start(4, record_of(lambda: PNG + b"2"))
    assert list(pictures.take(wait=True)) == [
        Picture(4, "a/0", "how to read it", PNG + b"2"),  # in place of the older one
        Picture(3, "a/1", "", PNG + b"1"),
    ]
    pictures.close()


def test_nothing_is_drawn_in_the_first_seconds_but_on_closing():
    writes, drawn = Writes(), []
    for second in range(int(FIRST)):
        writes.clock.now = 1000.0 + second
        writes.write(second, [lambda: drawn.append(1) or PNG])
    assert not drawn
    assert writes.pictures._pool is None  # no thread either
    writes.close()
    assert writes.shown == [(int(FIRST) - 1, None)]
    assert len(drawn) == 1


def test_a_picture_that_waits_is_drawn_at_a_later_write_without_one():
    writes = Writes()
    writes.write(0, [writes.clock.drawing(0.0)])
    writes.clock.now += FIRST - 0.1
    writes.write(1)
    assert not writes.shown
    writes.clock.now += 0.2
    writes.write(2)
    assert [step for step, _ in writes.shown] == [0]
    writes.close()
    assert len(writes.shown) == 1


@given(
    gaps=st.lists(st.floats(0.001, 40), min_size=1, max_size=60),
    seconds=st.floats(0.01, 3),
    tags=st.integers(1, 3),
    urgent=st.lists(st.integers(0, 59), max_size=20),
)
def test_drawings_cost_one_per_cent_of_the_time_and_a_few_urgent_ones(gaps, seconds, tags, urgent):
    writes, drawn = Writes(), []

    def draw():
        drawn.append(writes.clock.now)
        writes.clock.now += seconds
        return PNG

    for step, gap in enumerate(gaps):
        writes.write(step, [draw] * tags, urgent=step in urgent)
        writes.clock.now += gap
    assert all(at >= 1000 + SOON for at in drawn)
    # After each drawing comes its rest, except before an urgent one.
    rests = [later - earlier - seconds for earlier, later in pairwise(drawn)]
    assert all(rest >= SOON - 1e-6 for rest in rests)
    early = sum(rest < REST * seconds - 1e-6 for rest in rests) + (bool(drawn) and drawn[0] < 1000 + FIRST)
    assert early <= min(URGENT, tags * len(urgent))
    # The newest of each tag is shown in the end, and no step twice.
    before = len(drawn)
    writes.close()
    assert len(drawn) - before <= tags
    assert {step for step, _ in writes.shown[-tags:]} == {len(gaps) - 1}
    assert len(writes.shown) == len(drawn)


def test_a_merged_record_is_as_urgent_as_its_parts():
    parts = [LogRecord(scalars={"a/b": 1.0}), LogRecord(texts={"a/c": ""}, is_urgent=True)]
    assert merge_records(parts) == LogRecord(scalars={"a/b": 1.0}, texts={"a/c": ""}, is_urgent=True)
    assert not merge_records(parts[:1]).is_urgent


def test_an_urgent_picture_is_drawn_soon_also_if_a_newer_one_replaces_it():
    writes = Writes()
    writes.write(0)
    writes.write(1, [writes.clock.drawing(0.2)], urgent=True)
    writes.write(2, [writes.clock.drawing(0.2)])
    assert not writes.shown
    writes.clock.now += SOON
    writes.write(3)
    assert [step for step, _ in writes.shown] == [2]
    writes.close()


def test_training_does_not_wait_for_a_picture():
    may_go_on = threading.Event()
    clock = Clock()
    pictures = PictureQueue("a file", clock)
    pictures.start(0, LogRecord())
    clock.now += FIRST
    pictures.start(0, record_of(lambda: may_go_on.wait(60) and PNG))
    assert list(pictures.take()) == []
    pictures.start(1, record_of(lambda: PNG))  # waits, though the clock says that it is time
    assert list(pictures.take()) == []
    may_go_on.set()
    assert [picture.step for picture in pictures.take(wait=True)] == [0, 1]
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
