"""Find the lines of the user's code that called torch."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

#: Packages whose lines are skipped.
_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_gradguard")
_FRAME = re.compile(r'File "(.+?)", line (\d+)')
_CONTEXTLIB = importlib.util.find_spec("contextlib").origin  # type: ignore[union-attr]
_DISTRIBUTIONS = os.sep + os.path.join("torch", "distributions") + os.sep
#: Distributions that hold another one.
_WRAPPERS = ("Independent", "TransformedDistribution", "MixtureSameFamily")


class Site(NamedTuple):
    """Place in the user's code that calls a function of torch.

    It stays the same from pass to pass, and in each turn of a loop.

    Attributes:
        file: Path of the file.
        line: Its line.
        instruction: Place of the call within the line.
    """

    file: str
    line: int
    instruction: int

    def __str__(self) -> str:
        return _shown(self.file, self.line)


def user_frame() -> FrameType | None:
    """Return the user's innermost frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def current_site() -> Site | None:
    """Return the site of the user's innermost call."""
    frame = user_frame()
    return None if frame is None else Site(frame.f_code.co_filename, frame.f_lineno, frame.f_lasti)


def current_line() -> str:
    """Return the user's innermost line, such as ``model.py:42``."""
    site = current_site()
    return "" if site is None else str(site)


class RunningDistribution(NamedTuple):
    """Distribution of torch whose code runs.

    Attributes:
        name: Its class, such as "Normal"; empty if none runs.
        parts: Its parameters by name, and the value whose probability is computed as "value".
        support: Values that it can have, as torch describes them; None if it is not known.
    """

    name: str = ""
    parts: Mapping[str, object] = MappingProxyType({})
    support: Any = None


def running_distribution() -> RunningDistribution:
    """Return the distribution that runs; one that only wraps another is left out."""
    frame: FrameType | None = sys._getframe(1)
    found = RunningDistribution()
    while frame is not None and not _is_users(frame.f_code.co_filename):
        if _DISTRIBUTIONS in frame.f_code.co_filename:
            variables = frame.f_locals
            own = variables.get("self", variables.get("p"))  # p is the first of a divergence
            name = "" if own is None else type(own).__name__
            if name not in ("", *_WRAPPERS) and not name.endswith("Transform"):
                parts = {n: vars(own)[n] for n in getattr(own, "arg_constraints", {}) if n in vars(own)}
                if frame.f_code.co_name == "log_prob" and "value" in variables:
                    parts["value"] = variables["value"]
                found = RunningDistribution(name, {**found.parts, **parts}, getattr(own, "support", None))
        frame = frame.f_back
    return found


def variable_name(value: object) -> str:
    """Return the user's variable that holds a value; empty if there is none."""
    frame = user_frame()
    if frame is None:
        return ""
    for variables in (frame.f_locals, frame.f_globals):
        for name, held in list(variables.items()):
            if held is value and name.isidentifier():
                return name
    return ""


def line_of(traceback: Iterable[str]) -> str:
    """Return the user's innermost line in a traceback."""
    for entry in reversed(list(traceback)):
        match = _FRAME.search(entry)
        if match and _is_users(match[1]):
            return _shown(match[1], int(match[2]))
    return ""


def _is_users(file: str) -> bool:
    return not (file.startswith(_folders()) or file.startswith("<frozen") or file == _CONTEXTLIB)


def _shown(file: str, line: int) -> str:
    try:
        inside = os.path.abspath(file).startswith(os.getcwd() + os.sep)
        name = os.path.relpath(file) if inside else Path(file).name
    except OSError:  # the working folder is gone
        name = Path(file).name
    return f"{name}:{line}"


@cache
def _folders() -> tuple[str, ...]:
    specs = [importlib.util.find_spec(name) for name in _FRAMEWORKS]
    places = [place for spec in specs if spec is not None for place in spec.submodule_search_locations or ()]
    return tuple(place + os.sep for place in places)
