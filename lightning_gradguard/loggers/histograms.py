"""Gradient histograms: which tensors are shown, and under which tags."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_gradguard.loggers.base import LogRecord
from lightning_gradguard.stats.histogram import SPREAD, edges

#: Decades (factors of ten) by which a tensor must be worse than the mildest shown one to replace it.
MARGIN = 1.0

_LOG10_NOTE = (
    "**log10 of the gradient's magnitude**, all elements of `{name}`. One unit is a decade, a factor of ten. A drift "
    "to the left, over time or from late layers to early ones, is vanishing. A drift to the right is exploding. A "
    "peak in the leftmost bin is exact zeros: dead units or underflow. NaN and infinity are not counted."
)
_VALUE_NOTE = (
    f"**Values of the gradient**, all elements of `{{name}}`. The axis is as wide as the largest magnitude, but "
    f"no wider than {SPREAD:.0f} root mean squares to each side. Values beyond it are counted in the outer bins. NaN "
    "and infinity are not counted."
)


def histogram_record(
    counts: Mapping[str, Sequence[float]],
    titles: Mapping[str, str],
    *,
    limits: Mapping[str, float] | None = None,
    group: str = "gradguard",
) -> LogRecord:
    """Return a record of gradient histograms.

    Args:
        counts: 30 counts for each parameter that is shown.
        titles: Parameter name to its `lightning_gradguard.loggers.tags.tag_names`.
        limits: For histograms of values, half the width of each axis; those of log10 have one axis.
        group: Beginning of the tag group, for a second optimizer "gradguard_1". Otherwise its titles would
            meet those of the first.
    """
    kind, note = ("log10", _LOG10_NOTE) if limits is None else ("value", _VALUE_NOTE)
    tags = {name: f"{group}_hist_{kind}/{titles[name]}" for name in counts}
    return LogRecord(
        histograms={tags[name]: column for name, column in counts.items()},
        notes={tag: note.format(name=name) for name, tag in tags.items()},
        edges={} if limits is None else {tags[name]: edges(limits[name]) for name in counts},
    )


class WorstTensors:
    """Choice of the tensors whose gradient RMS is farthest from that of the median tensor.

    A histogram is read over time, so a tensor that is shown stays. It is replaced only by one that is a decade
    (a factor of ten) farther from the median than the mildest shown one.

    Args:
        max_tensors: Largest number shown at a time, at least 1.

    Raises:
        ValueError: If ``max_tensors`` is below 1.
    """

    def __init__(self, max_tensors: int = 24) -> None:
        if max_tensors < 1:
            raise ValueError(f"max_tensors must be at least 1, got {max_tensors}")
        self._max_tensors = max_tensors
        self._shown: list[str] = []

    def choose(self, rms: Mapping[str, float]) -> list[str]:
        """Return the tensors to show now, in the order of the mapping.

        Args:
            rms: Gradient RMS of each tensor that has a gradient; one that is not finite is worst.
        """
        # Decades from the median tensor; infinite where the RMS is not finite.
        decades = {name: math.log10(max(x, 1e-38)) for name, x in rms.items() if math.isfinite(x)}
        median = statistics.median(decades.values()) if decades else 0.0
        distance = {name: abs(decades[name] - median) if name in decades else math.inf for name in rms}
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
        """Return plain types."""
        return {"shown": list(self._shown)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the tensors of `state_dict`, up to ``max_tensors``."""
        self._shown = list(state["shown"])[: self._max_tensors]
