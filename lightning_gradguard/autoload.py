"""Called by Lightning for each Trainer: the variable ``GRADGUARD`` adds a guard; without it nothing is added."""

from __future__ import annotations

import difflib
import os
from typing import Any

VARIABLE = "GRADGUARD"
#: Names of the policies that can be asked for, and how to ask for none.
CHOICES = ("watch", "protect", "strict", "off")


def callbacks() -> list[Any]:
    """A guard with the policy that the environment variable ``GRADGUARD`` names.

    The installed package declares it as an entry point of the groups ``lightning.pytorch.callbacks_factory`` and
    ``pytorch_lightning.callbacks_factory``, so that each Trainer of the environment calls it. Without the variable it
    costs one look at the environment, and imports nothing.

    Returns:
        Empty if the variable is not set, is empty or ``off``; else one callback, which stands back in a Trainer that
        has a `GradGuard` already.

    Raises:
        ValueError: For another value, since a run that was to be protected and is not is worse than one that does not
            begin.
    """
    wanted = os.environ.get(VARIABLE, "").strip().lower()
    if wanted in ("", "off"):
        return []
    if wanted not in CHOICES:
        near = difflib.get_close_matches(wanted, CHOICES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        choices = ", ".join(map(repr, CHOICES))
        raise ValueError(
            f"the environment variable {VARIABLE} must be one of {choices}, got {wanted!r}{hint}"
        )
    # Half a second, which only those who asked for it pay.
    from lightning_gradguard.callbacks.auto_guard import AutoGuard

    return [AutoGuard(wanted)]
