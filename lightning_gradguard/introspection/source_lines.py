"""Line of the user's code that computed something, without the lines of a framework."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

#: Packages whose lines are skipped.
_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_gradguard")
_FRAME = re.compile(r'File "(.+?)", line (\d+)')


def current_line() -> str:
    """Return the user's innermost running line, such as ``model.py:42``; empty without one."""
    frame = sys._getframe(1)
    while frame is not None:
        if _is_users(frame.f_code.co_filename):
            return _shown(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def line_of(traceback: Iterable[str]) -> str:
    """Return the user's innermost line in a formatted traceback, outermost line first."""
    for entry in reversed(list(traceback)):
        match = _FRAME.search(entry)
        if match and _is_users(match[1]):
            return _shown(match[1], int(match[2]))
    return ""


def _is_users(file: str) -> bool:
    return not (file.startswith(_folders()) or file.startswith("<frozen") or file == _CONTEXTLIB)


def _shown(file: str, line: int) -> str:
    """Format file and line, relative to the working directory if the file lies in it."""
    inside = os.path.abspath(file).startswith(os.getcwd() + os.sep)
    name = os.path.relpath(file) if inside else Path(file).name
    return f"{name}:{line}"


@cache
def _folders() -> tuple[str, ...]:
    specs = [importlib.util.find_spec(name) for name in _FRAMEWORKS]
    places = [place for spec in specs if spec is not None for place in spec.submodule_search_locations or ()]
    return tuple(place + os.sep for place in places)


_CONTEXTLIB = importlib.util.find_spec("contextlib").origin  # type: ignore[union-attr]
