"""Lightning's Callback class, of whichever of its two packages is in use."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback_class() -> type:
    """One class that both packages' trainers accept, where both are in use."""
    # Importing the package that is not in use would cost a second.
    found = [p for p in PACKAGES if p in sys.modules]
    found = found or [p for p in PACKAGES if importlib.util.find_spec(p.partition(".")[0])]
    if not found:
        raise ImportError(
            "GradGuard and GradHistogram need Lightning: pip install lightning, or pip install pytorch-lightning; "
            "Guard works without it"
        )
    return type("Callback", tuple(importlib.import_module(p).Callback for p in found), {})


if TYPE_CHECKING:
    from lightning.pytorch import Callback as Callback
else:
    Callback = _callback_class()
