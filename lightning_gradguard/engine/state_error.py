"""`StateError`: a saved state that cannot be restored."""


class StateError(ValueError):
    """The saved state does not fit; its message says in one sentence why, and what to do."""
