"""Healthy trainings of `benchmarks.real`, in which a bare Trainer and one with our callbacks take turns."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from benchmarks import real
from benchmarks.cost.measuring import Rounds
from benchmarks.cost.trainer_arms import BARE, OURS
from benchmarks.cost.turns import SETTLING, TURN, Turns, in_turns
from benchmarks.real.case import Model
from benchmarks.real.plain import SILENT
from benchmarks.real.watching import quiet, seed_all
from lightning_gradguard import GradGuard, GradHistogram, SpikeClip
from lightning_gradguard.cli.cost import CYCLE

#: Steps of a guard before its first turn, in a training that is timed from its first steps on. In each turn, four of 28
#: timed steps are then evaluated in full; on average it is one in eight.
WARM_UP = CYCLE + SETTLING
#: First timed step of a guard, there after a turn that is not timed, here at once: these trainings are short.
FROM = WARM_UP + TURN
#: Trainings of a case, each with a seed of its own, at most: some are too short for more than one turn of each arm.
_MOST_TRAININGS = 4


@dataclass
class Reals:
    """Results of the models.

    Attributes:
        turns: Id of a case to its turns.
        cases: Id to case.
        tensors: Id of a case to its number of trainable tensors.
        clipped: Id of a case to whether the guard had a clipper.
        absent: Packages that are not installed.
        failed: Id of a case to the error that kept it from running.
    """

    turns: dict[str, Rounds] = field(default_factory=dict)
    cases: dict[str, Model] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    clipped: dict[str, bool] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def one_of_each_family(cases: Iterable[Model] = real.HEALTHY) -> list[Model]:
    """Return the first case of each family whose package is installed."""
    chosen: dict[str, Model] = {}
    for case in cases:
        if case.missing() is None:
            chosen.setdefault(case.family, case)
    return list(chosen.values())


def absent(cases: Iterable[Model] = real.HEALTHY) -> list[str]:
    """Return the packages of these cases that are not installed."""
    return sorted({case.package for case in cases if case.missing() is not None})


def measure(
    cases: Iterable[Model],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    report_progress: Callable[[str], None] = lambda what: None,
) -> Reals:
    """Time each of these cases.

    Args:
        cases: Cases whose packages are installed.
        rounds: Timed turns of each arm, or fewer where four trainings end before that.
        clock: Clock that returns seconds.
        report_progress: Called with the title of each case.
    """
    found = Reals(absent=absent())
    for case in cases:
        report_progress(f"real, {case.id}")
        timed = Rounds()
        for seed in range(_MOST_TRAININGS):
            try:
                turns, tensors = _with_or_without_a_clipper(case, seed, rounds, clock)
            except Exception as error:  # whatever a package raises; the others can still be measured
                found.failed[case.id] = f"{type(error).__name__}: {error}"
                break
            timed.extend(turns.rounds)
            if not turns.rounds.seconds[OURS] or len(timed.seconds[OURS]) >= rounds:
                break
        if timed.seconds.get(OURS):
            found.cases[case.id], found.turns[case.id], found.tensors[case.id] = case, timed, tensors
            found.clipped[case.id] = turns.callbacks[OURS][-1].clipper is not None
        else:
            found.failed.setdefault(case.id, "its trainings end before the first timed turn")
    return found


def _with_or_without_a_clipper(
    case: Model, seed: int, rounds: int, clock: Callable[[], float]
) -> tuple[Turns, int]:
    """Time one training; without `SpikeClip` where the Trainer of the case clips."""
    try:
        return _one(case, seed, rounds, clock, GradGuard(clipper=SpikeClip()))
    except MisconfigurationException:
        return _one(case, seed, rounds, clock, GradGuard())


def _one(
    case: Model, seed: int, rounds: int, clock: Callable[[], float], guard: GradGuard
) -> tuple[Turns, int]:
    counter = Count()
    with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The Trainers of these cases have no logger, and so nothing to draw histograms into.
        with patch.dict(SILENT, logger=TensorBoardLogger(folder, name=None)):
            seed_all(seed)
            run = case.build(seed)
            seed_all(seed)

            def fit(own: Sequence[L.Callback], steps: int) -> None:
                run.fit([*own, counter])

            return in_turns(
                {BARE: [], OURS: [GradHistogram(), guard]}, fit, FROM, rounds, clock, untimed=0
            ), counter.tensors


class Count(L.Callback):
    """Callback that counts the trainable tensors."""

    tensors = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tensors = sum(p.requires_grad for p in pl_module.parameters())
