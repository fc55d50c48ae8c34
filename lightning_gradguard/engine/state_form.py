"""Check that a saved state has the form of a guard's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_gradguard.engine.clip_response import CLIP_FORM
from lightning_gradguard.engine.parameter_tracker import ParameterTracker, StateError
from lightning_gradguard.forms import Each, FormError, Maybe, OrMissing, check_form, form_like, short

#: Detectors that version 5 did not have.
_NEW_DETECTORS = frozenset({"TargetScale"})


def check_names(saved: Mapping[str, Any], tracker: ParameterTracker) -> None:
    """Check that a saved state is of the same tensors.

    Args:
        saved: The state; one of another form is left to `check_state`.
        tracker: Tracker of the guard that is to be restored.

    Raises:
        StateError: If it is of other tensors.
    """
    watch = saved.get("watch")
    names = watch.get("names") if isinstance(watch, Mapping) else None
    if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
        tracker.check_names(names)


def check_state(saved: object, own: Mapping[str, Any]) -> None:
    """Check a saved state before anything is changed.

    Args:
        saved: Anything.
        own: State of the guard that is to be restored, which gives the form.

    Raises:
        StateError: If the form is another. The message names the first place that differs.
    """
    try:
        check_form(saved, _form_of_state(own), "the state")
    except FormError as error:
        raise _error(str(error)) from None
    order, names = saved["watch"]["order"], saved["watch"]["names"]  # type: ignore[index]
    if sorted(order) != list(range(len(names))):
        raise _error(
            f"the state['watch']['order'] must be each index of the parameters once, got {short(order)}"
        )
    for column in saved["watch"]["columns"]:  # type: ignore[index]
        if not set(column) <= set(order):
            raise _error(f"the state['watch']['columns'] must be indices of parameters, got {short(column)}")


def upgrade(saved: Mapping[str, Any], own: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Return a state of version 5 in the form of today.

    What that version did not save begins as in a new guard. A step that was under way is dropped.

    Args:
        saved: The state.
        own: State of the guard that is to be restored.
        kinds: Class names of its detectors and clipper.

    Raises:
        StateError: If the state is damaged, or of other detectors or another clipper.
    """
    try:
        watch, states = saved["watch"], saved["states"]
        if [kind for kind in kinds if kind in saved["kinds"]] != list(saved["kinds"]):
            raise ValueError(f"it is of {saved['kinds']}, the guard has {list(kinds)}")
        if set(kinds) - set(saved["kinds"]) - _NEW_DETECTORS:
            raise ValueError(f"it is of {saved['kinds']}, the guard has {list(kinds)}")
        if states is not None:
            parts = dict(zip(("", *saved["kinds"]), states, strict=True))
            states = [parts.get(kind, {}) for kind in ("", *kinds)]
        peak, steps = float(watch["peak_rate"]), int(watch["schedule"]["good"])
        return {
            **saved,
            "version": own["version"],
            "kinds": list(kinds),
            "watch": {
                **own["watch"],
                **watch,
                "rates": [peak, peak * steps, *own["watch"]["rates"][2:]],
                "schedule": {**watch["schedule"], "was_good": False},
            },
            "quiet": {**own["quiet"], **saved["quiet"], "_is_open": False},
            # Without results the next step is evaluated in full, since the last one counts as not taken.
            "sights": [],
            "states": states,
            "under_way": [],
        }
    except Exception as error:  # whatever is wrong with it
        problem = f"{type(error).__name__}: {error}"
        raise StateError(f"state of version 5 cannot be read: {problem}; start the guard afresh") from error


def _form_of_state(own: Mapping[str, Any]) -> dict[str, Any]:
    form: dict[str, Any] = {**form_like(own), "kinds": [str], "states": Maybe([Each(Tensor)])}
    form["watch"] |= {"names": [str], "order": [int], "embeddings": [str], "columns": [[int]]}
    # Older versions did not save what may be missing.
    form["watch"] |= {"asked": OrMissing([str]), "rates": [float], "reached": [str]}
    schedule = form["watch"]["schedule"]
    for key in ("stuck", "interval", "alike", "last_sample", "last_asked", "next_sample", "silent"):
        schedule[key] = OrMissing(schedule[key])
    schedule |= {"was_outside": OrMissing(bool), "rate": OrMissing(float), "highest": OrMissing(float)}
    schedule |= {"shown": OrMissing([float]), "flags": OrMissing([bool])}
    form["judge"] |= {
        "episodes": Each((int, int, int)),
        "said": Each(int),
        "clip_response": OrMissing(CLIP_FORM),
    }
    form["sights"] = [(str, str, bool, bool, bool, bool, int, float, float, str, [str])]
    form["quiet"] |= {"window": OrMissing(int), "most": OrMissing(int)}
    form["quiet"] |= {"_pattern": [bool], "_names": [str], "_live": [bool], "_bounds": Maybe(Each(Tensor))}
    step = {"numbers": Tensor, "step": int, "has_loss": bool, "scaled": bool, "elapsed": OrMissing(int)}
    form["under_way"] = OrMissing([{**step, "present": [bool], "asked": [bool]}])
    return form


def _error(problem: str) -> StateError:
    return StateError(f"state must be what Guard.state_dict gave: {problem}; start the guard afresh")
