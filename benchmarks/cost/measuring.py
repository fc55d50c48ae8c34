"""Trainings in rounds: their order, and the ratio of two trainings in the same round."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lightning_gradguard.cli.cost import Spread, over_a_cycle


@dataclass
class Rounds:
    """Seconds of each step of each training.

    Attributes:
        seconds: Name of an arm to its rounds; each round holds the seconds of all timed steps.
    """

    seconds: dict[str, list[list[float]]] = field(default_factory=dict)

    def step(self, arm: str) -> Spread:
        """Return seconds per step: the mean, over the steps of a training, of their medians over the rounds."""
        return over_a_cycle(self.seconds[arm])

    def ratio(self, arm: str, base: str) -> Spread:
        """Return an arm's seconds over another's at the same step of the same round, averaged likewise."""
        return over_a_cycle(self._ratios(arm, base))

    def added(self, arm: str, base: str) -> Spread:
        """Return an arm's seconds beyond another's at the same step of the same round, averaged likewise."""
        pairs = zip(self.seconds[arm], self.seconds[base], strict=True)
        return over_a_cycle([[a - b for a, b in zip(*pair, strict=True)] for pair in pairs])

    def part(self, steps: slice) -> Rounds:
        """Return these steps of each round."""
        return Rounds({arm: [timed[steps] for timed in rounds] for arm, rounds in self.seconds.items()})

    def extend(self, others: Rounds) -> None:
        """Append the rounds of further trainings."""
        for arm, rounds in others.seconds.items():
            self.seconds.setdefault(arm, []).extend(rounds)

    def usual(self, arm: str, base: str) -> float:
        """Return the same ratio for the median step, which excludes steps that write histograms or pictures."""
        return statistics.median(map(statistics.median, zip(*self._ratios(arm, base), strict=True)))

    def _ratios(self, arm: str, base: str) -> list[list[float]]:
        pairs = zip(self.seconds[arm], self.seconds[base], strict=True)
        return [[a / b for a, b in zip(*pair, strict=True)] for pair in pairs]


def interleave(arms: Iterable[str], rounds: int, train: Callable[[str], list[float]]) -> Rounds:
    """Run ``train`` for each arm in each round.

    The first arm changes from round to round, and every second round runs in reverse order.

    The first arm trains once before that, so that no arm pays for the one-time work of a process.
    """
    names, found = list(arms), Rounds()
    train(names[0])
    for number in range(rounds):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for name in order if number % 2 == 0 else reversed(order):
            gc.collect()
            found.seconds.setdefault(name, []).append(train(name))
    return Rounds({name: found.seconds[name] for name in names})
