"""`StateError`: a saved state that cannot be restored."""


class StateError(ValueError):
    """A saved state that does not fit.

    The message says in one sentence why, and what to do.
    """
