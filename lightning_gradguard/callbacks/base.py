"""Lightning's Callback class, of whichever of its two packages is in use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata
from typing import TYPE_CHECKING

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_class() -> type:
    """One class that both packages' trainers accept, where both are in use."""
    installed = [p for p in PACKAGES if importlib.util.find_spec(p.partition(".")[0])]
    # Importing the package that is not in use would cost a second, which only old ones need: their trainers refuse
    # a callback of the other package, and may be imported later.
    found = installed if any(map(_is_choosy, installed)) else [p for p in installed if p in sys.modules]
    found = found or installed
    if not found:
        raise ImportError(
            "GradGuard and GradHistogram need Lightning: pip install lightning, or pip install pytorch-lightning; "
            "Guard works without it"
        )
    return type("Callback", tuple(importlib.import_module(p).Callback for p in found), {})


def _is_choosy(package: str) -> bool:
    """Whether trainers of a package take callbacks of their own package alone, as those before 2.6 do."""
    major, minor = metadata.version(package.partition(".")[0].replace("_", "-")).split(".")[:2]
    return (int(major), int(minor)) < (2, 6)


if TYPE_CHECKING:
    from lightning.pytorch import Callback as Callback
else:
    Callback = _callback_class()
