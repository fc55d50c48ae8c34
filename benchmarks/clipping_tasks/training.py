"""One run of an arm on a task, from the first step to the loss on what is held out."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.clipping_tasks.accidents import Accidents
from benchmarks.clipping_tasks.tasks import TASKS, Problem, Task
from lightning_gradguard import AGC, AdaGC, AutoClip, Guard, NormClip, SpikeClip, SteadyClip, ZClip
from lightning_gradguard.results import GradientHalt, Report

#: The arm that the page is about.
OURS = "SteadyClip"
#: Arm to its clipper, each with its published values; the package's paper or reference gives them.
ARMS: dict[str, Any] = {
    "none": None,
    "NormClip(1.0)": NormClip(1.0),
    "AGC": AGC(exclude=("head.*",)),
    "AutoClip": AutoClip(),
    "ZClip": ZClip(),
    "AdaGC": AdaGC(),
    "SpikeClip": SpikeClip(),
    OURS: SteadyClip(),
}
#: Arms of the NaN regime without a guard: name to the norm that torch clips to.
BARE = {"none, no guard": math.inf, "clip_grad_norm_(1.0), no guard": 1.0}
#: A run of a training: task, arm, regime, peak learning rate, seed.
Work = tuple[str, str, str, float, int]


@torch.no_grad()
def exam(problem: Problem) -> float:
    """Return the held-out loss; inf where it is not finite."""
    loss = problem.exam()
    return loss if math.isfinite(loss) else math.inf


def train(work: Work, steps: int | None = None, clipper: Any = None) -> dict[str, Any]:
    """Train once.

    Args:
        work: What is run.
        steps: Number of steps; the task's own when None.
        clipper: In place of the arm's own, for arms that are none of `ARMS`.

    Returns:
        Task, arm, regime, rate and seed; ``loss``: held out, at most that before the first step, so that a run that
        came apart counts as one that did not learn; ``start``: that loss; ``clipped``: share of the steps that were
        taken and clipped; ``skipped``: steps not taken; ``halted``: True if the guard halted.
    """
    name, arm, regime, rate, seed = work
    task = TASKS[name] if steps is None else replace(TASKS[name], steps=steps)
    clipper = {**ARMS, **BARE}.get(arm) if clipper is None else clipper
    torch.manual_seed(seed)
    problem = task.problem()
    start = exam(problem)
    optimizer = task.optimizer(problem.model.parameters(), lr=rate)
    reports = list(
        run(
            problem,
            optimizer,
            clipper,
            task,
            rate,
            random=torch.Generator().manual_seed(seed),
            accidents=Accidents(regime, task.steps, seed),
        )
    )
    taken = [report for report in reports if not report.skip]
    return {
        "task": name,
        "arm": arm,
        "regime": regime,
        "rate": rate,
        "seed": seed,
        "loss": min(exam(problem), start),
        "start": start,
        "clipped": sum(report.scale < 1 for report in taken) / max(1, len(taken)),
        "skipped": len(reports) - len(taken),
        "halted": len(reports) < task.steps,
    }


def run(
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    clipper: Any,
    task: Task,
    rate: float,
    *,
    random: torch.Generator,
    accidents: Accidents,
    after: Callable[[int], None] = lambda step: None,
) -> list[Report]:
    """Take the steps of a task.

    Args:
        problem: Model and data.
        optimizer: Its optimizer.
        clipper: A clipper; None for none; or a float: torch's clipping to that norm, without a guard.
        task: Steps, schedule and batch sizes.
        rate: Peak learning rate.
        random: What batches are drawn with.
        accidents: What goes wrong.
        after: Called with the number of steps taken, after each.

    Returns:
        The steps' reports, up to a halt.
    """
    # No detectors, since only clippers are compared. Non-finite steps are skipped for every arm.
    if isinstance(clipper, float):
        guard: Any = Bare(problem.model, clipper)
    else:
        own = copy.deepcopy(clipper)
        guard = Guard(problem.model.named_parameters(), optimizer=optimizer, detectors=(), clipper=own)
    reports: list[Report] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(task.steps):
            optimizer.param_groups[0]["lr"] = rate * task.factor(step)
            size = problem.batch_size * (task.growth if step >= task.steps // 2 else 1)
            inputs, targets, factor = accidents.batch(step, *problem.batch(size, random))
            optimizer.zero_grad()
            loss = problem.loss(inputs, targets) * factor
            loss.backward()
            accidents.gradients(step, problem.model)
            try:
                report = guard.step(loss=loss)
            except GradientHalt:
                break
            reports.append(report)
            if not report.skip:
                optimizer.step()
            after(step + 1)
    return reports


def course(problem: Problem, steps: Collection[int], losses: dict[int, float]) -> Callable[[int], None]:
    """Return what notes the held-out loss after some steps, for `run`."""

    def note(step: int) -> None:
        if step in steps:
            losses[step] = exam(problem)

    return note


class Bare:
    """Replacement for the guard in arms without one: torch's own clipping, and every step is taken."""

    def __init__(self, model: torch.nn.Module, max_norm: float) -> None:
        self.model, self.max_norm = model, max_norm

    def step(self, loss: Tensor) -> Report:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm).item()
        scale = min(1.0, self.max_norm / norm)
        return Report(0, loss.item(), norm, norm * scale, self.max_norm, scale, skip=False)
