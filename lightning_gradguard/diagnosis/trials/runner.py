"""Tries the remedies that fit a diagnosis, and ranks them by what they did."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

from lightning_gradguard.diagnosis.context import DiagnosticContext
from lightning_gradguard.diagnosis.diagnosis import Cause, Diagnosis, Remedy
from lightning_gradguard.diagnosis.trials.attempt import SandboxedStep, TrialResult, attempt
from lightning_gradguard.diagnosis.trials.candidates import find_candidates, is_bottomless, pair
from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.diagnosis.trials.profile import HEALTHY
from lightning_gradguard.diagnosis.wording import count, number
from lightning_gradguard.results import Fault

#: Forward passes of all attempts together, each with a backward pass.
MOST_PASSES = 30
#: Passes of an attempt with virtual steps: three steps, and a last look.
_FULL = 4
#: Tilts over depth and over time that count as healthy, in decades: within the limits of `Exploding` and `DepthTilt`.
_DEPTH, _TIME = HEALTHY, (-3.0, 6.0)
#: Decades beyond what is healthy that count as nothing.
_HEALTHY = 0.05
#: Parts of the loss: by which a remedy must better it to have done anything, and may worsen it if it mends the tilt.
_BETTER, _HARMLESS = 0.01, 0.1
#: Growth of a layer's weights from which they are no ground to try anything on.
_RUNAWAY = 3.0
#: Remedies that are shown of those that were tried, and of the others.
_SHOWN, _OTHERS = 6, 3
_FAULTS = frozenset({Fault.VANISHING, Fault.VANISHING_IN_TIME, Fault.EXPLODING, Fault.DEAD})
_CAUSES = frozenset(
    {
        *(Cause.SATURATING_ACTIVATION, Cause.BAD_INITIALIZATION, Cause.TOO_DEEP, Cause.RECURRENCE),
        *(Cause.DEAD_ACTIVATION, Cause.UNNORMALIZED_INPUT, Cause.TARGET_SCALE, Cause.LEARNING_RATE_TOO_HIGH),
        Cause.MOMENTUM,
    }
)
#: Causes that no change of the kind that is tried concerns, whatever the fault.
_UNTRIED = frozenset({Cause.DETACHED_GRAPH, Cause.LOW_PRECISION, Cause.BAD_DATA})


class Trial(NamedTuple):
    """A remedy that was tried, and what came of it; without an outcome if it could not be."""

    remedy: Remedy
    outcome: TrialResult | None
    problem: str = ""


def try_remedies(
    diagnosis: Diagnosis, case: DiagnosticContext, sandboxed_step_of: Callable[[], SandboxedStep]
) -> Diagnosis:
    """The diagnosis with the remedies that were tried, best first, before those that were not.

    Faults of the gradient's scale are tried, and others with a cause of that kind. In at most `MOST_PASSES` forward
    passes every remedy that fits gets one with a backward pass, which tells its tilt; those with a healthy tilt then
    take virtual steps on half of the batch, and are ranked by the loss on all of it.

    Args:
        diagnosis: With remedies by the evidence.
        case: What it rests on.
        sandboxed_step_of: Gives what to try them on; raises ValueError with the reason if that cannot be.
    """
    cause = diagnosis.causes[0]
    if cause in _UNTRIED or not (diagnosis.fault in _FAULTS or cause in _CAUSES or case.decayed):
        said = "No remedy was tried: none that can be tried concerns the likeliest cause."
        return dataclasses.replace(diagnosis, trials=(said,))
    try:
        subject = _rewound(sandboxed_step_of(), case)
        # A compiled module's own names say that it is one, and the case's do not.
        own = {name.replace("_orig_mod.", ""): name for name, _ in subject.module.named_parameters()}
        layers = tuple(own.get(case.names[i], case.names[i]) for i in case.layers)
        session, base = _begin(subject, layers, bottomless=is_bottomless(case, diagnosis.causes))
    except Exception as error:
        return dataclasses.replace(diagnosis, trials=(f"No remedy was tried: {_reason(error)}.",))
    candidates = find_candidates(
        case, diagnosis.causes, subject.module, subject.batch, base.plan, base.profile
    )
    trials = session.run(candidates)
    tried = [_remedy(trial, base) for trial in trials]
    shown = [r for r in tried if r.tried][:_SHOWN]
    failed = [r for r in tried if not r.tried]
    keys = {r.key for r in tried}
    others = [r for r in diagnosis.remedies if r.key not in keys][: max(1, _OTHERS - len(failed))]
    # What the evidence asks for first is shown, whatever came of it.
    first = diagnosis.remedies[0].key if diagnosis.remedies else ""
    shown += [r for r in tried[_SHOWN:] if r.tried and r.key == first]
    nothing_helped = bool(trials) and not case.decayed and all(session.is_worse(trial) for trial in trials)
    best = (*others, *shown) if nothing_helped else (*shown, *others)
    return dataclasses.replace(
        diagnosis,
        remedies=(*best, *failed[:_OTHERS]),
        trials=tuple(_account(session, base, len(tried) - len(failed), bool(subject.norms), nothing_helped)),
        layers=tuple(case.names[i] for i in case.layers),
        profile=base.profile,
    )


class Session:
    """Attempts on one subject within a budget of passes.

    Args:
        subject: What is tried on.
        layers: Names of the layers' weights, input first.
        bottomless: Whether the loss has no lower bound, so that a lower one is no better.
    """

    def __init__(self, subject: SandboxedStep, layers: tuple[str, ...], *, bottomless: bool = False) -> None:
        self.subject, self.layers, self.bottomless = subject, layers, bottomless
        self.passes = 0
        self._base: TrialResult | None = None

    def attempt(self, change: Change, passes: int) -> TrialResult:
        """One attempt; the first is the one without a change."""
        plan = None if self._base is None else self._base.plan
        self.passes += passes
        outcome = attempt(self.subject, change, layers=self.layers, passes=passes, plan=plan)
        self.passes += outcome.passes - passes
        self._base = self._base or outcome
        return outcome

    def run(self, candidates: list[Remedy]) -> list[Trial]:
        """A look at each, then virtual steps with the most promising, and with the best two together."""
        looks = [self._try(c, 1) for c in candidates[: MOST_PASSES - self.passes - 2 * _FULL]]
        failed = [trial for trial in looks if trial.outcome is None]
        looks = [trial for trial in looks if trial.outcome is not None]
        looks.sort(key=lambda t: round(unhealthy(t.outcome), 1))
        finals: list[Trial] = []
        while looks and MOST_PASSES - self.passes >= 2 * _FULL:
            finals.append(self._try(looks.pop(0).remedy, _FULL))
        rank = self._rank
        finals.sort(key=rank)
        pairs = (pair(a.remedy, b.remedy) for a, b in combinations(finals, 2))
        known = [c.change for c in candidates]
        best = next((both for both in pairs if both is not None and both.change not in known), None)
        last = best or (looks.pop(0).remedy if looks else None)
        if last is not None and MOST_PASSES - self.passes >= _FULL:
            finals.append(self._try(last, _FULL))
        finals.sort(key=rank)
        # What does no better than nothing is no advice before what has not been seen to fail.
        worse = [t for t in finals if self.is_worse(t)]
        healthy = [t for t in looks if unhealthy(t.outcome) < _HEALTHY]
        others = [t for t in looks if t not in healthy]
        return [*finals[: len(finals) - len(worse)], *healthy, *worse, *others, *failed]

    def is_worse(self, trial: Trial) -> bool:
        """Whether virtual steps were taken, and came to no lower loss than without a remedy; or nothing came of it.

        Where the tilt is mended, a loss that is hardly higher will do: weights that are drawn again begin at another,
        and few steps do not show what a long sequence teaches.
        """
        if trial.outcome is None or trial.outcome.loss == math.inf:
            return True
        # Where even no remedy leads to ruin, there is still the loss that it began with.
        base = math.inf if self._base is None else min(self._base.loss, self._base.start)
        mended = unhealthy(trial.outcome) <= unhealthy(self._base) - 1
        margin = (_HARMLESS if mended else -_BETTER) * abs(base) if math.isfinite(base) else 0.0
        return trial.outcome.loss >= base + margin and not self.bottomless

    def _rank(self, trial: Trial) -> tuple[bool, float, float]:
        """Those that do better than nothing; of them the healthiest first, and of those the lowest loss."""
        loss = math.inf if trial.outcome is None or self.bottomless else trial.outcome.loss
        return self.is_worse(trial), round(unhealthy(trial.outcome), 1), loss

    def _try(self, remedy: Remedy, passes: int) -> Trial:
        try:
            return Trial(remedy, self.attempt(remedy.change or Change(), passes))
        except Exception as error:
            return Trial(remedy, None, _reason(error))


def _begin(
    subject: SandboxedStep, layers: tuple[str, ...], *, bottomless: bool
) -> tuple[Session, TrialResult]:
    """The attempt without a change, on half of the batch, or all where a half is none: a graph with its adjacency."""
    try:
        session = Session(subject, layers, bottomless=bottomless)
        return session, session.attempt(Change(), _FULL)
    except Exception:
        taken = session.passes
        session = Session(dataclasses.replace(subject, divisible=False), layers, bottomless=bottomless)
        session.passes = taken
        return session, session.attempt(Change(), _FULL)


def unhealthy(outcome: TrialResult | None) -> float:
    """Decades by which a tilt lies outside of what is healthy; infinite where no layer gets a gradient."""
    if outcome is None or not outcome.live:
        return math.inf
    beyond = [0.0]
    for tilt, (low, high) in ((outcome.tilt, _DEPTH), (outcome.time_tilt, _TIME)):
        if tilt is not None:
            beyond += [tilt - high, low - tilt] if math.isfinite(tilt) else [math.inf]
    return max(beyond)


def _rewound(subject: SandboxedStep, case: DiagnosticContext) -> SandboxedStep:
    """With weights that have run away, or shrunk, brought back to their size at the start, if that is known."""
    ruined = not all(math.isfinite(norm) for norm in case.weight_norms)
    if case.initial_weight_norms is None or not (case.growth[0] > _RUNAWAY or case.decayed or ruined):
        return subject
    return dataclasses.replace(subject, norms=dict(zip(case.names, case.initial_weight_norms, strict=True)))


def _remedy(trial: Trial, base: TrialResult) -> Remedy:
    remedy, outcome = trial.remedy, trial.outcome
    if outcome is None:
        return dataclasses.replace(remedy, note=f"could not be tried: {trial.problem}")
    in_time = base.time_tilt is not None and base.tilt is None
    before, after = (o.time_tilt if in_time else o.tilt for o in (base, outcome))
    loss = None if math.isnan(outcome.loss) else outcome.loss
    return dataclasses.replace(
        remedy,
        tried=True,
        before=before,
        after=after,
        loss=loss,
        profile=outcome.profile,
    )


def _account(
    session: Session, base: TrialResult, tried: int, rewound: bool, nothing_helped: bool
) -> list[str]:
    loss = f"it is {number(base.loss)}" if math.isfinite(base.loss) else "it is inf"
    in_time = base.time_tilt is not None and base.tilt is None
    way, (low, high) = ("the first to the last step", _TIME) if in_time else ("input to output", _DEPTH)
    learnt = "half of it" if session.subject.divisible else "it"
    said = [
        f"{count(tried, 'remedy was', 'remedies were')} tried on copies of these weights and this batch, in "
        f"{session.passes} passes; the training itself is as it was. Tilts are in decades from {way}, of "
        f"which {low:g} to {high:g} are healthy.",
        f"The loss is that of this batch after {_FULL - 1} steps with {learnt}, and blank where there were no passes "
        f"left for them; inf says that it overflowed, or that a layer died. Without a remedy {loss}.",
    ]
    if nothing_helped:
        said.insert(0, "None of the remedies that were tried did better than nothing in so few steps.")
    if rewound:
        said.append(
            "The weights had left their size at the start by far; they were brought back to it for this."
        )
    return said


def _reason(error: Exception) -> str:
    """One line that says what went wrong."""
    text = " ".join(str(error).split()).rstrip(".")[:160]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"
