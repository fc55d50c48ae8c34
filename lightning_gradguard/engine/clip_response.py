"""Decide at which steps the policy's response "clip" is in force."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_gradguard.forms import Maybe
from lightning_gradguard.results import ClipSpan

#: Newest spans that are kept.
KEPT_SPANS = 100

#: Form of a saved state.
CLIP_FORM = {
    "in_force": bool,
    "left": int,
    "faults": [str],
    "newest": int,
    "spans": [(int, Maybe(int), [str])],
}


class ClipResponse:
    """Tracker of when the clipper is in force.

    It is in force from a decision that names a fault to clip for, until ``hold`` further decisions have named none. The
    decision on a step counts for that step with ``lag=0``, and for the next with ``lag=1``. A step that is not finite
    says nothing about other faults, so it is left out.

    Args:
        hold: Decisions without a fault for which it stays in force. That is the policy's patience: as many steps as
            show that a fault lasts also show that it is over. The default of 50 is longer than the memory of the norm's
            baseline, 33 steps, so that the baseline is an ordinary one again when clipping ends.

    Attributes:
        in_force: True if the newest decision puts it in force.
        newest: The newest step at which it was in force; 0 before the first.
    """

    def __init__(self, hold: int) -> None:
        self.in_force = False
        self._hold, self._left = hold, 0
        self._faults: tuple[str, ...] = ()  # since it came in force
        self.newest = 0
        self._spans: deque[ClipSpan] = deque(maxlen=KEPT_SPANS)

    @property
    def spans(self) -> tuple[ClipSpan, ...]:
        """Spans so far, oldest first; the newest 100."""
        return tuple(self._spans)

    @property
    def since(self) -> int | None:
        """First step of the span that has not ended, or None."""
        return self._spans[-1].first if self._spans and self._spans[-1].last is None else None

    def follow(self, faults: Sequence[str]) -> None:
        """Take in the decision on a finite step.

        Args:
            faults: Values of the faults to clip for that are present.
        """
        self.in_force = bool(faults) or self._left > 0
        self._left = self._hold if faults else max(self._left - 1, 0)
        self._faults = tuple(dict.fromkeys((*self._faults, *faults))) if self.in_force else ()

    def act(self, step: int) -> bool:
        """Note a step in the spans; return True if it is to be clipped.

        Args:
            step: Number of a step that is taken. The decision that counts for it has been followed.
        """
        if not self.in_force:
            self._end()
            return False
        span = ClipSpan(step if self.since is None else self.since, None, self._faults)
        if self.since is not None:
            self._spans.pop()
        self._spans.append(span)
        self.newest = step
        return True

    def keep_spans(self, spans: Iterable[ClipSpan], newest: int) -> None:
        """Set the spans, oldest first, and ``newest``."""
        self._spans, self.newest = deque(spans, maxlen=KEPT_SPANS), newest
        if not self.in_force:
            self._end()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types."""
        return {
            "in_force": self.in_force,
            "left": self._left,
            "faults": list(self._faults),
            "newest": self.newest,
            "spans": [[span.first, span.last, list(span.faults)] for span in self._spans],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.in_force, self._left, self.newest = state["in_force"], state["left"], state["newest"]
        self._faults = tuple(state["faults"])
        spans = (ClipSpan(first, last, tuple(faults)) for first, last, faults in state["spans"])
        self._spans = deque(spans, maxlen=KEPT_SPANS)

    def _end(self) -> None:
        if self.since is not None:
            self._spans[-1] = self._spans[-1]._replace(last=self.newest)
