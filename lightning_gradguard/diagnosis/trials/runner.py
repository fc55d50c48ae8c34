"""Try fixes on the model and rank them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause, Diagnosis, Remedy
from lightning_gradguard.diagnosis.fixes import find_fixes, fixes_of_problems
from lightning_gradguard.diagnosis.trials.candidates import combine, find_candidates, is_bottomless
from lightning_gradguard.diagnosis.trials.change import Change, Part
from lightning_gradguard.diagnosis.trials.cures import is_cure, try_cures
from lightning_gradguard.diagnosis.trials.trial import TrialResult, run_trial
from lightning_gradguard.diagnosis.wording import count, number
from lightning_gradguard.introspection.sandbox import SandboxedStep
from lightning_gradguard.results import Fault
from lightning_gradguard.stats.trends import HEALTHY_DEPTH_TILT

#: Forward passes of all trials together, each with a backward pass.
MAX_PASSES = 30
#: Passes of a trial with virtual steps: three steps, and one pass to measure the loss.
_FULL = 4
#: Tilts over time that are healthy, in decades: within the limits of `TimeTilt`.
HEALTHY_TIME_TILT = (-3.0, 6.0)
#: Decades beyond the healthy range that still count as healthy.
_TOLERANCE = 0.05
#: Parts of the loss: by which a fix must lower it, and by which it may raise it if it brings the tilt back to health.
_BETTER, _HARMLESS = 0.01, 0.1
#: Part of the best fix's fall of the loss that a cure needs. With half, the smallest cure trains as many cases of
#: benchmarks/diagnosis.md as the fix with the lowest loss; with less, new initial weights alone come first too often.
_CURING = 0.5
#: Growth of a layer's weights from which they are rewound before a trial.
_RUNAWAY = 3.0
#: Most tried fixes that are shown, and most others.
_SHOWN, _OTHERS = 6, 3
#: Faults whose fixes are tried whatever the cause, and causes whose fixes are tried whatever the fault.
_FAULTS = frozenset({Fault.VANISHING, Fault.VANISHING_IN_TIME, Fault.EXPLODING, Fault.DEAD})
_CAUSES = frozenset(
    {
        *(Cause.SATURATING_ACTIVATION, Cause.BAD_INITIALIZATION, Cause.TOO_DEEP, Cause.RECURRENCE),
        *(Cause.DEAD_ACTIVATION, Cause.UNNORMALIZED_INPUT, Cause.TARGET_SCALE, Cause.LEARNING_RATE_TOO_HIGH),
        Cause.MOMENTUM,
    }
)
#: Causes that no fix which can be tried concerns, whatever the fault.
_UNTRIED = frozenset({
    Cause.DETACHED_GRAPH, Cause.LOW_PRECISION, Cause.BAD_DATA, Cause.OUTLIER_BATCH, Cause.GRADIENT_SCALING,
    Cause.STALE_GRADIENTS,
})  # fmt: skip


class Trial(NamedTuple):
    """Fix that was tried, with result or problem."""

    fix: Remedy
    result: TrialResult | None
    problem: str = ""


def try_fixes(
    diagnosis: Diagnosis, context: DiagnosticContext, sandboxed_step_of: Callable[[], SandboxedStep]
) -> Diagnosis:
    """Return the diagnosis with tried fixes first.

    Fixes are tried for faults of the gradient's scale, and for causes of that kind. Every fix that fits gets one
    forward and backward pass, which measures its tilt. Those with the healthiest tilt, and the smallest change with a
    healthy one, then take virtual steps on half of the batch, and are ranked by the loss on all of it. Of fixes that
    cure, the smallest change comes first (`Change.size`). All trials together take at most `MAX_PASSES` passes.

    Args:
        diagnosis: The diagnosis, with the fixes that its evidence suggests.
        context: The facts that it rests on.
        sandboxed_step_of: Function that returns the step to try them on; raises ValueError with the reason if the step
            cannot be run by itself.
    """
    cause = diagnosis.causes[0]
    if diagnosis.fault == Fault.NONFINITE and any(map(is_cure, find_fixes(context, [cause]))):
        return try_cures(diagnosis, context, sandboxed_step_of)
    if cause in _UNTRIED or not (diagnosis.fault in _FAULTS or cause in _CAUSES or context.decayed):
        reason = "No fix was tried: none for this cause can be tried on a copy of the model."
        return dataclasses.replace(diagnosis, trials=(reason,))
    try:
        step = sandboxed_step_of()
        # The parameters of a compiled module have a prefix, which the names in the context lack.
        own = {name.replace("_orig_mod.", ""): name for name, _ in step.module.named_parameters()}
        layers = tuple(own.get(context.names[i], context.names[i]) for i in context.layers)
        norms = _norms_to_rewind_to(context)
        runner = TrialRunner(step, layers, norms, bottomless=is_bottomless(context, diagnosis.causes))
        baseline = runner.run_baseline()
    except Exception as error:
        return dataclasses.replace(diagnosis, trials=(f"No fix was tried: {_reason(error)}.",))
    candidates = find_candidates(
        context, diagnosis.causes, step.module, step.batch, baseline.structure, baseline.profile
    )
    trials = runner.run(candidates)
    fixes = [_with_result(trial, baseline) for trial in trials]
    tried = [fix for fix in fixes if fix.tried]
    failed = [fix for fix in fixes if not fix.tried]
    keys = {fix.key for fix in fixes}
    others = [fix for fix in diagnosis.remedies if fix.key not in keys][: max(1, _OTHERS - len(failed))]
    # The first fix that the evidence suggests is shown whatever came of it.
    first = diagnosis.remedies[0].key if diagnosis.remedies else ""
    shown = [*tried[:_SHOWN], *(fix for fix in tried[_SHOWN:] if fix.key == first)]
    nothing_helped = bool(trials) and not context.decayed and all(map(runner.is_worse, trials))
    best = [*others, *shown] if nothing_helped else [*shown, *others]
    # A mistake that the graph shows has one fix, and what another does to the tilt says nothing against it.
    mends = fixes_of_problems(context, cause)
    best.sort(key=lambda fix: fix.key not in mends)
    return dataclasses.replace(
        diagnosis,
        remedies=(*best, *failed[:_OTHERS]),
        trials=tuple(_account(runner, baseline, len(tried), nothing_helped=nothing_helped)),
        layers=tuple(context.names[i] for i in context.layers),
        profile=baseline.profile,
    )


class TrialRunner:
    """Runner of trials within a budget of passes.

    Args:
        step: The training step that fixes are tried on.
        layers: Names of the layers' weights, input first.
        start_norms: L2 norms that parameters are brought to before each trial, by name.
        bottomless: True if the loss has no lower bound, so that a lower one is no better.

    Attributes:
        passes: Forward passes taken so far.
        halve: False if half of the batch turned out to be no batch.
        baseline: Result of the trial without a change, after `run_baseline`.
    """

    def __init__(
        self,
        step: SandboxedStep,
        layers: tuple[str, ...],
        start_norms: dict[str, float] | None = None,
        *,
        bottomless: bool = False,
    ) -> None:
        self.step, self.layers, self.start_norms, self.bottomless = step, layers, start_norms, bottomless
        self.passes, self.halve = 0, True
        self.baseline: TrialResult | None = None

    def run_baseline(self) -> TrialResult:
        """Run the trial without a change."""
        try:
            self.baseline = self._run(Change(), _FULL)
        except Exception:  # half of the batch may be no batch: a graph with its adjacency matrix
            self.halve = False
            self.baseline = self._run(Change(), _FULL)
        return self.baseline

    def run(self, fixes: list[Remedy]) -> list[Trial]:
        """Try the fixes.

        All get one pass, and the most promising virtual steps. So does the smallest healthy change; if it is one of
        these, the best two are tried together instead.

        Returns:
            The trials, best first: those that did better than no fix, of which the cures come first and by size; then
            healthy ones without virtual steps, those that did no better, the unhealthy ones, and those that failed.
        """
        short = [self._try(fix, 1) for fix in fixes[: MAX_PASSES - self.passes - 2 * _FULL]]
        failed = [trial for trial in short if trial.result is None]
        short = [trial for trial in short if trial.result is not None]
        short.sort(key=lambda trial: round(unhealthy_decades(trial.result), 1))
        healthy = [trial for trial in short if unhealthy_decades(trial.result) < _TOLERANCE]
        smallest = min(healthy, key=_size, default=None)
        full: list[Trial] = []
        while short and MAX_PASSES - self.passes >= 2 * _FULL:
            full.append(self._try(short.pop(0).fix, _FULL))
        full.sort(key=self._rank)
        known = [fix.change for fix in fixes]
        pairs = (combine(a.fix, b.fix) for a, b in combinations(full, 2))
        last = next((both for both in pairs if both is not None and both.change not in known), None)
        if smallest is not None and smallest in short:
            short.remove(smallest)
            last = smallest.fix
        last = last or (short.pop(0).fix if short else None)
        if last is not None and MAX_PASSES - self.passes >= _FULL:
            full.append(self._try(last, _FULL))
        goal = self._curing_loss(full)
        full.sort(key=lambda trial: self._rank(trial, goal))
        # A fix that did no better than nothing must not stand before one that has not been seen to fail.
        worse = [trial for trial in full if self.is_worse(trial)]
        # Where no tilt can be measured, a single pass shows nothing.
        healthy = [
            trial
            for trial in short
            if unhealthy_decades(trial.result) < _TOLERANCE and _has_tilt(trial.result)
        ]
        others = [trial for trial in short if trial not in healthy]
        return [*full[: len(full) - len(worse)], *healthy, *worse, *others, *failed]

    def is_worse(self, trial: Trial) -> bool:
        """Return True if no better than no fix.

        A failed trial counts too. Where a fix brings the tilt back to health, a slightly higher loss passes: weights
        that are drawn again start from another loss, and a few steps do not show what a long sequence teaches.
        """
        result, baseline = trial.result, self.baseline
        if result is None or result.loss == math.inf:
            return True
        # Where the steps without a fix end in overflow, the loss before them is what counts.
        loss = math.inf if baseline is None else min(baseline.loss, baseline.start)
        is_healthier = unhealthy_decades(result) <= unhealthy_decades(baseline) - 1
        margin = (_HARMLESS if is_healthier else -_BETTER) * abs(loss) if math.isfinite(loss) else 0.0
        return result.loss >= loss + margin and not self.bottomless

    def _curing_loss(self, trials: list[Trial]) -> float:
        """Return the largest loss with which a healthy fix counts as a cure.

        -inf if no loss tells a better fix from a worse one.
        """
        losses = [
            trial.result.loss for trial in trials if trial.result is not None and self._is_healthy(trial)
        ]
        if self.bottomless or self.baseline is None or not losses:
            return -math.inf
        before = min(self.baseline.loss, self.baseline.start)
        # Where even the first loss is infinite, any finite one is a cure.
        return before - _CURING * (before - min(losses)) if math.isfinite(before) else math.inf

    def _is_healthy(self, trial: Trial) -> bool:
        return not self.is_worse(trial) and unhealthy_decades(trial.result) < _TOLERANCE

    def _rank(
        self, trial: Trial, goal: float = -math.inf
    ) -> tuple[bool, float, bool, tuple[Part, ...], float]:
        """Return the sort key: improved, healthy, cures by size, others by loss.

        Args:
            trial: The trial.
            goal: Largest loss of a cure; by default nothing is a cure.
        """
        loss = math.inf if trial.result is None or self.bottomless else trial.result.loss
        cures = loss <= goal and self._is_healthy(trial)
        unhealthy = round(unhealthy_decades(trial.result), 1)
        return self.is_worse(trial), unhealthy, not cures, _size(trial) if cures else (), loss

    def _try(self, fix: Remedy, passes: int) -> Trial:
        try:
            return Trial(fix, self._run(fix.change or Change(), passes))
        except Exception as error:
            return Trial(fix, None, _reason(error))

    def _run(self, change: Change, passes: int) -> TrialResult:
        self.passes += passes  # also of a trial that fails
        result = run_trial(
            self.step,
            change,
            layers=self.layers,
            passes=passes,
            structure=None if self.baseline is None else self.baseline.structure,
            start_norms=self.start_norms,
            halve=self.halve,
        )
        self.passes += result.passes - passes
        return result


def _size(trial: Trial) -> tuple[Part, ...]:
    return (trial.fix.change or Change()).size


def _has_tilt(result: TrialResult | None) -> bool:
    return result is not None and (result.tilt is not None or result.time_tilt is not None)


def unhealthy_decades(result: TrialResult | None) -> float:
    """Return decades outside the healthy range of tilts.

    Infinite if no layer gets a gradient, or the trial failed.
    """
    if result is None or not result.live:
        return math.inf
    beyond = [0.0]
    for tilt, (low, high) in ((result.tilt, HEALTHY_DEPTH_TILT), (result.time_tilt, HEALTHY_TIME_TILT)):
        if tilt is not None:
            beyond += [tilt - high, low - tilt] if math.isfinite(tilt) else [math.inf]
    return max(beyond)


def _norms_to_rewind_to(context: DiagnosticContext) -> dict[str, float] | None:
    """Return initial weight norms, if weights ran away."""
    ruined = not all(math.isfinite(norm) for norm in context.weight_norms)
    if context.initial_weight_norms is None or not (
        context.growth[0] > _RUNAWAY or context.decayed or ruined
    ):
        return None
    return dict(zip(context.names, context.initial_weight_norms, strict=True))


def _with_result(trial: Trial, baseline: TrialResult) -> Remedy:
    """Return the fix with measurements or a note."""
    result = trial.result
    if result is None:
        return dataclasses.replace(trial.fix, note=f"could not be tried: {trial.problem}")
    in_time = baseline.time_tilt is not None and baseline.tilt is None
    return dataclasses.replace(
        trial.fix,
        tried=True,
        before=baseline.time_tilt if in_time else baseline.tilt,
        after=result.time_tilt if in_time else result.tilt,
        loss=None if math.isnan(result.loss) else result.loss,
        profile=result.profile,
    )


def _account(runner: TrialRunner, baseline: TrialResult, tried: int, *, nothing_helped: bool) -> list[str]:
    """Describe the trials in a few sentences."""
    in_time = baseline.time_tilt is not None and baseline.tilt is None
    if in_time:
        way, (low, high) = "from the last to the first step of the sequence", HEALTHY_TIME_TILT
    else:
        way, (low, high) = "from output to input", HEALTHY_DEPTH_TILT
    loss = number(baseline.loss) if math.isfinite(baseline.loss) else "inf"
    learned = "half of it" if runner.halve else "all of it"
    sentences = [
        f"{count(tried, 'fix was', 'fixes were')} tried on copies of the weights and the batch, in {runner.passes} "
        "passes; the training itself is unchanged.",
        f"Tilt: decades (factors of ten) by which gradients shrink {way}; {low:g} to {high:g} is healthy.",
        f"Loss: loss of the whole batch after {_FULL - 1} trial steps on {learned} (inf if it overflowed or a layer "
        f"died); {loss} without a fix.",
    ]
    if nothing_helped:
        sentences.insert(0, "None of the fixes that were tried did better than no fix in so few steps.")
    if runner.start_norms:
        sentences.append(
            "The weights were far from their size at the start, so they were scaled back to it for the trials."
        )
    return sentences


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")[:160]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
