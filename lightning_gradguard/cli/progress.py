"""Show that a command is at work, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.text import Text

#: Seconds that need no line.
SHORT = 2.0
#: Times that a bar is drawn, and lines that it becomes where there is no terminal.
_FRAMES, _LINES = 100, 4


@contextmanager
def show_status(text: str) -> Iterator[None]:
    """Show a spinner while something of unknown length runs.

    Without a terminal it is one line, once it has lasted for `SHORT` seconds. What is printed meanwhile goes where it
    went before: through the display only where both are the terminal.

    Args:
        text: The activity, such as "Replaying the step".
    """
    console = Console(stderr=True, highlight=False, markup=False)
    if console.is_terminal:
        with Live(
            Spinner("dots", Text(text)), console=console, transient=True, redirect_stdout=sys.stdout.isatty()
        ):
            yield
        return

    line = Timer(SHORT, lambda: print(f"{text} ...", file=sys.stderr, flush=True))
    line.daemon = True
    line.start()
    try:
        yield
    finally:
        line.cancel()


@contextmanager
def show_bar(text: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar; yield the function that moves it by one.

    Without a terminal there is a line at the start and at each quarter. Nothing is drawn between two calls of the
    function, and no thread is started, so that what is timed in between is not disturbed.

    Args:
        text: The activity, such as "Timing steps".
        total: Number of calls.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns,
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        ) as bar:
            task = bar.add_task(text, total=total)
            bar.refresh()

            def advance() -> None:
                bar.advance(task)
                if _crosses(int(bar.tasks[0].completed), total, _FRAMES):
                    bar.refresh()

            yield advance
        return

    done = 0
    print(f"{text}: 0 of {total}", file=sys.stderr, flush=True)

    def count() -> None:
        nonlocal done
        done += 1
        if _crosses(done, total, _LINES):
            print(f"{text}: {done} of {total}", file=sys.stderr, flush=True)

    yield count


def _crosses(done: int, total: int, parts: int) -> bool:
    """Return True if this call completes one of the equal parts."""
    return done * parts // total > (done - 1) * parts // total
