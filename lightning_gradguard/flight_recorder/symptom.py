"""Recognize the recorded fault in a single pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_gradguard.diagnosis.wording import number
from lightning_gradguard.flight_recorder.replay_session import Pass
from lightning_gradguard.results import Quantity

#: Share of its limit from which a value counts as the fault. Detectors judge running means, and single steps scatter
#: around those; this is the hysteresis of DepthTilt, 2.5 of 3 decades.
_SHARE_OF_LIMIT = 5 / 6
#: Relative difference up to which two gradient norms count as the same.
_NORM_TOLERANCE = 0.1


class _Measured(NamedTuple):
    name: str
    meaning: str
    of: Callable[[Pass], float | None]


_MEASURED = {
    Quantity.DEPTH_TILT.value: _Measured(
        "depth tilt",
        "decades, i.e. factors of ten, by which gradients shrink from output to input",
        lambda seen: seen.tilt,
    ),
    Quantity.LAYER_GAP.value: _Measured(
        "gap of the lowest layer",
        "decades, i.e. factors of ten, by which its gradient, relative to its weights, is below the median layer's",
        lambda seen: seen.gap,
    ),
    Quantity.TIME_TILT.value: _Measured(
        "time tilt",
        "decades, i.e. factors of ten, by which gradients shrink from the end of the sequence to its start",
        lambda seen: seen.time_tilt,
    ),
    Quantity.DEAD_UNITS.value: _Measured(
        "dead units", "largest share of a layer's units without any gradient", lambda seen: seen.dead
    ),
}

#: Compatibility only: the sentences that bundles held before they named the quantity.
_OLD_SENTENCES = {
    "depth tilt in decades from input to output": Quantity.DEPTH_TILT,
    "depth tilt in decades (negative: growing towards the input)": Quantity.DEPTH_TILT,
    "decades by which a layer lies below the middle one": Quantity.LAYER_GAP,
    "decades lost from the last to the first steps of the sequence": Quantity.TIME_TILT,
    "share of a layer's units without any gradient": Quantity.DEAD_UNITS,
}


class Symptom:
    """Recorded fault or error.

    A pass shows the fault if:

    - non-finite: the loss, a gradient, or the norm of all gradients of the optimizer is NaN or Inf;
    - a tilt over depth or time, one layer far below the others, or dead units: the value, measured again, is at least
      5/6 of the limit, since detectors judge the mean of many steps;
    - disconnected: the named tensors get no gradient;
    - a spike: the gradient norm over its usual value is above 5/6 of the limit;
    - any other fault, which is a statement about many steps: the gradient norm is within a tenth of the recorded one;
    - an error: the training step raises one of the same class.

    Args:
        bundle: Bundle of the process that was halted.

    Attributes:
        is_divisible: True if the fault can be looked for in part of the batch.
    """

    def __init__(self, bundle: dict[str, Any]) -> None:
        self._target: dict[str, Any] = bundle["target"] or {}
        self._error: str = bundle["message"].partition(":")[0]
        self._fault: str = self._target.get("fault", "")
        self._recorded_norm: float = (bundle["report"] or {}).get("total_norm", math.nan)
        quantity = self._target.get("quantity") or _OLD_SENTENCES.get(self._target.get("measure", ""))
        self._measured = _MEASURED.get(str(quantity))
        # The value of this finding is the gradient norm over its usual value.
        self._is_norm_ratio = self._fault == "spike" and float(self._target["value"]) > 0
        stands_alone = self._fault in ("", "nonfinite", "disconnected")
        self.is_divisible = stands_alone or self._is_norm_ratio or self._measured is not None

    @property
    def name(self) -> str:
        """Name of the fault, or the error's class."""
        return self._fault.replace("_", " ") or self._error

    @property
    def is_nonfinite(self) -> bool:
        """True for a non-finite number."""
        return self._fault == "nonfinite"

    def is_shown_by(self, seen: Pass) -> bool:
        """Return True if a pass shows the fault."""
        if not self._fault:
            return seen.raised == self._error
        if self.is_nonfinite:
            return not seen.finite
        if not seen.finite:
            return False
        if self._fault == "disconnected":
            return not any(name in seen.norms for name in self._target["parameters"])
        if self._measured is None and not self._is_norm_ratio:
            return abs(seen.total - self._recorded_norm) <= _NORM_TOLERANCE * self._recorded_norm
        value, limit = self._value(seen), _SHARE_OF_LIMIT * float(self._target["limit"])
        return value is not None and (value <= limit if limit < 0 else value >= limit)

    def describe(self, seen: Pass) -> str:
        """Describe a pass beside the recorded step."""
        if not self._fault:
            return f"The training step raises {seen.raised or 'no error'}."
        if self.is_nonfinite or not seen.finite:
            return (
                "Loss and gradients are finite." if seen.finite else "The loss or a gradient is NaN or Inf."
            )
        if self._measured is not None:
            value, name = self._value(seen), self._measured.name
            now = "not measurable" if value is None else number(value)
            then = number(float(self._target["value"]))
            return f"{name.capitalize()} {now}, recorded {then} ({self._measured.meaning})."
        if self._fault == "disconnected":
            if self.is_shown_by(seen):
                return "Again no gradient reaches the tensors that had none."
            return "A gradient reaches tensors that had none."
        return f"Gradient norm {number(seen.total)}, recorded {number(self._recorded_norm)}."

    def _value(self, seen: Pass) -> float | None:
        if self._is_norm_ratio:
            return seen.total / self._recorded_norm * float(self._target["value"])
        return None if self._measured is None else self._measured.of(seen)
