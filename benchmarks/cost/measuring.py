"""Trainings in rounds: who comes when, and how much more one takes than another of the same round."""

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
        seconds: Name of an arm to its rounds, and of each round the seconds of all steps on the clock.
    """

    seconds: dict[str, list[list[float]]] = field(default_factory=dict)

    def step(self, arm: str) -> Spread:
        """Seconds a step: the mean, over the steps of a training, of their medians over the rounds."""
        return over_a_cycle(self.seconds[arm])

    def ratio(self, arm: str, base: str) -> Spread:
        """Seconds of an arm over those of another at the same step of the same round, likewise."""
        return over_a_cycle(self._ratios(arm, base))

    def usual(self, arm: str, base: str) -> float:
        """The same of the median step, which leaves out steps that write histograms, and those beside a drawing."""
        return statistics.median(map(statistics.median, zip(*self._ratios(arm, base), strict=True)))

    def _ratios(self, arm: str, base: str) -> list[list[float]]:
        pairs = zip(self.seconds[arm], self.seconds[base], strict=True)
        return [[a / b for a, b in zip(*pair, strict=True)] for pair in pairs]


def interleave(arms: Iterable[str], rounds: int, train: Callable[[str], list[float]]) -> Rounds:
    """Runs ``train`` of each arm in each round; who begins a round moves on, and every second round goes backwards.

    The first arm is trained once before that, so that nobody pays for what is done once in a process.
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
