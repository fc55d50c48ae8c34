"""Detection rules of AutoTrainer, SageMaker Debugger, TheDeepChecker and BTTackler, from their formulas.

Each is a class with ``check(snapshot) -> alarms``, one object per optimizer of a run. All see the same input:
the gradients before the optimizer step, and the weights. Rules on activations or on a validation set are left
out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import median
from typing import NamedTuple, Protocol

from benchmarks.judging.snapshot import Snapshot
from lightning_gradguard import Fault


class Alarm(NamedTuple):
    """Alarm of a rule: the fault in our terms, and the tensors it points at, worst first."""

    fault: Fault
    parameters: tuple[str, ...]


class Rules(Protocol):
    """Interface of all rule sets."""

    def check(self, snapshot: Snapshot) -> list[Alarm]:
        """Return the alarms of this step, or an empty list."""


#: Our faults that also count as right for a rival's alarm: its classes are coarser than ours.
STANDS_FOR: dict[Fault, tuple[Fault, ...]] = {
    Fault.VANISHING: (Fault.VANISHING, Fault.VANISHING_IN_TIME, Fault.UNDERFLOW),
    Fault.DEAD: (Fault.DEAD, Fault.DISCONNECTED),
}


class AutoTrainer:
    """AutoTrainer (ICSE 2021).

    Vanishing: ‖g_1‖ / ‖g_L‖ < 1e-3 and ‖g_1‖ < 1e-4. Exploding: that ratio > 70. Dying ReLU: at least 70 % of
        all gradient entries are zero. Each is noted whenever it occurs. From 30 % of training on it is
        reported, in the order dead, exploding, vanishing, while the best accuracy is below 0.7 or has never
        risen by 0.01 in one epoch. NaN is reported at once. An epoch is ten steps.
    gradient entries are zero; each noted whenever it is seen, and reported, in the order dead, exploding, vanishing,
    from 30 % of training on while the best accuracy is below 0.7 or has never risen by 0.01 at once. NaN is reported
    at once. An epoch is ten steps.

    Args:
        total: Optimizer steps of the whole training.
    """

    period = 10

    def __init__(self, total: int) -> None:
        self.total = total
        self._scores: list[float] = []
        self._accuracies: list[float] = []
        self._seen: dict[Fault, tuple[str, ...]] = {}

    def check(self, snapshot: Snapshot) -> list[Alarm]:
        if snapshot.nonfinite:
            return [Alarm(Fault.NONFINITE, snapshot.nonfinite)]
        self._scores.append(snapshot.score)
        if len(self._scores) < self.period:
            return []
        self._accuracies.append(sum(self._scores) / self.period)
        self._scores.clear()
        self._note(snapshot)
        gains = [b - a for a, b in zip(self._accuracies, self._accuracies[1:], strict=False)]
        open_ = max(self._accuracies) < 0.7 or max(gains, default=0.0) < 0.01
        if snapshot.step < 0.3 * self.total or not open_:
            return []
        for fault in (Fault.DEAD, Fault.EXPLODING, Fault.VANISHING):
            if fault in self._seen:
                return [Alarm(fault, self._seen[fault])]
        return []

    def _note(self, snapshot: Snapshot) -> None:
        weights = snapshot.weights
        if not weights:
            return
        first, last = snapshot.norms[weights[0]], snapshot.norms[weights[-1]]
        ratio = first / last if last > 0 else 1.0
        nearest = (snapshot.names[weights[0]],)
        if ratio < 1e-3 and first < 1e-4:
            self._seen.setdefault(Fault.VANISHING, nearest)
        if ratio > 70:
            self._seen.setdefault(Fault.EXPLODING, nearest)
        zeros = sum(z * s for z, s in zip(snapshot.zeros, snapshot.sizes, strict=True))
        if zeros / sum(snapshot.sizes) >= 0.7:
            self._seen.setdefault(Fault.DEAD, _worst(snapshot, snapshot.zeros, weights))


class SageMaker:
    """SageMaker Debugger's built-in rules, at every step.

    Vanishing: mean |g| of a tensor < 1e-7. Any NaN or infinity. Update ratio ‖Δw‖ / ‖w‖ > 10 or < 1e-8. Dead
        ReLU: more than half of a layer's units (here: rows of its weight gradient) are zero.
    than half of a layer's units (here: rows of its weight gradient) are zero.
    """

    def check(self, snapshot: Snapshot) -> list[Alarm]:
        if snapshot.nonfinite:
            return [Alarm(Fault.NONFINITE, snapshot.nonfinite)]
        weights, every = snapshot.weights, range(len(snapshot.names))
        ratios = snapshot.update_norms
        return _alarms(
            snapshot,
            (Fault.VANISHING, every, snapshot.mean_abs, lambda v: v < 1e-7, False),
            (Fault.DEAD, weights, snapshot.zero_rows, lambda v: v > 0.5, True),
            (Fault.OVERSIZED_UPDATE, weights, ratios, lambda v: v > 10, True),
            (Fault.STALLED, weights, ratios, lambda v: v < 1e-8, False),
        )


class TheDeepChecker:
    """TheDeepChecker (TOSEM 2022), from step 10 on, every 10 steps, for each weight.

    Vanishing: mean |g| < 1e-6, or it has at least halved at each of four steps in a row. Exploding: mean |g|
        > 1e6, or it has at least doubled at each of four. Update: the period's mean of log10(mean |Δw| / mean
        |w|) is above -1 or below -4, or the weight did not move. In its source the four ratios are of
        successive iterations of one weight.
    least doubled at each of four. Update: the period's mean of log10(mean |Δw| / mean |w|) is above -1 or below -4, or
    the weight did not move. In its source the four ratios are of successive iterations of one weight.
    """

    period = 10

    def __init__(self) -> None:
        self._means: dict[str, list[float]] = defaultdict(list)
        self._updates: dict[str, list[float]] = defaultdict(list)

    def check(self, snapshot: Snapshot) -> list[Alarm]:
        if snapshot.nonfinite:
            return [Alarm(Fault.NONFINITE, snapshot.nonfinite)]
        for i in snapshot.weights:
            name, update = snapshot.names[i], snapshot.updates[i]
            self._means[name] = [*self._means[name][-4:], snapshot.mean_abs[i]]
            if math.isfinite(update):
                self._updates[name].append(math.log10(update) if update > 0 else 0.0)
        if snapshot.step < self.period or snapshot.step % self.period:
            return []
        periods = [
            _mean(self._updates.pop(n, [])) if w else math.nan
            for n, w in zip(snapshot.names, snapshot.is_weight, strict=True)
        ]
        shrunk = [_each(self._means[n], lambda r: r <= 0.5) for n in snapshot.names]
        grown = [_each(self._means[n], lambda r: r >= 2) for n in snapshot.names]
        weights = snapshot.weights
        return _alarms(
            snapshot,
            (Fault.VANISHING, weights, snapshot.mean_abs, lambda v: v < 1e-6, False),
            (Fault.VANISHING, weights, shrunk, bool, True),
            (Fault.EXPLODING, weights, snapshot.mean_abs, lambda v: v > 1e6, True),
            (Fault.EXPLODING, weights, grown, bool, True),
            (Fault.OVERSIZED_UPDATE, weights, periods, lambda v: v > -1 and v != 0, True),
            (Fault.STALLED, weights, periods, lambda v: v < -4 or v == 0, False),
        )


class BTTackler:
    """BTTackler (KDD 2024), once per epoch of ten steps, on the epoch's means for each weight.

    Vanishing, in the first half of training: median over layers of mean |g| < 1e-7, or one of them is zero,
    or the median ratio of a layer to the next < 0.01. Exploding: that median > 10, or that median ratio >
    1000, or not finite. Dead, from the fifth epoch on: median share of zero gradient entries > 0.1.

    Args:
        total: Optimizer steps of the whole training.
    """

    period = 10

    def __init__(self, total: int) -> None:
        self.total = total
        self._means: dict[str, list[float]] = defaultdict(list)
        self._zeros: dict[str, list[float]] = defaultdict(list)
        self._steps = self._epochs = 0

    def check(self, snapshot: Snapshot) -> list[Alarm]:
        if snapshot.nonfinite:
            return [Alarm(Fault.NONFINITE, snapshot.nonfinite)]
        for i in snapshot.weights:
            self._means[snapshot.names[i]].append(snapshot.mean_abs[i])
            self._zeros[snapshot.names[i]].append(snapshot.zeros[i])
        self._steps += 1
        if self._steps < self.period:
            return []
        means = {n: _mean(v) for n, v in self._means.items()}
        zeros = {n: _mean(v) for n, v in self._zeros.items()}
        self._means.clear()
        self._zeros.clear()
        self._steps, self._epochs = 0, self._epochs + 1
        return self._judge(snapshot.step, means, zeros)

    def _judge(self, step: int, means: dict[str, float], zeros: dict[str, float]) -> list[Alarm]:
        if not means:
            return []
        values = list(means.values())
        ratios = [a / b for a, b in zip(values, values[1:], strict=False) if b > 0]
        ratio = median(ratios) if ratios else 1.0
        alarms = []
        if 0.0 not in values and (median(values) > 10 or ratio > 1000):
            alarms.append(Alarm(Fault.EXPLODING, _ranked(means, largest=True)))
        if step < self.total // 2 and (median(values) < 1e-7 or 0.0 in values or ratio < 0.01):
            alarms.append(Alarm(Fault.VANISHING, _ranked(means, largest=False)))
        if self._epochs >= 5 and median(zeros.values()) > 0.1:
            alarms.append(Alarm(Fault.DEAD, _ranked(zeros, largest=True)))
        return alarms


def rivals(total: int) -> dict[str, Rules]:
    """Return a fresh instance of each rule set by name; ``total`` is the training's optimizer steps."""
    return {
        "AutoTrainer": AutoTrainer(total),
        "SageMaker Debugger": SageMaker(),
        "TheDeepChecker": TheDeepChecker(),
        "BTTackler": BTTackler(total),
    }


_Check = tuple[Fault, Iterable[int], "tuple[float, ...] | list[float]", Callable[[float], bool], bool]


def _alarms(snapshot: Snapshot, *checks: _Check) -> list[Alarm]:
    """Return one alarm for each check that finds a tensor.

    || A check holds its fault, tensors, values, test, and whether large is worst.
    """
    alarms = []
    for fault, indices, values, test, largest in checks:
        found = {snapshot.names[i]: values[i] for i in indices if test(values[i])}
        if found:
            alarms.append(Alarm(fault, _ranked(found, largest=largest)))
    return alarms


def _worst(snapshot: Snapshot, values: tuple[float, ...], indices: Iterable[int]) -> tuple[str, ...]:
    return _ranked({snapshot.names[i]: values[i] for i in indices}, largest=True)


def _ranked(values: dict[str, float], *, largest: bool) -> tuple[str, ...]:
    return tuple(sorted(values, key=lambda n: values[n], reverse=largest)[:8])


def _each(values: list[float], test: Callable[[float], bool]) -> float:
    """Return 1.0 if all four successive ratios pass, else 0.0."""
    pairs = list(zip(values, values[1:], strict=False))
    return float(len(pairs) >= 4 and all(a > 0 and test(b / a) for a, b in pairs[-4:]))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
