"""Which parameters are shown, or clipped: patterns of names to include and to exclude."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

from lightning_gradguard.clippers.base import Clipper, included_names


class Patterns:
    """Shell-style patterns such as "encoder.*", matched against whole names with case.

    Args:
        include: Names to show; all when None.
        exclude: Names to leave out of those.

    Raises:
        TypeError: If patterns are not a sequence of strings.
    """

    def __init__(self, include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
        for argument, patterns in (("include", include), ("exclude", exclude)):
            if patterns is None:
                continue
            if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
                raise TypeError(
                    f'{argument} must be a sequence of patterns such as ["encoder.*"], got {patterns!r}'
                )
        self._include, self._exclude = include, exclude or ()

    def match(self, name: str) -> bool:
        """Whether a parameter is shown."""
        included = self._include is None or any(fnmatch.fnmatchcase(name, p) for p in self._include)
        return included and not any(fnmatch.fnmatchcase(name, p) for p in self._exclude)

    def complaints(self, names: Sequence[str]) -> list[str]:
        """What is wrong with the patterns for a model of these parameters: each that matches none, with the nearest."""
        found = []
        for pattern in (*(self._include or ()), *self._exclude):
            if names and not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
                found.append(f"pattern {pattern!r} matches no parameter; the nearest is {near!r}")
        if names and not found and not any(self.match(name) for name in names):
            found.append(
                f"include={self._include!r} and exclude={self._exclude!r} leave no parameter to show"
            )
        return found


def clipper_of(clipper: Clipper | None, own: Sequence[str], model: Sequence[str]) -> Clipper | None:
    """The clipper of one optimizer, which knows nothing of patterns for what others, or nobody, trains.

    Args:
        clipper: What the user gave.
        own: Names of the optimizer's parameters.
        model: Those of all parameters.

    Raises:
        ValueError: If an entry of ``exclude`` matches no name at all.
    """
    exclude = getattr(clipper, "exclude", ())
    if not exclude or not isinstance(exclude, tuple) or not dataclasses.is_dataclass(clipper):
        return clipper
    included_names(tuple(dict.fromkeys((*model, *own))), exclude)
    concerned = tuple(p for p in exclude if p in own or any(fnmatch.fnmatchcase(name, p) for name in own))
    changed: Any = clipper if concerned == exclude else dataclasses.replace(clipper, exclude=concerned)
    return changed
