"""Runs of 5,000 steps, whose batches become larger halfway, and fine-tuning of a trained model.

A clipper whose limit follows the norms could follow them down, or hold learning back once norms rise; and one that
begins carefully could waste the first steps where there is nothing to be careful of.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch

from benchmarks.clipping_tasks.accidents import Accidents
from benchmarks.clipping_tasks.page import table
from benchmarks.clipping_tasks.pairs import difference
from benchmarks.clipping_tasks.tasks import TASKS, Problem
from benchmarks.clipping_tasks.training import ARMS, OURS, course, exam, run

STEPS, GROWTH, PARTS = 5000, 4, 5
#: Task to its rate: about the best one of 5,000 steps without a clipper.
LONG = {"lm-adamw": 4e-3, "cnn-sgd": 0.04}
#: Task to the rates of training and of fine-tuning.
TUNED = {"mixer-adamw": (4e-3, 1e-3), "cnn-sgd": (0.04, 0.02)}
#: Steps after which a fine-tuned model is looked at.
LOOKS = (5, 10, 20, 50, 100)
COMPARED = ("none", "NormClip(1.0)", "SpikeClip", OURS)


def long_run(task_name: str, arm: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Train for long.

    Returns:
        ``course``: held-out loss after each fifth of the steps; ``scales``: for each fifth, the median of the norm
        after clipping over that before.
    """
    task = replace(TASKS[task_name], steps=steps, growth=GROWTH)
    torch.manual_seed(seed)
    problem = task.problem()
    optimizer = task.optimizer(problem.model.parameters(), lr=LONG[task_name])
    part = steps // PARTS
    losses: dict[int, float] = {}
    reports = run(
        problem,
        optimizer,
        ARMS[arm],
        task,
        LONG[task_name],
        random=torch.Generator().manual_seed(seed),
        accidents=Accidents("clean", steps, seed),
        after=course(problem, range(part, steps + 1, part), losses),
    )
    scales = [
        statistics.median(report.scale for report in reports[i : i + part])
        for i in range(0, part * PARTS, part)
    ]
    return {
        "kind": "long",
        "task": task_name,
        "arm": arm,
        "seed": seed,
        "course": [*losses.values()],
        "scales": scales,
    }


def fine_tuning(task_name: str, arm: str, seed: int, *, kept: bool) -> dict[str, Any]:
    """Train without a clipper, then go on with negatives of the images.

    Args:
        task_name: A key of `TUNED`.
        arm: The arm of the second part.
        seed: Seed of everything.
        kept: Keep the optimizer with its moments; else it begins anew.

    Returns:
        ``course``: held-out loss on negatives before, and after the steps of `LOOKS`.
    """
    task, (rate, tuning) = TASKS[task_name], TUNED[task_name]
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    problem = task.problem()
    optimizer = task.optimizer(problem.model.parameters(), lr=rate)
    clean = Accidents("clean", task.steps, seed)
    run(problem, optimizer, None, task, rate, random=random, accidents=clean)
    negatives = Negatives(problem)
    if not kept:
        optimizer = task.optimizer(problem.model.parameters(), lr=tuning)
    losses = {0: exam(negatives)}
    after = course(negatives, LOOKS, losses)
    short = replace(task, steps=LOOKS[-1], warm_up=0.0)
    run(negatives, optimizer, ARMS[arm], short, tuning, random=random, accidents=clean, after=after)
    return {
        "kind": "tuned",
        "task": task_name,
        "arm": arm,
        "seed": seed,
        "kept": kept,
        "course": [*losses.values()],
    }


class Negatives(Problem):
    """The same model on images whose light and dark are exchanged."""

    def __init__(self, problem: Problem) -> None:
        self.model, self.batch_size, self._problem = problem.model, problem.batch_size, problem

    def batch(self, size: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self._problem.batch(size, random)
        return -inputs, targets

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._problem.loss(inputs, targets)

    def exam(self) -> float:
        model = self._problem.model
        handle = model.register_forward_pre_hook(lambda _, inputs: (-inputs[0],))
        try:
            return self._problem.exam()
        finally:
            handle.remove()


def section(runs: list[dict[str, Any]]) -> str:
    """Return the page's section on these runs; empty without any."""
    own = [run for run in runs if run["kind"] in ("long", "tuned")]
    return "\n\n".join([_long(own), _tuned(own)]) if own else ""


def _long(runs: list[dict[str, Any]]) -> str:
    rows = []
    for task in LONG:
        plain = _of(runs, "long", task, "none")
        for arm in COMPARED:
            mine = _of(runs, "long", task, arm)
            if not mine:
                continue
            last = difference([r["course"][-1] for r in mine], [r["course"][-1] for r in plain])
            losses, scales = (
                [f"{statistics.fmean(values):.3f}" for values in zip(*(r[key] for r in mine), strict=True)]
                for key in ("course", "scales")
            )
            rows.append([task, arm, *losses, "" if arm == "none" else str(last), " ".join(scales)])
    head = [
        "task",
        "arm",
        *(f"{STEPS // PARTS * (i + 1):,}" for i in range(PARTS)),
        "last, to none",
        "typical scale",
    ]
    return (
        f"## {STEPS:,} steps with a schedule and larger batches\n\n"
        f"Rates {', '.join(f'{rate:g} for {task}' for task, rate in LONG.items())}; batches are {GROWTH} times as "
        "large from the middle on. Held-out loss after each fifth, and for each fifth the median of the norm after "
        "clipping "
        "over the norm before: a limit that crept down would show as a falling scale.\n\n" + table(head, rows)
    )


def _tuned(runs: list[dict[str, Any]]) -> str:
    rows = []
    for task in TUNED:
        for kept in (True, False):
            for arm in COMPARED:
                mine = [r for r in _of(runs, "tuned", task, arm) if r["kept"] == kept]
                if mine:
                    losses = [
                        f"{statistics.fmean(values):.3f}"
                        for values in zip(*(r["course"] for r in mine), strict=True)
                    ]
                    rows.append([task, "kept" if kept else "new", arm, *losses])
    head = ["task", "optimizer", "arm", *(f"{step}" for step in (0, *LOOKS))]
    return (
        "## Fine-tuning\n\nA model trained without a clipper goes on with negatives of its images, "
        f"at {' and '.join(f'{rate:g}' for _, rate in TUNED.values())}: with the optimizer it was trained with, or "
        "with a new one. Held-out loss on negatives after so many steps.\n\n" + table(head, rows)
    )


def _of(runs: list[dict[str, Any]], kind: str, task: str, arm: str) -> list[dict[str, Any]]:
    wanted = (kind, task, arm)
    return sorted((r for r in runs if (r["kind"], r["task"], r["arm"]) == wanted), key=lambda r: r["seed"])
