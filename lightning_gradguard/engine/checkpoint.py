"""What of a guard is saved, and how it comes back: plain types and tensors, all or nothing."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from lightning_gradguard.engine import evaluate as pipeline
from lightning_gradguard.engine.fault_tracker import FaultTracker
from lightning_gradguard.engine.readback import DetectorResult, PendingStep, Readback
from lightning_gradguard.stats.grad_stats import stats_of

if TYPE_CHECKING:
    from lightning_gradguard.guard import Guard

#: Raised when a saved state can no longer be read.
VERSION = 5


def save(guard: Guard) -> dict[str, Any]:
    """The state of a guard, which loads under ``weights_only=True``."""
    guard.catch_up()
    return {
        "version": VERSION,
        "kinds": _kinds(guard),
        "steps": guard.steps,
        "counts": dict(guard.counts),
        "watch": guard.watch.state_dict(),
        "judge": guard.judge.state_dict(),
        "sights": [sight.to_plain() for sight in guard.sights],
        "quiet": guard.quiet.state_dict(),
        "states": None if guard._states is None else pipeline.to_plain(guard._states),
        # With lag: what was posted and not yet judged.
        "under_way": [
            {
                "numbers": numbers.clone(),
                "step": posted.step,
                "has_loss": posted.has_loss,
                "scaled": posted.scaled,
                "present": [gradient is not None for gradient in posted.outcome.stats.gradients],
                "asked": list(posted.asked),
            }
            for numbers, posted in guard._mailbox.waiting()
        ],
    }


def load(guard: Guard, state: dict[str, Any]) -> None:
    """Puts a saved state into a guard of the same configuration.

    Raises:
        ValueError: If it is of another version, other parameters, or other detectors or clipper; nothing is changed
            then.
    """
    if state.get("version") != VERSION:
        raise ValueError(
            f"state must be of version {VERSION}, got {state.get('version')!r}; start the guard afresh"
        )
    if state.get("kinds") != _kinds(guard):
        raise ValueError(
            f"state must be of the same detectors and clipper, {_kinds(guard)}, got {state.get('kinds')}; "
            "construct the guard as in the run that saved it"
        )
    before = copy.deepcopy(save(guard))
    try:
        _restore(guard, state)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        _restore(guard, before)
        if str(error).startswith("state must"):  # it says already what is wrong
            raise
        raise ValueError(
            f"state must be what Guard.state_dict gave, but {type(error).__name__}: {error}"
        ) from error


def go_back(guard: Guard, state: dict[str, Any] | None) -> None:
    """Judges on from a state of this guard, as if the steps since had not been; they stay counted.

    Args:
        guard: Whose state it was.
        state: What `save` gave; None for the beginning.
    """
    guard.catch_up()
    steps, counts = guard.steps, guard.counts
    if state is None:
        guard._states, guard.judge, guard.sights = None, FaultTracker(guard.policy, guard.judge.optimizer), []
        guard.quiet.stop()
        guard.watch.begin_anew()
    else:
        load(guard, state)
    guard.steps, guard.counts = steps, counts
    guard._mailbox = Readback(guard._lag)  # what is under way is of the way that is left


def _restore(guard: Guard, state: dict[str, Any]) -> None:
    guard.watch.load_state_dict(state["watch"])
    guard.judge.load_state_dict(state["judge"])
    guard.steps, guard.counts = state["steps"], dict(state["counts"])
    guard.sights = [DetectorResult.from_plain(sight) for sight in state["sights"]]
    guard.quiet.load_state_dict(state["quiet"], guard.watch.layout.numel.device)
    guard._states = None
    if state["states"] is not None:
        watch = guard.watch
        # Of the shapes alone: nothing is read, and where tensors are sharded no rank waits for another.
        nothing = watch.weights.new_zeros(len(watch.weights))
        gradients = (None,) * len(nothing)
        stats = stats_of(watch.layout, gradients, nothing, watch.weights, watch.updates, None)
        blank = pipeline.init(stats, guard.detectors, guard.clipper)
        guard._states = pipeline.from_plain(state["states"], blank)
    guard._mailbox = Readback(guard._lag)
    for letter in state.get("under_way", ()) if guard._lag else ():
        guard._mailbox.put_back(letter["numbers"], _posted_again(guard, letter))


def _posted_again(guard: Guard, letter: dict[str, Any]) -> PendingStep:
    """What the host has to know of a letter that was under way; the gradients themselves are gone."""
    layout = guard.watch.layout
    norms = letter["numbers"][: len(layout.names)]
    # A parameter stands for its gradient, of which only the type is asked.
    marks = tuple(
        p.detach() if there else None for p, there in zip(layout.parameters, letter["present"], strict=True)
    )
    stats = stats_of(
        layout, marks, norms.to(layout.numel.device), guard.watch.weights, guard.watch.updates, None
    )
    outcome = pipeline.Evaluation(stats.replace(has_loss=letter["has_loss"]), (), None)
    asked = tuple(letter["asked"])
    return PendingStep(letter["step"], letter["has_loss"], letter["scaled"], outcome, None, asked)


def _kinds(guard: Guard) -> list[str]:
    parts = [*guard.detectors, *([] if guard.clipper is None else [guard.clipper])]
    return [type(part).__name__ for part in parts]
