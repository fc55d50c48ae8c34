"""Schedule of samples and full evaluations.

They are frequent at first, and rare once training has settled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

#: Good steps between two refreshes of the samples. Each of the first `REFRESH` steps is sampled.
REFRESH = 8
#: First steps, and first steps with a loss, that are all evaluated in full: most faults are there from the start.
EAGER = 32
#: Good steps after which refreshes become rarer, and the interval from then on, unless there is an alert.
SETTLED, LATER = 256, 32

#: Key in the saved state, attribute.
_SAVED = {
    "good": "good",
    "losses": "losses",
    "sampled_last": "sampled_last",
    "closest": "last_full",
    "was_good": "was_good",
    "alert": "alert",
    "alarm": "alarm",
}


class Due(NamedTuple):
    """Work that is due at a step.

    Attributes:
        fresh: Weight norms, and samples of weights and gradients, are to be taken.
        updated: The previous step was sampled, so that a new sample shows what it did to the weights.
        sampled_steps: Steps that this update stands for; 0 if ``updated`` is False.
        elapsed: Steps that a full evaluation stands for; 0 if this step gets none.
    """

    fresh: bool
    updated: bool
    sampled_steps: int
    elapsed: int


class SamplingSchedule:
    """Counts good steps and decides what is due.

    A *full evaluation* asks every detector. On all other steps the slow detectors keep their last result.

    Args:
        always: Evaluate every step in full. Needed where the policy skips steps on a lasting fault: skipped steps do
            not enter the running statistics, so the fault must be seen at its first step, and its end too.

    Attributes:
        good: Good steps so far.
        losses: Good steps with a loss.
        sampled_last: True if the previous step was sampled, so that this one is evaluated in full.
        last_full: Number of the last good step that was evaluated in full; -1 before the first.
        was_good: True if the previous step was taken.
        alert: Something may be wrong: the loss makes no progress, or a fault is active. Results may not grow old.
        alarm: The loss has grown. Every step is evaluated in full, since it may be the last one worth taking.
    """

    def __init__(self, always: bool = False) -> None:
        self.always = always
        self.good, self.losses, self.sampled_last = 0, 0, False
        self.last_full, self.was_good = -1, True
        self.alert = self.alarm = False
        self._sampled = self._full = self._has_loss = False

    def due(self, has_loss: bool) -> Due:
        """Return what is due at the coming step.

        Args:
            has_loss: True if the step comes with a loss.
        """
        period = REFRESH if self.good < SETTLED or self.alert else LATER
        # Also after a step that was not taken: its samples are those of a bad step.
        self._sampled = self.good < REFRESH or self.good % period == 0 or not self.was_good
        # Also after a step that was not taken: detectors keep nothing of it.
        self._full = self.always or self.sampled_last or self.good < EAGER or not self.was_good
        self._full |= self.alarm or (has_loss and self.losses < EAGER)
        self._has_loss = has_loss
        # However rare the evaluations are, a fault must last for the same number of them.
        elapsed = min(max(self.good - self.last_full, 1), REFRESH) if self._full else 0
        sampled = (1 if self.good <= REFRESH else REFRESH) if self.sampled_last else 0
        return Due(self._sampled, self.sampled_last, sampled, elapsed)

    def sample_now(self) -> None:
        """Count this step as sampled."""
        self._sampled = True

    def commit(self, taken: bool) -> None:
        """Count the step that `due` was asked about.

        Args:
            taken: False if the step was skipped.
        """
        if taken and self._full:
            self.last_full = self.good
        self.good += taken
        self.losses += taken and self._has_loss
        self.sampled_last, self.was_good = taken and self._sampled, taken

    def observe(self, loss_start: float, loss_mean: float, has_active_fault: bool) -> None:
        """Update ``alert`` and ``alarm`` after a step.

        Args:
            loss_start: Loss at the start of training; NaN if none is given.
            loss_mean: Running mean of the loss.
            has_active_fault: True if any fault is active.
        """
        half = 0.5 * abs(loss_start)
        self.alert = has_active_fault or loss_mean > loss_start - half
        self.alarm = loss_mean > loss_start + half

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types."""
        return {key: getattr(self, attribute) for key, attribute in _SAVED.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        for key, attribute in _SAVED.items():
            setattr(self, attribute, state[key])
