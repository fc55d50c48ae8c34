"""Progress goes to standard error, as lines where there is no terminal, and leaves standard output alone."""

import os
import subprocess
import sys
import threading

import pytest

from lightning_gradguard.cli import progress
from lightning_gradguard.cli.progress import show_bar, show_status

SCRIPT = """
import sys
from lightning_gradguard.cli.progress import show_bar, show_status
with show_status("Reading [red]runs"):
    print("from inside")
with show_bar("Timing [b]", 8) as advance:
    for _ in range(8):
        advance()
print("after", file=sys.stdout)
"""


@pytest.mark.parametrize("total", [1, 3, 4, 10, 289])
def test_a_bar_becomes_a_few_lines(capsys, total):
    with show_bar("Timing [b]steps", total) as advance:
        for _ in range(total):
            advance()
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert printed.out == ""
    assert lines[0] == f"Timing [b]steps: 0 of {total}"
    assert lines[-1] == f"Timing [b]steps: {total} of {total}"
    assert len(lines) == 1 + min(total, 4)


def test_a_status_is_one_line_where_it_lasts_and_none_where_it_does_not(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SHORT", 0.0)
    printed = ""
    with pytest.raises(KeyError), show_status("Replaying [x]"):
        while not printed:
            printed = capsys.readouterr().err
        raise KeyError
    assert printed == "Replaying [x] ...\n"
    monkeypatch.setattr(progress, "SHORT", 3600.0)
    before = threading.active_count()
    with show_status("Replaying [x]"):
        pass
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()  # cancelled, so that nothing waits for it
    assert threading.active_count() <= before
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize("both", [True, False])
def test_on_a_terminal_it_moves_and_disappears(both):
    """With standard output in a file, what is printed meanwhile still goes to the file."""
    ours, theirs = os.openpty()
    out = theirs if both else subprocess.PIPE
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(
        command, stdout=out, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    ) as running:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            shown += part
        printed = running.stdout.read() if running.stdout else shown
    os.close(ours)
    assert running.returncode == 0
    assert b"Reading [red]runs" in shown
    assert b"8/8" in shown
    assert b"from inside" in printed
    assert b"after" in printed
    assert both or printed.split() == [b"from", b"inside", b"after"]
