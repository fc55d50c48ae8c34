"""Check that a saved state has the form of a guard's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.engine.parameter_tracker import ParameterTracker, StateError

#: Detectors that version 5 did not have.
_NEW_DETECTORS = frozenset({"TargetScale"})
#: Parts that older versions did not save.
_OPTIONAL = ("under_way", "asked")


@dataclass(frozen=True)
class Each:
    """Form of a dict with any keys: that of each value."""

    form: Any


@dataclass(frozen=True)
class Maybe:
    """Form of a value that may be None."""

    form: Any


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
    _check(saved, _form_of_state(own), "the state")
    order, names = saved["watch"]["order"], saved["watch"]["names"]  # type: ignore[index]
    if sorted(order) != list(range(len(names))):
        raise _error("the state['watch']['order']", order, "each index of the parameters once")
    for column in saved["watch"]["columns"]:  # type: ignore[index]
        if not set(column) <= set(order):
            raise _error("the state['watch']['columns']", column, "indices of parameters")


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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise StateError(f"state of version 5 cannot be read: {problem}; start the guard afresh") from error


def _form_of_state(own: Mapping[str, Any]) -> dict[str, Any]:
    form = {**_form_like(own), "kinds": [str], "states": Maybe([Each(Tensor)])}
    form["watch"] |= {"names": [str], "order": [int], "embeddings": [str], "asked": [str], "columns": [[int]]}
    form["watch"] |= {"rates": [float], "reached": [str]}
    form["judge"] |= {"episodes": Each((int, int, int)), "said": Each(int)}
    form["sights"] = [(str, str, bool, bool, bool, bool, int, float, float, str, [str])]
    form["quiet"] |= {"_pattern": [bool], "_names": [str], "_live": [bool], "_bounds": Maybe(Each(Tensor))}
    step = {"numbers": Tensor, "step": int, "has_loss": bool, "scaled": bool}
    form["under_way"] = [{**step, "present": [bool], "asked": [bool]}]
    return form


def _form_like(example: Any) -> Any:
    """Return the form of an example; that of its lists is any."""
    if isinstance(example, Mapping):
        return {key: _form_like(value) for key, value in example.items()}
    if isinstance(example, Tensor):
        return example
    return object if isinstance(example, (list, tuple, type(None))) else type(example)


def _check(value: Any, form: Any, where: str) -> None:
    if isinstance(form, Maybe):
        if value is not None:
            _check(value, form.form, where)
    elif isinstance(form, (dict, Each)):
        if not isinstance(value, Mapping):
            raise _error(where, value, "a dict")
        parts = dict.fromkeys(value, form.form) if isinstance(form, Each) else form
        for key, part in parts.items():
            if key not in value and key in _OPTIONAL:
                continue
            if key not in value:
                raise _error(f"{where}[{key!r}]", "nothing", "there")
            _check(value[key], part, f"{where}[{key!r}]")
    elif isinstance(form, (list, tuple)):
        if not isinstance(value, (list, tuple)) or (isinstance(form, tuple) and len(value) != len(form)):
            raise _error(where, value, "a list" + (f" of {len(form)}" if isinstance(form, tuple) else ""))
        for i, entry in enumerate(value):
            _check(entry, form[i] if isinstance(form, tuple) else form[0], f"{where}[{i}]")
    elif isinstance(form, Tensor):
        fits = isinstance(value, Tensor) and (value.shape, value.dtype) == (form.shape, form.dtype)
        if not fits or value.layout != torch.strided:
            raise _error(where, value, f"a tensor of {tuple(form.shape)}, {form.dtype}")
    elif form in (int, float):
        kinds = (int, float) if form is float else (int,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise _error(where, value, "a number" if form is float else "a whole number")
    elif not isinstance(value, form):
        raise _error(where, value, f"of type {form.__name__}")


def _error(where: str, value: object, wanted: str) -> StateError:
    return StateError(
        f"state must be what Guard.state_dict gave: {where} must be {wanted}, got {short(value)}; "
        "start the guard afresh"
    )


def short(value: object) -> str:
    """Return a value in one short line.

    >>> short(list(range(30)))
    '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11...'
    """
    if isinstance(value, Tensor):
        return f"a tensor of {tuple(value.shape)}, {value.dtype}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
