"""Draws pictures on a thread, so that training does not wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from lightning_gradguard.loggers.base import FailSafe, LogRecord

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Picture(NamedTuple):
    """A picture that is done.

    Attributes:
        step: The step which it shows.
        tag: Its tag.
        note: How to read it.
        png: The file.
    """

    step: int
    tag: str
    note: str
    png: bytes


class Pictures:
    """The pictures of one output. One that fails is warned of once, and the others go on.

    Args:
        output: Whom they are for, for the warning.
    """

    def __init__(self, output: str) -> None:
        # Apart, since a drawing that can be started may still fail, again and again.
        self._fuse, self._thread_fuse = FailSafe(f"Drawing for {output}"), FailSafe(f"Drawing for {output}")
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[tuple[int, str, str, Future[bytes]]] = []

    def start(self, step: int, panel: LogRecord) -> None:
        """Starts to draw the pictures of a panel."""
        if panel.images and not self._fuse.blown:
            self._thread_fuse.run(lambda: self._submit(step, panel))

    def done(self, *, wait: bool = False) -> Iterator[Picture]:
        """Takes out the pictures that are done, in order; all of them if it may ``wait``."""
        # One thread draws, so they are done in order.
        while self._pending and (wait or self._pending[0][-1].done()):
            step, tag, note, drawing = self._pending.pop(0)
            png = self._fuse.run(drawing.result)
            if png is not None:
                yield Picture(step, tag, note, png)

    def close(self) -> None:
        """Ends the thread; it begins anew with the next picture."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _submit(self, step: int, panel: LogRecord) -> None:
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="gradguard-draw")
        for tag, draw in panel.images.items():
            self._pending.append((step, tag, panel.notes.get(tag, ""), self._pool.submit(_drawn, draw)))


def _drawn(draw: Callable[[], bytes]) -> bytes:
    png = draw()
    if not png.startswith(_SIGNATURE):
        raise ValueError("what was drawn is no PNG")
    return png
