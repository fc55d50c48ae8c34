"""Patterns of the names that a histogram shows."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


class NamePatterns:
    """Shell-style patterns of parameter names, such as "encoder.*".

    They match whole names, with case.

    Args:
        include: Patterns of names to show; all when None.
        exclude: Patterns of names to leave out of those.

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
        """Return True if the name is shown."""
        included = self._include is None or any(fnmatchcase(name, p) for p in self._include)
        return included and not any(fnmatchcase(name, p) for p in self._exclude)

    def match_module(self, name: str, module: nn.Module) -> bool:
        """Return True if a module's activations are shown."""
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        included = self._include is None or any(
            fnmatchcase(n, p) for n in (name, *own) for p in self._include
        )
        if not included or any(fnmatchcase(name, p) for p in self._exclude):
            return False
        return not own or any(not any(fnmatchcase(n, p) for p in self._exclude) for n in own)

    def problems(self, names: Sequence[str]) -> list[str]:
        """Return a message per pattern without match.

        Args:
            names: Names of all parameters of the model.
        """
        found = []
        for pattern in (*(self._include or ()), *self._exclude):
            if names and not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
                found.append(f"pattern {pattern!r} matches no parameter. The nearest name is {near!r}.")
        if names and not found and not any(self.match(name) for name in names):
            found.append(
                f"include={self._include!r} and exclude={self._exclude!r} leave no parameter to show."
            )
        return found
