"""Construction and first steps of a guard over thousands of tensors, in a plain loop."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from benchmarks.cost.measuring import Rounds
from lightning_gradguard import Guard, SpikeClip
from lightning_gradguard.cli.cost import BARE, CLIP, MAX_NORM, SyntheticTraining

OURS = "Guard, SpikeClip"


def plain_loop(
    model: nn.Module, steps: int, loops: int, clock: Callable[[], float] = time.perf_counter
) -> Rounds:
    """Time new guards from their construction on, beside a norm and torch's clipping.

    Args:
        model: Model whose parameters get random gradients.
        steps: Steps of each loop.
        loops: Loops, each with a guard of its own.
        clock: Clock that returns seconds.

    Returns:
        One round for each loop: the seconds of the construction, and of each step. A norm and torch's clipping do the
        same at each step; theirs are the median of the loop, everywhere.
    """
    training, generator = SyntheticTraining(model), random.Random(0)
    rounds = Rounds({BARE: [], CLIP: [], OURS: []})
    # Whatever a process does only once.
    small = nn.Linear(4, 4)
    _one_loop(small, SyntheticTraining(small), 2, generator, clock)
    for _ in range(loops):
        for arm, seconds in _one_loop(model, training, steps, generator, clock).items():
            rounds.seconds[arm].append(seconds)
    return rounds


def _one_loop(
    model: nn.Module,
    training: SyntheticTraining,
    steps: int,
    generator: random.Random,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    guards: list[Guard] = []

    def guard() -> None:
        if guards:
            guards[0].step(loss=training.loss)
        else:
            guards.append(Guard(model.named_parameters(), clipper=SpikeClip()))

    arms: dict[str, Callable[[], object]] = {
        BARE: lambda: torch.stack(torch._foreach_norm(training.gradients)).norm(),
        CLIP: lambda: nn.utils.clip_grad_norm_(training.parameters, MAX_NORM),
        OURS: guard,
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    order = list(arms)
    for _ in range(1 + steps):
        training.advance()
        generator.shuffle(order)
        for arm in order:
            training.restore()
            training.wait()
            begun = clock()
            arms[arm]()
            training.wait()
            seconds[arm].append(clock() - begun)
    alike = {arm: [median(seconds[arm])] * len(seconds[arm]) for arm in (BARE, CLIP)}
    return seconds | alike
