"""One training in which arms take turns, so that all share the machine, the weights and the memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

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
_SETTLING = 4


class Turns(L.Callback):
    """Callback that swaps the callbacks and clipping of a Trainer every few steps.

    Place it first.

    Args:
        callbacks: Name of an arm to its callbacks.
        warm_up: Steps of each arm with a guard before the first turn.
        clock: Clock that returns seconds.

    Attributes:
        seconds: Name of an arm to its turns; each turn holds the mean seconds of a step.
    """

    def __init__(
        self, callbacks: dict[str, list[L.Callback]], warm_up: int, clock: Callable[[], float]
    ) -> None:
        self.callbacks, self._each, self.clock = callbacks, warm_up, clock
        self.seconds: dict[str, list[list[float]]] = {arm: [] for arm in callbacks}
        self._guarded = [arm for arm, own in callbacks.items() if any(isinstance(c, GradGuard) for c in own)]
        self._arm, self._begun, self._steps = OURS, 0.0, 0

    @property
    def warm_up(self) -> int:
        """Steps before the first turn."""
        return self._each * len(self._guarded)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, index: int
    ) -> None:
        step, now = self._steps - self.warm_up, self.clock()
        self._steps += 1
        if step < 0:
            self._arm = self._guarded[(self._steps - 1) // self._each]
            self._set(trainer)
            return
        turn, place = divmod(step, TURN)
        if place == 0:
            if turn:
                self.seconds[self._arm].append([(now - self._begun) / (TURN - _SETTLING)])
            # The starting arm rotates and every other round runs in reverse: no arm always follows the same
            # one.
            order = list(self.callbacks)
            cycle, number = divmod(turn, len(order))
            self._arm = order[((number if cycle % 2 else -number) + cycle) % len(order)]
            self._set(trainer)
        elif place == _SETTLING:
            self._begun = self.clock()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning iterates over this list now, so that these callbacks see the end too.
        every = [c for callbacks in self.callbacks.values() for c in callbacks]
        trainer.callbacks.extend(c for c in every if c not in trainer.callbacks)

    def _set(self, trainer: L.Trainer) -> None:
        trainer.callbacks = [self, *self.callbacks[self._arm]]
        trainer.gradient_clip_val = 1.0 if self._arm == CLIP else None


def take_turns(
    names: Sequence[str],
    size: Size,
    rounds: int,
    folder: Path,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Rounds, int]:
    """Train once and let each arm take its turns, after a warm-up of each arm with a guard.

    Args:
        names: Names of the arms, ours among them; each of `ABLE`.
        size: Size of the training.
        rounds: Timed turns of each arm, after a first untimed one.
        folder: Folder for event files.
        clock: Clock that returns seconds.

    Returns:
        Mean seconds of a step in each turn, and the number of our guard's findings.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    callbacks = {name: EVERY[name].callbacks(folder) for name in names}
    turns = Turns(callbacks, size.warm_up, clock)
    count = (rounds + 1) * len(names) * TURN
    with silenced():
        trainer = L.Trainer(
            max_steps=turns.warm_up + count + 1,
            accelerator="cpu",
            devices=1,
            logger=TensorBoardLogger(folder, name=None),
            callbacks=[turns, *(c for own in callbacks.values() for c in own)],
            gradient_clip_algorithm="norm",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Training(size.net()), loader(size.batch, size.length, size.vocabulary))
    seconds = {name: turns.seconds[name][1:] for name in names}
    return Rounds(seconds), sum(len(getattr(c, "findings", ())) for c in callbacks[OURS])
