"""Runs of one report under our guard and the rivals' rules, and the points for what was said."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.judging.peers import STANDS_FOR
from benchmarks.judging.watching import Rivals
from benchmarks.reports.case import CURED, REPORTED, Case
from benchmarks.zoo.running import quiet
from lightning_gradguard import Fault, GradGuard, GradientHalt, GradientWarning, Policy, Severity
from lightning_gradguard.diagnosis.fixes import PROBLEMS
from lightning_gradguard.diagnosis.trials.change import Change, SwappedForward
from lightning_gradguard.diagnosis.trials.trial import apply_change_, run_trial
from lightning_gradguard.introspection.sandbox import SandboxedStep, loss_in

#: Scores of all variants, from trainings without our product; written by ``establish.py``.
TRUTH = Path(__file__).with_name("truth.json")
#: What the product said before any rule was changed for these cases.
FIRST_SIGHT = Path(__file__).with_name("first_sight.json")
#: The four points of a case, in the order of the page.
POINTS = ("fault", "cause", "fix", "quiet")

Record = dict[str, Any]


def train(
    case: Case,
    variant: str,
    module: L.LightningModule,
    loader: Any,
    callbacks: Sequence[L.Callback] = (),
) -> tuple[bool, list[str], str]:
    """Train a variant.

    Returns:
        True if the guard halted it, the guard's warnings, and the error that ended it ("" without one).
    """
    arguments = {} if case.trainer is None else dict(case.trainer(variant))
    halted, error = False, ""
    with quiet(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = L.Trainer(
            **{
                "accelerator": "cpu",
                "max_steps": case.steps,
                "max_epochs": -1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 10**9,
                **arguments,
                "callbacks": [*arguments.get("callbacks", ()), *callbacks],
            }
        )
        try:
            trainer.fit(module, loader)
        except GradientHalt:
            halted = True
        except Exception as problem:  # some reports end with one
            error = f"{type(problem).__name__}: {problem}"[:300]
    said = [str(w.message) for w in seen if issubclass(w.category, GradientWarning)]
    return halted, said, error


def score_of(case: Case, variant: str, seed: int) -> float:
    """Train a variant without any guard and return its score."""
    module, loader = case.make(variant, seed)
    train(case, variant, module, loader)
    return case.quality(module)


def play(case: Case, seed: int, *, truth: Mapping[str, Any] | None = None) -> Record:
    """Play a case once, as reported and cured, and score what is said.

    Args:
        case: The case.
        seed: Seed of modules and data order.
        truth: Contents of `TRUTH`; scores that it lacks are measured.

    Returns:
        Plain data: ``points`` (see `POINTS`), ``rivals`` (name to fault and quiet), what was said, and scores.
    """
    own, rivals = ReportRivals(case), ReportRivals(case)
    watch = _run(case, REPORTED, seed, GradGuard(), rivals)
    strict = _run(case, REPORTED, seed, GradGuard(policy=Policy.strict(), trials=True))
    twin = _run(case, CURED, seed, GradGuard(policy=Policy.strict(), trials=True), own)
    cause = next((run["cause"] for run in (strict, watch) if run["cause"]), "")
    remedy = next((run["remedy"] for run in (strict, watch) if run["remedy"] is not None), None)
    known = (truth or {}).get(case.id, {}).get("seeds", {}).get(str(seed), {})
    applied, quality = _apply(case, seed, remedy, known)
    first = watch["findings"][0] if watch["findings"] else None
    spoken = "\n".join(watch["said"]).lower().replace("_", " ")
    return {
        "case": case.id,
        "seed": seed,
        "points": {
            "fault": (first is not None and first[0] in {f.value for f in case.faults})
            or any(word.lower().replace("_", " ") in spoken for word in case.said),
            "cause": cause in {c.value for c in case.causes},
            "fix": quality is not None and quality >= case.level,
            "quiet": not (twin["halted"] or twin["findings"] or twin["said"] or twin["checkup"]),
        },
        "rivals": {
            name: {"fault": _is_right(case, alarms), "quiet": not own.alarms[name]}
            for name, alarms in rivals.alarms.items()
        },
        "first": first,
        "cause": cause,
        "remedy": None if remedy is None else remedy.name,
        "applied": applied,
        "quality": _plain(quality),
        "scores": {"reported": watch["score"], "cured": twin["score"]},
        "texts": {"watch": watch["said"], "strict": strict["said"], "diagnosis": strict["diagnosis"]},
        "twin": {key: twin[key] for key in ("halted", "findings", "said", "checkup")},
        "errors": [run["error"] for run in (watch, strict, twin) if run["error"]],
    }


def _run(case: Case, variant: str, seed: int, guard: GradGuard, *before: L.Callback) -> Record:
    module, loader = case.make(variant, seed)
    halted, said, error = train(case, variant, module, loader, [*before, guard])
    diagnosis, checkup = guard.diagnosis, guard.checkup
    problems = [PROBLEMS[problem.kind] for problem in guard._registry.problems]
    cause, remedy = "", None
    if diagnosis is not None:
        cause, remedy = diagnosis.causes[0].value, next(iter(diagnosis.remedies), None)
    elif problems:
        cause, remedy = problems[0][0].value, problems[0][1]
    elif checkup is not None and checkup.causes:
        cause = checkup.causes[0].value
    return {
        "halted": halted,
        "said": said,
        "error": error,
        "score": _plain(case.quality(module)),
        "findings": [
            [f.fault.value, f.step, list(f.parameters[:3])]
            for f in guard.findings
            if f.severity >= Severity.WARNING
        ],
        "cause": cause,
        "remedy": remedy,
        "diagnosis": "" if diagnosis is None else str(diagnosis),
        "checkup": "" if checkup is None or checkup.ok else str(checkup),
    }


def _apply(case: Case, seed: int, remedy: Any, known: Mapping[str, Any]) -> tuple[str, float | None]:
    """Apply a fix to the reported training; return how, and the score, or None if it cannot be applied."""
    if remedy is None:
        return "", None
    variant = case.variant_of(remedy.name, remedy.key, remedy.how)
    if variant is not None:
        return variant, float(known[variant]) if variant in known else score_of(case, variant, seed)
    change = remedy.change
    if change is None or change.input or change.target:  # scores are on data of the original scale
        return "", None
    try:
        return "change", score_with_change(case, seed, change)
    except Exception as problem:
        return f"cannot be applied: {type(problem).__name__}: {problem}"[:200], None


def score_with_change(case: Case, seed: int, change: Change) -> float:
    """Train the reported variant with a change in force, without a guard, and return its score."""
    module, loader = case.make(REPORTED, seed)
    optimizer = [ChangedOptimizer(change)]
    if change.fields <= {"rate", "decay", "momentum"}:
        train(case, REPORTED, module, loader, optimizer)
        return case.quality(module)
    with torch.random.fork_rng(devices=[]), quiet():
        subject = SandboxedStep(
            module,
            lambda batch: loss_in(module.training_step(batch, 0)),
            next(iter(loader)),
            torch.optim.SGD(module.parameters(), lr=0.0),
        )
        structure = run_trial(subject, Change(), layers=(), passes=1).structure
    apply_change_(module, change, structure)
    if not change.changes_forward:
        train(case, REPORTED, module, loader, optimizer)
        return case.quality(module)
    swapped = SwappedForward(module, change, structure)
    module.training_step = _within(swapped, module.training_step)  # type: ignore[method-assign]
    train(case, REPORTED, module, loader, optimizer)
    with swapped:
        return case.quality(module)


def _within(swaps: SwappedForward, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def swapped(*args: Any, **kwargs: Any) -> Any:
        with swaps:
            return function(*args, **kwargs)

    return swapped


class ChangedOptimizer(L.Callback):
    """Callback that changes learning rate, momentum and weight decay before the first step."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        change = self.change
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for name, factor in (
                    ("lr", change.rate),
                    ("initial_lr", change.rate),
                    ("weight_decay", change.decay),
                ):
                    if name in group:
                        group[name] *= factor
                if change.momentum is not None and "momentum" in group:
                    group["momentum"] = change.momentum
        for config in trainer.lr_scheduler_configs:
            rates = getattr(config.scheduler, "base_lrs", [])
            rates[:] = [change.rate * rate for rate in rates]


class ReportRivals(Rivals):
    """The rivals' rules on a report; they see its score as the accuracy, measured every tenth step."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)  # type: ignore[arg-type]
        self._case, self._calls, self._score = case, 0, math.nan

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if all(self.alarms.values()):
            return
        if self._calls % 10 == 0:
            self._score = self._case.quality(pl_module)
        self._calls += 1
        pl_module.score = self._score
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


def _is_right(case: Case, alarms: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if one of a rival's first alarms stands for an acceptable fault."""
    named = [Fault(alarm["fault"]) for alarm in alarms]
    return any(fault in case.faults for own in named for fault in STANDS_FOR.get(own, (own,)))


def _plain(value: float | None) -> float | None:
    """Return four significant digits; None if it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def read(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file; empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, entries: Mapping[str, Any]) -> None:
    """Write one line per case, in the order of their ids."""
    lines = [f"{json.dumps(k)}: {json.dumps(entries[k], sort_keys=True)}" for k in sorted(entries)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
