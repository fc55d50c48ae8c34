"""Runs of one case under our guard and the rivals' rules side by side, with a record of all alarms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.judging.peers import Alarm, Rules, rivals
from benchmarks.judging.snapshot import take
from benchmarks.zoo.case import Case
from benchmarks.zoo.running import fit
from lightning_gradguard import GradGuard

#: Name of our rules in tables and records.
OURS = "lightning-gradguard"
#: Steps at which statistics are recorded.
MILESTONES = (5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 250, 299, 400, 599)
#: Share of the starting loss above which there is no progress, and the first step to which that applies.
STUCK, WARM = 0.9, 30


def watch(case: Case, seed: int, guard: Callable[[], GradGuard] = GradGuard) -> dict[str, Any]:
    """Run a case once and return the result as plain data.

    Args:
        case: The case to train.
        seed: Seed of the module and its data.
        guard: Creates the callback under test.

    Returns:
        ``alarms``: for each rule set a list of ``{fault, severity, step, onset, parameters, value}``, oldest
        first; rivals stop at the first step with an alarm. ``statistics``: extremes. ``trace``: values at
        `MILESTONES`.
    """
    ours = guard()
    before, after = Rivals(case), Listener(ours)
    training = case.make(seed)
    halt = fit(case, training, [before, ours, after])
    alarms = {OURS: after.findings, **{name: list(found) for name, found in before.alarms.items()}}
    return {
        "case": case.id,
        "seed": seed,
        "alarms": alarms,
        "halted": None if halt is None else halt.diagnosis.fault.value,
        "statistics": {name: extreme.plain() for name, extreme in after.extremes.items()},
        "trace": after.trace,
    }


class Rivals(L.Callback):
    """Callback that passes each unmodified step to the rivals' rules. Each rule set stops at its first alarm."""

    def __init__(self, case: Case) -> None:
        self.total = case.steps
        self.alarms: dict[str, list[dict[str, Any]]] = {name: [] for name in rivals(case.steps)}
        self._rules: dict[int, dict[str, Rules]] = {}
        self._before: dict[int, dict[str, Tensor]] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if all(self.alarms.values()):
            return
        index = next(
            i for i, own in enumerate(trainer.optimizers) if getattr(own, "optimizer", own) is optimizer
        )
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = [(n, p) for n, p in pl_module.named_parameters() if id(p) in owned]
        rules = self._rules.setdefault(index, rivals(self.total))
        snapshot = take(trainer.global_step, float(pl_module.score), named, self._before.get(index, {}))
        self._before[index] = {n: p.detach().clone() for n, p in named}
        for name, own in rules.items():
            if not self.alarms[name] and snapshot.names:
                self.alarms[name] += [_as_record(alarm, snapshot.step) for alarm in own.check(snapshot)]


class Listener(L.Callback):
    """Callback that records our guard's findings, at every severity, and its statistics.

    Place it right after the guard.
    """

    def __init__(self, guard: GradGuard) -> None:
        self.guard = guard
        self.findings: list[dict[str, Any]] = []
        self.extremes: dict[str, Extreme] = {}
        self.trace: list[dict[str, Any]] = []
        self._heard: Any = None
        self._judged: dict[int, int] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._listen(trainer.global_step)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._listen(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._listen(trainer.global_step)

    def _listen(self, step: int) -> None:
        report = self.guard.report
        if report is None or report is self._heard:
            return
        self._heard = report
        for finding in report.findings:
            self.findings.append(
                {
                    "fault": finding.fault.value,
                    "severity": int(finding.severity),
                    "step": step,
                    "onset": finding.step,
                    "parameters": list(finding.parameters),
                    "value": _plain(finding.value),
                    "detector": finding.detector,
                    "optimizer": finding.optimizer,
                }
            )
        guards = self.guard._registry.guards
        index = next((i for i, own in guards.items() if own.report is report), 0)
        record = guards[index].record
        if record is None or not record.finite:
            return
        judged = self._judged[index] = self._judged.get(index, 0) + 1
        stuck = record.loss_mean > record.loss_start - (1 - STUCK) * abs(record.loss_start)
        seen = {f"{s.detector}: {s.measure}": s for s in record.results}
        for name, result in seen.items():
            extreme = self.extremes.setdefault(name, Extreme(result.fault.value, result.limit))
            extreme.see(judged - 1, result.value, stuck and judged > WARM, result.raised)
        if judged - 1 in MILESTONES:
            self.trace.append(
                {
                    "step": judged - 1,
                    "optimizer": index,
                    "loss": _plain(record.loss_mean / record.loss_start if record.loss_start else math.nan),
                    "tilt": _plain(record.tilt),
                    "update_ratio": _plain(record.update_ratio),
                    **{name.partition(":")[0]: _plain(s.value) for name, s in seen.items()},
                }
            )


class Extreme:
    """Lowest and highest value of a statistic in a run: over all steps, and over steps without progress."""

    def __init__(self, fault: str, limit: float) -> None:
        self.fault, self.limit = fault, limit
        self.all: list[float | None] = [None, None]
        self.stuck: list[float | None] = [None, None]
        self.raised = 0

    def see(self, step: int, value: float, stuck: bool, raised: bool) -> None:
        if not math.isfinite(value):
            return
        self.raised += raised
        for pair in (self.all, self.stuck) if stuck else (self.all,):
            pair[0] = value if pair[0] is None else min(pair[0], value)
            pair[1] = value if pair[1] is None else max(pair[1], value)

    def plain(self) -> dict[str, Any]:
        return {
            "fault": self.fault,
            "limit": _plain(self.limit),
            "all": [_plain(v) for v in self.all],
            "stuck": [_plain(v) for v in self.stuck],
            "raised": self.raised,
        }


def _as_record(alarm: Alarm, step: int) -> dict[str, Any]:
    return {
        "fault": alarm.fault.value,
        "severity": 1,
        "step": step,
        "onset": step,
        "parameters": list(alarm.parameters),
        "value": None,
    }


def _plain(value: float | None) -> float | None:
    """Return the value at four significant digits; None if it is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


def one_thread() -> None:
    """Limit torch to one thread: the initializer of pool processes."""
    torch.set_num_threads(1)
