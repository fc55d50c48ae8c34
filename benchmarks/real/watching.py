"""One run of a case under the guard, and what it said."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import sys
import traceback
import warnings
from collections.abc import Iterator
from statistics import median
from typing import Any

import lightning as L
import torch

from benchmarks.real.case import Model, in_order
from lightning_gradguard import GradGuard, GradientHalt, Policy, Severity

#: Losses whose median counts as the start and as the end, where there is no exam.
FIRST, LAST = 5, 20
#: Steps at which the course of the loss and of the statistics is recorded.
EVERY = 10


class Course(L.Callback):
    """Callback that records the losses, the results of the exam and the guard's statistics.

    Place it right after the guard.

    Args:
        exam: As in `Run`.
        guard: The guard, or None in a run without one.
    """

    def __init__(self, exam: Any, guard: GradGuard | None = None) -> None:
        self.exam, self.guard = exam, guard
        self.losses: list[float] = []
        self.before = self.after = math.nan
        self.parameters = 0
        self.order: tuple[str, ...] = ()
        self.trace: list[dict[str, Any]] = []
        self._module: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._module = pl_module
        self.parameters = sum(p.numel() for p in pl_module.parameters())
        self.before = self._examine()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self.losses.append(float(loss.detach()))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.guard is None:
            return
        for index, own in self.guard._registry.guards.items():
            record = own.record
            if record is not None and record.finite and trainer.global_step % EVERY == 0:
                self.trace.append(
                    {
                        "step": trainer.global_step,
                        "optimizer": index,
                        "loss": _plain(record.loss_mean),
                        "start": _plain(record.loss_start),
                        "tilt": _plain(record.tilt),
                        "update_ratio": _plain(record.update_ratio),
                        "results": {f"{r.detector}: {r.measure}": _plain(r.value) for r in record.results},
                    }
                )

    def finish(self) -> None:
        """Take the exam at the end, also of a run that was halted, and keep the order of layers."""
        if self.guard is not None:
            guards = self.guard._registry.guards.values()
            self.order = tuple(name for own in guards for name in own.tracker.layout.ordered_names)
        if self._module is not None:
            self.after = self._examine()

    @torch.no_grad()
    def _examine(self) -> float:
        if self.exam is None:
            return median(self.losses[-LAST:] or [math.nan])
        was = self._module.training
        self._module.eval()
        try:
            with torch.random.fork_rng(devices=[]):
                return float(self.exam(self._module))
        finally:
            self._module.train(was)

    @property
    def start(self) -> float:
        return self.before if self.exam is not None else median(self.losses[:FIRST] or [math.nan])


def watch(case: Model, seed: int, *, strict: bool = True) -> dict[str, Any]:
    """Train a case once, and return the result as plain data.

    Args:
        case: The case.
        seed: Seed of the weights and the data.
        strict: Train with ``Policy.strict()`` and ``trials``; without any guard when False.
    """
    guard = GradGuard(policy=Policy.strict(), trials=True) if strict else None
    halted, error, said = None, None, []
    seed_all(seed)
    with quiet(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            run = case.build(seed)
            seed_all(seed)
            course = Course(run.exam, guard)
            run.fit([*([guard] if guard else []), course])
        except GradientHalt as halt:
            halted = {"fault": halt.diagnosis.fault.value, "step": halt.step}
        except Exception:
            error = traceback.format_exc()[-3000:]
            if "course" not in locals():
                return {"case": case.id, "seed": seed, "strict": strict, "error": error}
        course.finish()
        said = [str(w.message) for w in seen if w.category.__name__ == "GradientWarning"]
    result: dict[str, Any] = {
        "case": case.id,
        "seed": seed,
        "strict": strict,
        "version": case.version,
        "parameters": course.parameters,
        "steps": len(course.losses),
        "from": _plain(course.start),
        "to": _plain(course.after),
        "learned": math.isfinite(course.after) and bool(case.learned(course.start, course.after)),
        "losses": course.losses,
        "halted": halted,
        "error": error,
        "said": said,
    }
    if guard is not None:
        diagnosis = guard.diagnosis
        try:
            ordered = in_order(course.order, case.order)
        except ValueError as problem:
            ordered, result["order_problem"] = False, str(problem)
        result |= {
            "ordered": ordered,
            "order": course.order,
            "trace": course.trace,
            "findings": [
                {
                    "fault": f.fault.value,
                    "severity": int(f.severity),
                    "step": f.step,
                    "parameters": list(f.parameters),
                    "value": _plain(f.value),
                    "limit": _plain(f.limit),
                    "measure": f.measure,
                    "optimizer": f.optimizer,
                }
                for f in guard.findings
            ],
            "warnings": sum(f.severity >= Severity.WARNING for f in guard.findings),
            "checkup": None if guard.checkup is None else [str(c) for c in guard.checkup.findings],
            "causes": [] if diagnosis is None else [c.value for c in diagnosis.causes],
            "diagnosis": None if diagnosis is None else str(diagnosis),
            "fix": "" if diagnosis is None or not diagnosis.remedies else diagnosis.remedies[0].name,
            "summary": guard.summary,
        }
    return result


def seed_all(seed: int) -> None:
    """Seed every source of random numbers that the packages use."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence logs and whatever a package prints."""
    logging.disable(logging.WARNING)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            sys.stdout.flush()


def _plain(value: float | None) -> float | None:
    """Return the value at four significant digits; None if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


def one_thread() -> None:
    """Limit torch to one thread: the initializer of pool processes."""
    torch.set_num_threads(1)
