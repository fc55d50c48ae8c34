"""Entry point that adds a guard to Trainers.

Lightning calls it for each Trainer; the environment variable ``GRADGUARD`` asks for the guard.
"""

from __future__ import annotations

import difflib
import os
from typing import Any

VARIABLE = "GRADGUARD"
#: Policies that can be asked for; "off" asks for none.
CHOICES = ("watch", "protect", "strict", "off")


def callbacks() -> list[Any]:
    """Return a guard with the policy in ``GRADGUARD``.

    The installed package declares it as an entry point of the groups ``lightning.pytorch.callbacks_factory`` and
    ``pytorch_lightning.callbacks_factory``, so each Trainer in the environment calls it. Without the variable it
    imports nothing.

    Returns:
        An empty list if the variable is not set, empty or ``off``; else one callback. It does nothing in a Trainer that
        has a `GradGuard` already.

    Raises:
        ValueError: For any other value, so that no run goes unprotected because of a typing error.
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
    # Takes half a second, which is spent only if the variable is set.
    from lightning_gradguard.callbacks.grad_guard import AutoGuard

    return [AutoGuard(wanted)]
