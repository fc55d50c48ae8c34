"""When samples are refreshed and slow detectors asked: often at first, rarely when a training has settled."""

from __future__ import annotations

from typing import Any, NamedTuple

#: Good steps between two refreshes of what is sampled; in the first so many, every step is sampled.
REFRESH = 8
#: First steps, and first steps with a loss, at each of which slow detectors are asked: most that is sick is so from the
#: start.
EAGER = 32
#: Good steps after which a refresh is due less often, and how often; not while there is an alert.
SETTLED, LATER = 256, 32

_SAVED = ("good", "losses", "sampled_last", "closest", "was_good", "alert", "alarm")


class Due(NamedTuple):
    """What is due at a step.

    Attributes:
        fresh: Weight norms, a sample of weights and of gradients.
        updated: The sample after a sampled step, which shows what the step did.
        sampled_steps: Steps that such an update stands for; 0 without.
        elapsed: Steps that a closer look stands for; 0 if this step is none.
    """

    fresh: bool
    updated: bool
    sampled_steps: int
    elapsed: int


class Schedule:
    """Counts good steps, since bad ones move nothing.

    Args:
        always: Each step is a closer look: where a lasting condition is skipped on, which no skipped step changes in
            the running statistics, it has to be seen before it is deep in them, or none would be seen to be over.

    Attributes:
        good: Good steps so far.
        losses: Those of them with a loss.
        sampled_last: The last step was sampled, so that this one is a closer look.
        alert: Something may be wrong: the loss makes no progress, or a condition is on, whose reading may not grow old.
        alarm: The loss has grown, so that each step is a closer look: it may be the last that can be taken.
    """

    def __init__(self, always: bool = False) -> None:
        self.always = always
        self.good, self.losses, self.sampled_last = 0, 0, False
        self.closest, self.was_good = -1, True
        self.alert = self.alarm = False
        self._sampled = self._close = self._has_loss = False

    def due(self, has_loss: bool) -> Due:
        """What is due at the coming step.

        Args:
            has_loss: A loss is given.
        """
        period = REFRESH if self.good < SETTLED or self.alert else LATER
        # After a step that was not taken too, or what was sampled of a sick one would stand.
        self._sampled = self.good < REFRESH or self.good % period == 0 or not self.was_good
        # Also after a step that was not taken, of which detectors remember nothing.
        self._close = self.always or self.sampled_last or self.good < EAGER or not self.was_good
        self._close |= self.alarm or (has_loss and self.losses < EAGER)
        self._has_loss = has_loss
        # However rare the looks, a condition has to hold for as many of them.
        elapsed = min(max(self.good - self.closest, 1), REFRESH) if self._close else 0
        sampled = (1 if self.good <= REFRESH else REFRESH) if self.sampled_last else 0
        return Due(self._sampled, self.sampled_last, sampled, elapsed)

    def sample_now(self) -> None:
        """This step is sampled, whatever is due."""
        self._sampled = True

    def settle(self, good: bool) -> None:
        """The step was taken, or not."""
        if good and self._close:
            self.closest = self.good
        self.good += good
        self.losses += good and self._has_loss
        self.sampled_last, self.was_good = good and self._sampled, good

    def heed(self, loss_start: float, loss_mean: float, is_on: bool) -> None:
        """Takes in what is known after a step.

        Args:
            loss_start: What the loss began with; NaN if none is given.
            loss_mean: Its running mean.
            is_on: Whether any condition is on.
        """
        half = 0.5 * abs(loss_start)
        self.alert = is_on or loss_mean > loss_start - half
        self.alarm = loss_mean > loss_start + half

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        for name in _SAVED:
            setattr(self, name, state[name])
