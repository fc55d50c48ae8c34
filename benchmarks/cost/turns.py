"""One training in which arms take turns, so that all share the machine, the weights and the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.cost.measuring import Rounds
from benchmarks.cost.models import Training, loader
from benchmarks.cost.trainer_arms import BARE, CLIP, EVERY, OURS, STEADY, Size, silenced
from lightning_gradguard import GradGuard
from lightning_gradguard.cli.cost import CYCLE

#: Arms that consist only of callbacks, so that they can take turns.
ABLE = (
    BARE,
    CLIP,
    OURS,
    STEADY,
    "grad_norm",
    "add_histogram",
    "zclip",
    "timm AGC",
    "torch-module-monitor",
)
#: Steps of a turn: few, so that a slowdown of the machine affects all arms; and a whole sampling cycle of
#: ours.
TURN = CYCLE
#: Untimed first steps of a turn, which absorb the cost of switching.
SETTLING = 4


class Turns(L.Callback):
    """Callback that swaps callbacks and clipping of a Trainer every few steps.

    Place it first. Callbacks that belong to no arm stay.

    Args:
        callbacks: Name of an arm to its callbacks.
        warm_up: Steps of each arm with a guard before the first turn.
        rounds: Timed turns of each arm, after the untimed ones; then training stops.
        clock: Clock that returns seconds.
        untimed: Turns of each arm that are not timed.

    Attributes:
        seconds: Name of an arm to its turns; each turn holds the mean seconds of a step.
    """

    def __init__(
        self,
        callbacks: Mapping[str, Sequence[L.Callback]],
        warm_up: int,
        rounds: int,
        clock: Callable[[], float] = time.perf_counter,
        untimed: int = 1,
    ) -> None:
        self.callbacks, self._each, self.clock = callbacks, warm_up, clock
        self.seconds: dict[str, list[list[float]]] = {arm: [] for arm in callbacks}
        self._guarded = [arm for arm, own in callbacks.items() if any(isinstance(c, GradGuard) for c in own)]
        self._arm, self._begun, self._steps = self._guarded[0], 0.0, 0
        self._untimed = untimed
        self._turns = (rounds + untimed) * len(callbacks)
        self._others: list[L.Callback] = []
        self._usual_clip: float | None = None

    @property
    def warm_up(self) -> int:
        """Steps before the first turn."""
        return self._each * len(self._guarded)

    @property
    def steps(self) -> int:
        """Steps of the whole training; the last one only ends the last turn."""
        return self.warm_up + self._turns * TURN + 1

    @property
    def rounds(self) -> Rounds:
        """Timed turns of all arms; a round that was not finished is left out."""
        whole = min(len(turns) for turns in self.seconds.values())
        return Rounds({arm: turns[self._untimed : whole] for arm, turns in self.seconds.items()})

    @property
    def findings(self) -> int:
        """Number of findings of all guards."""
        every = (c for callbacks in self.callbacks.values() for c in callbacks)
        return sum(len(c.findings) for c in every if isinstance(c, GradGuard))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int
    ) -> None:
        step, now = self._steps - self.warm_up, self.clock()
        if self._steps == 0:
            owned = [self, *(c for own in self.callbacks.values() for c in own)]
            self._others = [c for c in trainer.callbacks if not any(c is mine for mine in owned)]  # type: ignore[attr-defined]
            self._usual_clip = trainer.gradient_clip_val  # type: ignore[assignment]
        self._steps += 1
        if step < 0:
            self._arm = self._guarded[(self._steps - 1) // self._each]
            self._set(trainer)
            return
        turn, place = divmod(step, TURN)
        if place == 0:
            if turn:
                self.seconds[self._arm].append([(now - self._begun) / (TURN - SETTLING)])
            # The starting arm rotates and every other round runs in reverse: no arm always follows the same
            # one.
            order = list(self.callbacks)
            cycle, number = divmod(turn, len(order))
            self._arm = order[((number if cycle % 2 else -number) + cycle) % len(order)]
            self._set(trainer)
            trainer.should_stop = turn == self._turns
        elif place == SETTLING:
            self._begun = self.clock()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning iterates over this list now, so that these callbacks see the end too.
        every = [c for callbacks in self.callbacks.values() for c in callbacks]
        trainer.callbacks.extend(c for c in every if c not in trainer.callbacks)  # type: ignore[attr-defined]

    def _set(self, trainer: L.Trainer) -> None:
        trainer.callbacks = [self, *self.callbacks[self._arm], *self._others]  # type: ignore[attr-defined]
        trainer.gradient_clip_val = 1.0 if self._arm == CLIP else self._usual_clip


def in_turns(
    callbacks: Mapping[str, Sequence[L.Callback]],
    fit: Callable[[Sequence[L.Callback], int], object],
    warm_up: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    untimed: int = 1,
) -> Turns:
    """Train once and let each arm take its turns, after a warm-up of each arm with a guard.

    Args:
        callbacks: Name of an arm to its callbacks; one of them has a guard.
        fit: Trains with these callbacks, and stops after that many steps unless a callback stops it.
        warm_up: Steps of each arm with a guard before the first turn.
        rounds: Timed turns of each arm, after the untimed ones.
        clock: Clock that returns seconds.
        untimed: Turns of each arm that are not timed.

    Returns:
        The callback, with what it has timed.
    """
    turns = Turns(callbacks, warm_up, rounds, clock, untimed)
    with silenced():
        fit([turns, *(c for own in callbacks.values() for c in own)], turns.steps)
    return turns


def take_turns(
    names: Sequence[str],
    size: Size,
    rounds: int,
    folder: Path,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Let arms take turns in the training of a small transformer.

    Args:
        names: Names of the arms, ours among them; each of `ABLE`.
        size: Size of the training.
        rounds: Timed turns of each arm, after a first untimed one.
        folder: Folder for event files.
        clock: Clock that returns seconds.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)

    def fit(callbacks: Sequence[L.Callback], steps: int) -> None:
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=TensorBoardLogger(folder, name=None),
            callbacks=list(callbacks),
            gradient_clip_algorithm="norm",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Training(size.net()), loader(size.batch, size.length, size.vocabulary))

    return in_turns({name: EVERY[name].callbacks(folder) for name in names}, fit, size.warm_up, rounds, clock)
