"""Schedule of samples and full evaluations.

They are frequent at first, grow rare while what they show stays the same, and are frequent again as soon as something
moves. The clock plays no part, so that a run can be repeated and resumed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

#: Shortest interval between two refreshes of the samples, in good steps. Each of the first `REFRESH` steps is sampled.
REFRESH = 8
#: First steps, and first steps with a loss, of which more are evaluated in full: most faults are there from the start.
#: The very first ones all are, then every few, among them those from which conditions count: the 15th, 20th and 30th.
EAGER, _ALL, _SOME = 32, 10, frozenset({12, 14, 17, 19, 22, 25, 29})
#: Full evaluations in a row that show the same before the interval doubles.
_ALIKE = 4
#: Longest interval, and the longest one while a fault is present.
LATER, _PRESENT = 64, 32
#: Good steps after which a training that stays the same has the longest interval.
SETTLED = 256
#: What counts as a change from one full evaluation to the next: factors of the baseline norm and of the median update,
#: decades of depth tilt, and a rise of the mean loss as a part of its start.
_NORM, _UPDATE, _TILT, _RISE = 2.0, 4.0, 0.75, 0.1
#: Part of its start by which the mean loss exceeds it where it is beyond what is healthy, and the part of itself by
#: which it has to rise above the highest that a full evaluation saw.
_HIGH, _FURTHER = 0.5, 0.25
#: Factor of the highest learning rate that counts as a change.
_RATE = 2.0

#: Key in the saved state, attribute.
_SAVED = {
    "good": "good",
    "losses": "losses",
    "sampled_last": "sampled_last",
    "closest": "last_full",
    "was_good": "was_good",
    "alarm": "alarm",
    "stuck": "is_stuck",
    "interval": "interval",
    "alike": "_alike",
    "last_sample": "_last_sample",
    "last_asked": "_last_asked",
    "next_sample": "_next_sample",
    "was_outside": "_was_outside",
    "silent": "_silent",
    "rate": "_rate",
    "highest": "_highest",
    "shown": "_shown",
    "flags": "_flags",
}


class Due(NamedTuple):
    """Work that is due at a step.

    Attributes:
        fresh: Weight norms, and samples of weights and gradients, are to be taken.
        updated: The previous step was sampled, so that a new sample shows what it did to the weights.
        sampled_steps: Steps that this update stands for; 0 if ``updated`` is False.
        elapsed: Steps that a full evaluation stands for; 0 if this step gets none.
        first: This is one of the first `EAGER` steps.
    """

    fresh: bool
    updated: bool
    sampled_steps: int
    elapsed: int
    first: bool


class Shown(NamedTuple):
    """Numbers and flags of an evaluated step.

    Attributes:
        full: It was a full evaluation.
        norm: Global norm.
        baseline: Baseline of the norm; 0 before there is one.
        update: Median applied update ratio; NaN if not known.
        tilt: Depth tilt, decades; NaN if not known.
        loss_start: Loss at the start of training; NaN if none is given.
        loss: Running mean of the loss.
        flags: For each lasting fault whether it was raised, and whether it was near.
        is_pending: A fault is near, or may still be reported as more severe.
        is_present: A fault is active.
        has_exploded: An explosion was reported as critical, so that nothing graver can be said of a loss that rises.
        has_news: Something was found that is more than a spike.
        silent: Number of tensors whose gradient is zero or missing.
    """

    full: bool
    norm: float
    baseline: float
    update: float
    tilt: float
    loss_start: float
    loss: float
    flags: tuple[bool, ...]
    is_pending: bool
    is_present: bool
    has_exploded: bool
    has_news: bool
    silent: int


class SamplingSchedule:
    """Counts good steps and decides what is due.

    A *full evaluation* asks every detector. On all other steps the slow detectors keep their last result.

    Full evaluations come at an interval of `REFRESH` good steps after the first `EAGER` ones. It doubles, up to
    `LATER`, each time four of them in a row show the same: the same faults present or near, the baseline norm within a
    factor of two, the median update within a factor of four, the depth tilt within 0.75 decades, and no rise of the
    mean loss by a tenth of its start. Otherwise it is `REFRESH` again. It also is, at once, if something is found, if
    the norm leaves its baseline for more than one step, if more tensors than ever have no gradient, and if the learning
    rate changes by a factor of two. While a fault is near or may still be reported as more severe, the interval does
    not grow. A step after one that was not taken is evaluated in full.

    Args:
        always: Evaluate every step in full. Needed where the policy skips steps on a lasting fault: skipped steps do
            not enter the running statistics, so the fault must be seen at its first step, and its end too.

    Attributes:
        good: Good steps so far.
        losses: Good steps with a loss.
        sampled_last: True if the previous step was sampled, so that this one is evaluated in full.
        last_full: Number of the last good step that was evaluated in full; -1 before the first.
        was_good: True if the previous step was taken.
        alarm: The loss is far above its start and higher than ever. The next step is evaluated in full, since it may be
            the last one worth taking.
        is_stuck: The mean loss is above nine tenths of its start, as of the newest full evaluation.
        interval: Good steps between two samples.
    """

    def __init__(self, always: bool = False) -> None:
        self.always = always
        self.good, self.losses, self.sampled_last = 0, 0, False
        self.last_full, self.was_good = -1, True
        self.alarm, self.is_stuck, self.interval = False, False, REFRESH
        self._alike, self._last_sample, self._next_sample, self._last_asked = 0, -REFRESH, 0, -REFRESH
        self._was_outside, self._silent, self._rate, self._highest = False, 0, -1.0, math.nan
        self._shown: list[float] = []
        self._flags: list[bool] = []
        self._sampled = self._full = self._has_loss = False

    def due(self, has_loss: bool, rate: float = -1.0) -> Due:
        """Return what is due at the coming step.

        Args:
            has_loss: True if the step comes with a loss.
            rate: Highest learning rate; negative if it is not known.
        """
        if rate != self._rate:
            self._follow(rate)
        # Also after a step that was not taken: its samples are those of a bad step.
        self._sampled = self.good < REFRESH or self.good >= self._next_sample or not self.was_good
        # Also after a step that was not taken: detectors keep nothing of it.
        self._full = self.always or self.sampled_last or not self.was_good or self.alarm
        self._full |= _is_early(self.good) or (has_loss and _is_early(self.losses))
        self._has_loss = has_loss
        # However rare the evaluations are, a fault must last for the same number of them.
        elapsed = min(max(self.good - self.last_full, 1), REFRESH) if self._full else 0
        sampled = (1 if self.good <= REFRESH else REFRESH) if self.sampled_last else 0
        return Due(self._sampled, self.sampled_last, sampled, elapsed, self.good < EAGER)

    @property
    def may_sample(self) -> bool:
        """True unless a step was sampled out of turn shortly before, so that this one may be."""
        return self.good >= self._last_asked + REFRESH

    def sample_now(self) -> None:
        """Count this step as sampled."""
        self._sampled, self._last_asked = True, self.good

    def commit(self, taken: bool, *, accepted: bool = False) -> None:
        """Count the step that `due` was asked about.

        Args:
            taken: False if the step was skipped.
            accepted: The fast path accepted it, so that there was nothing to `observe`.
        """
        if taken and self._full:
            self.last_full = self.good
        if taken and self._sampled:
            self._last_sample = self.good
            self._next_sample = self.good + self.interval if self.good >= REFRESH else REFRESH
        if accepted:
            self._was_outside = False
        self.good += taken
        self.losses += taken and self._has_loss
        self.sampled_last, self.was_good = taken and self._sampled, taken

    def observe(self, shown: Shown) -> None:
        """Adapt the interval to an evaluated step that is finite.

        Args:
            shown: What it shows.
        """
        is_outside = shown.baseline > 0 and _is_factor(shown.baseline, shown.norm, 2.0)
        if shown.has_news or (is_outside and self._was_outside) or shown.silent > self._silent:
            self.expect_change()
        self._was_outside, self._silent = is_outside, max(shown.silent, self._silent)
        high, top = shown.loss > shown.loss_start + _HIGH * abs(shown.loss_start), self._highest
        rises = math.isnan(top) or shown.loss > top + _FURTHER * abs(top)
        self.alarm = high and rises and not shown.has_exploded
        if not high:
            self._highest = math.nan
        elif shown.full and rises:
            self._highest = shown.loss
        if shown.full:
            self._compare(shown)

    def _compare(self, shown: Shown) -> None:
        """Compare a full evaluation with the one before."""
        self.is_stuck = shown.loss > 0.9 * shown.loss_start
        before, self._shown = self._shown, [shown.baseline, shown.update, shown.tilt, shown.loss]
        flags, self._flags = self._flags, list(shown.flags)
        if self.good < EAGER:
            return
        rise = _RISE * abs(shown.loss_start)
        if (
            not before
            or flags != self._flags
            or _is_factor(before[0], shown.baseline, _NORM)
            or _is_factor(before[1], shown.update, _UPDATE)
            or abs(shown.tilt - before[2]) > _TILT
            or shown.loss > before[3] + rise
        ):
            self.expect_change()
            return
        self._alike = 0 if shown.is_pending else self._alike + 1
        longest = _PRESENT if shown.is_present else LATER
        self.interval = min(REFRESH << min(self._alike // _ALIKE, 16), longest)

    def expect_change(self) -> None:
        """Make samples frequent, since something moved.

        The coming step is sampled, unless one was shortly before.
        """
        self._alike, self.interval = 0, REFRESH
        self._next_sample = min(self._next_sample, max(self.good, self._last_sample + REFRESH))

    def _follow(self, rate: float) -> None:
        """Follow the learning rate since it last moved."""
        if self._rate < 0 or rate < 0:
            self._rate = rate
        elif _is_factor(self._rate, rate, _RATE):
            self.expect_change()
            self._rate = rate

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types."""
        state = {key: getattr(self, attribute) for key, attribute in _SAVED.items()}
        return {**state, "shown": list(self._shown), "flags": list(self._flags)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        vars(self).update(vars(SamplingSchedule(self.always)))
        for key, attribute in _SAVED.items():
            if key in state:  # not in those of earlier versions
                setattr(self, attribute, state[key])
        self._shown, self._flags = list(self._shown), list(self._flags)


def _is_early(count: int) -> bool:
    """Return True for a step among the first that gets a full evaluation."""
    return count < _ALL or count in _SOME


def _is_factor(before: float, after: float, factor: float) -> bool:
    """Return True if a positive number changed by more than a factor; never if both are unknown."""
    if before > 0 and after > 0:
        return not 1 / factor <= after / before <= factor
    return (before > 0) != (after > 0)
