"""Which tensors are shown where there are too many: the worst, without flicker."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

#: Decades by which a tensor must be worse than the mildest shown one to take its place.
MARGIN = 1.0


class WorstTensors:
    """Chooses the tensors whose gradient RMS lies farthest from that of the median tensor.

    A histogram is read over time, so a tensor once shown stays: it gives way only to one that is a decade
    farther from the median than the mildest shown one is.

    Args:
        max_tensors: Most that are shown at a time, at least 1.

    Raises:
        ValueError: If ``max_tensors`` is below 1.
    """

    def __init__(self, max_tensors: int = 24) -> None:
        if max_tensors < 1:
            raise ValueError(f"max_tensors must be at least 1, got {max_tensors}")
        self._max_tensors = max_tensors
        self._shown: list[str] = []

    def choose(self, rms: Mapping[str, float]) -> list[str]:
        """The tensors to show now, in the order of the mapping.

        Args:
            rms: Gradient RMS of each tensor that has a gradient; what is not finite is worst.
        """
        distance = _distances(rms)
        self._shown = [name for name in self._shown if name in distance]
        waiting = sorted(distance.keys() - set(self._shown), key=lambda n: (-distance[n], n))
        vacant = self._max_tensors - len(self._shown)
        self._shown += waiting[:vacant]
        for name in waiting[vacant:]:
            mildest = min(self._shown, key=lambda n: distance[n])
            if distance[mildest] == math.inf or distance[name] < distance[mildest] + MARGIN:
                break
            self._shown[self._shown.index(mildest)] = name
        return [name for name in rms if name in self._shown]

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"shown": list(self._shown)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on showing what was shown, up to ``max_tensors``."""
        self._shown = list(state["shown"])[: self._max_tensors]


def _distances(rms: Mapping[str, float]) -> dict[str, float]:
    """Decades from the median tensor; infinite for what is not finite."""
    decades = {name: math.log10(max(x, 1e-38)) for name, x in rms.items() if math.isfinite(x)}
    median = statistics.median(decades.values()) if decades else 0.0
    return {name: abs(decades[name] - median) if name in decades else math.inf for name in rms}
