"""Whether a pass shows the fault that a step was halted on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning_gradguard.diagnosis.wording import number
from lightning_gradguard.flight_recorder.replay_session import Pass
from lightning_gradguard.results import Quantity

#: Share of its limit from which on a value counts as the fault: verdicts rest on running means, around which single
#: steps scatter. DepthTilt's own hysteresis, 2.5 of 3 decades.
HOLDS = 5 / 6
#: Relative difference of two gradient norms that count as the same.
SAME_NORM = 0.1

#: How one pass shows each quantity that it can measure again.
_MEASURED: dict[str, tuple[str, Callable[[Pass], float | None]]] = {
    Quantity.DEPTH_TILT.value: ("depth tilt in decades", lambda seen: seen.tilt),
    Quantity.LAYER_GAP.value: ("decades below the middle layer", lambda seen: seen.gap),
    Quantity.TIME_TILT.value: ("decades lost over the sequence", lambda seen: seen.time_tilt),
    Quantity.DEAD_UNITS.value: ("share of units without any gradient", lambda seen: seen.dead),
}

#: Only for bundles written before quantities were recorded: the sentences that they hold instead.
_OLD_SENTENCES = {
    "depth tilt in decades from input to output": Quantity.DEPTH_TILT,
    "depth tilt in decades (negative: growing towards the input)": Quantity.DEPTH_TILT,
    "decades by which a layer lies below the middle one": Quantity.LAYER_GAP,
    "decades lost from the last to the first steps of the sequence": Quantity.TIME_TILT,
    "share of a layer's units without any gradient": Quantity.DEAD_UNITS,
}


class Symptom:
    """The fault that a step was halted on, or the error that it ended with, as a single pass can show it.

    - Not finite: the loss, a gradient, or the norm of all gradients of the optimizer.
    - A tilt over depth or time, one layer far below the others, or dead units: measured again, and at least 5/6 of the
      limit, for the verdict rests on the mean of many steps.
    - Without a path: the tensors named get no gradient.
    - A spike: the norm over its usual value is above the limit.
    - All other faults are statements about many steps, of which one is played again: what has to come again is that
      step's gradient norm, within a tenth.
    - An error: one of the same class.

    Args:
        bundle: Of the process that was halted.

    Attributes:
        splits: Whether parts of the batch can be asked for it.
    """

    def __init__(self, bundle: dict[str, Any]) -> None:
        self._target: dict[str, Any] = bundle["target"] or {}
        self._error: str = bundle["message"].partition(":")[0]
        self._fault: str = self._target.get("fault", "")
        self._recorded: float = (bundle["report"] or {}).get("total_norm", math.nan)
        quantity = self._target.get("quantity") or _OLD_SENTENCES.get(self._target.get("measure", ""))
        self._measure = _MEASURED.get(str(quantity))
        alone = self._fault in ("", "nonfinite", "disconnected")
        self.splits = alone or self._is_direct or self._measure is not None

    @property
    def name(self) -> str:
        """The fault's value, or the error's class."""
        return self._fault.replace("_", " ") or self._error

    @property
    def is_nonfinite(self) -> bool:
        """Whether the fault is a number that is not finite."""
        return self._fault == "nonfinite"

    def shows(self, seen: Pass) -> bool:
        """Whether it is there."""
        if not self._fault:
            return seen.raised == self._error
        if self.is_nonfinite:
            return not seen.finite
        if not seen.finite:
            return False
        if self._fault == "disconnected":
            return not any(name in seen.norms for name in self._target["parameters"])
        value, limit = self._value(seen), float(self._target["limit"])
        if self._measure is not None or self._is_direct:
            return value is not None and (value <= HOLDS * limit if limit < 0 else value >= HOLDS * limit)
        return abs(seen.total - self._recorded) <= SAME_NORM * self._recorded

    def tell(self, seen: Pass) -> str:
        """What a pass shows of it, in words."""
        if not self._fault:
            return f"it ends with {seen.raised}" if seen.raised else "it ends without an error"
        if not seen.finite or self.is_nonfinite:
            return "loss and gradients are finite" if seen.finite else "loss or gradients are not finite"
        recorded = number(float(self._target["value"]))
        if self._measure is not None:
            value = self._value(seen)
            shown = "not measurable" if value is None else number(value)
            return f"{self._measure[0]}: {shown}, and {recorded} when it was halted"
        if self._fault == "disconnected":
            return f"{'no' if self.shows(seen) else 'a'} gradient arrives at what had none"
        return f"gradient norm {number(seen.total)}, and {number(self._recorded)} when it was recorded"

    @property
    def _is_direct(self) -> bool:
        return self._fault == "spike" and float(self._target["value"]) > 0

    def _value(self, seen: Pass) -> float | None:
        if self._is_direct:
            # The finding's value is the norm over the usual one.
            return seen.total / self._recorded * float(self._target["value"])
        return None if self._measure is None else self._measure[1](seen)
