"""FastPath steps: nothing is due and nothing stands out, so that a step is remembered, and learnt from with others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.clippers.base import WINDOW, Bounds, Clipper
from lightning_gradguard.detectors.base import Detector
from lightning_gradguard.engine import evaluate as pipeline
from lightning_gradguard.engine import readback as mailbox
from lightning_gradguard.engine.fault_tracker import FaultTracker
from lightning_gradguard.engine.readback import StepRecord
from lightning_gradguard.results import Report
from lightning_gradguard.stats.grad_stats import LARGEST_NORM, GradStats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_gradguard.guard import Guard

#: A quiet step's global norm over the usual one: at least, and at most.
_LOW, _HIGH = 0.5, 2.0
#: Rise of the loss above its start, as a part of it, from which each step is judged.
_RISE = 0.4

#: Numbers behind the norms in what the host reads of a step that may be quiet.
_TAIL = 4

_SAVED = ("passed", "_usual", "_ceiling", "_is_open", "_pattern", "_names", "_live")


class DeferredStep:
    """A step that was passed over, of which some things are worked out when they are asked for.

    Args:
        stats: Of the step, without its gradients; forgotten when what is usual has learnt from it.
        norms: float32 [P], for the host.
        guard: Which has to learn from it; let go of then.

    Attributes:
        array: float32 [P], norms of gradients, NaN where there is none.
        limit: float32 [], the clipper's threshold, when what is usual has learnt from it, until it is read.
        value: The same for the host.
    """

    def __init__(self, stats: GradStats, norms: NDArray[Any], guard: Guard) -> None:
        self.guard: Guard | None = guard
        self.stats: GradStats | None = stats
        self.limit: Tensor | None = None
        self.value: float | None = None
        # Names alone: a report that is kept would keep the parameters too.
        self._names, self._order, self._pattern = stats.layout.names, stats.layout.order, stats.pattern
        whole = stats.present is stats.layout.everywhere
        self.array = norms if whole else np.where(stats.pattern, norms, np.float32(np.nan))

    def threshold(self) -> float | None:
        """Largest global norm that the clipper would have allowed; None without one."""
        if self.guard is not None:
            self.guard.catch_up()
        return self.value

    def norms(self) -> dict[str, float]:
        """Norms by name, from input to output."""
        numbers = self.array.tolist()
        return {self._names[i]: numbers[i] for i in self._order if self._pattern[i]}


class FastPath:
    """Which steps may be passed over, and those that were since the last step that was judged.

    A step is quiet if it is no closer look, everything is finite, its global norm is between half and twice the usual
    one, no tensor is near where it would be clipped, the loss is not far above its start, the same tensors have
    gradients as before, and judging the newest readings again would change nothing. No detector is asked then, though
    it counts as judged, and up to seven are learnt from together: the same arithmetic, in a cache that is warm.

    Args:
        detectors: All of them; those that are not slow must be ``fast_path_safe``.
        clipper: None, or one that gives ``bounds``; with another one no step is quiet.
    """

    def __init__(self, detectors: Sequence[Detector], clipper: Clipper | None) -> None:
        self._fast = [not getattr(d, "slow", False) for d in detectors]
        quiet = [
            getattr(d, "slow", False)
            or (_speaks_for(d, "fast_path_safe") and getattr(d, "fast_path_safe", False))
            for d in detectors
        ]
        self.clipper: Any = clipper
        self._is_able = all(quiet) and (clipper is None or _speaks_for(clipper, "bounds"))
        self.waiting: list[tuple[DeferredStep, Report]] = []
        self.stop()

    def stop(self) -> None:
        """The next step has to be judged."""
        self.passed, self._usual, self._ceiling = 0, 0.0, 0.0
        self._is_open = False
        self._pattern: tuple[bool, ...] = ()
        self._names: tuple[str, ...] = ()
        self._live: tuple[bool, ...] = ()
        self._bounds: Bounds | None = None

    def start(self, letter: StepRecord, stats: GradStats, state: Any, judge: FaultTracker) -> None:
        """A step was judged and taken.

        Args:
            letter: Its numbers.
            stats: On the device.
            state: The clipper's state after it.
            judge: What has judged it.
        """
        self.stop()
        raised = any(sight.raised for sight, fast in zip(letter.sights, self._fast, strict=True) if fast)
        if not self._is_able or raised or not judge.is_still(letter.sights):
            return
        self._is_open, self._pattern = True, stats.pattern
        self._names = stats.layout.ordered_names
        self._usual = letter.usual_norm
        self._ceiling = letter.loss_start + _RISE * abs(letter.loss_start)
        if self.clipper is not None:
            self._bounds = self.clipper.bounds(stats, state)
        else:
            self._live = tuple(letter.norms.get(name, 0.0) > 0 for name in stats.layout.names)

    def pass_over(self, guard: Guard, stats: GradStats, step: int) -> Report | None:
        """The report of a step that is quiet; None of any other."""
        if stats.elapsed or not self._is_open or self.passed == WINDOW - 1:
            return None
        if stats.pattern != self._pattern or stats.layout.ordered_names != self._names:
            return None
        letter = self._glance(stats)
        numbers = mailbox.read_array(letter)
        norms, (total, loss, outside, joint) = numbers[:-_TAIL], numbers[-_TAIL:].tolist()
        # A NaN is in no relation to anything.
        if not (_LOW * self._usual <= total <= _HIGH * self._usual and outside == 0 and abs(joint) <= 1):
            return None
        if total >= LARGEST_NORM:  # which may be less than twice the usual
            return None
        if self._bounds is None and tuple((norms > 0).tolist()) != self._live:
            return None
        if stats.has_loss and not -math.inf < loss <= self._ceiling:
            return None
        self.passed += 1
        # On a CPU that is one copy of the norms, for both sides.
        row = DeferredStep(stats.replace(gradients=(), norms=letter[:-_TAIL]), norms, guard)
        report = Report.of_quiet_step(step, loss if stats.has_loss else None, total, row)
        self.waiting.append((row, report))
        return report

    def learn(self, guard: Guard) -> list[Tensor]:
        """Lets what is usual learn from the steps that wait; the clipper's thresholds in them, float32 [] each."""
        new = [(row, row.stats) for row, _ in self.waiting if row.stats is not None]
        if new:
            assert guard._states is not None
            rows = [stats for _, stats in new]
            limits, guard._states = pipeline.pass_over(rows, guard._states, guard.clipper)
            for (row, _), limit in zip(new, limits, strict=True):
                row.stats, row.limit = None, limit
        return [row.limit for row, _ in self.waiting if row.limit is not None]

    def let_go(self, guard: Guard, thresholds: Sequence[float]) -> None:
        """Completes the steps that waited, when their thresholds have been read."""
        for (row, report), threshold in zip(self.waiting, thresholds, strict=True):
            row.value = None if guard.clipper is None else threshold
            row.guard = row.limit = None
            guard._history.add(report, row.array)
        self.waiting = []

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors; steps that wait must have been learnt from."""
        state = {name: getattr(self, name) for name in _SAVED}
        bounds = None if self._bounds is None else {k: v.clone() for k, v in self._bounds._asdict().items()}
        return {**state, "_bounds": bounds, "clipper": repr(self.clipper)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restores what `state_dict` gave."""
        self.waiting = []
        for name in _SAVED:
            setattr(self, name, state[name])
        # The parts may be of the same class, and other options.
        self._is_open &= self._is_able and state["clipper"] == repr(self.clipper)
        bounds = state["_bounds"]
        self._bounds = None if bounds is None else Bounds(**{k: v.to(device) for k, v in bounds.items()})

    def _glance(self, stats: GradStats) -> Tensor:
        """What the host has to know of a step that may be quiet, float32 [P + 4]."""
        calm = [stats.layout.constant(0.0)] * 2 if self._bounds is None else self._bounds.compare(stats)
        return torch.cat([stats.norms, torch.stack([stats.total, stats.loss, *calm])])


def _speaks_for(part: object, word: str) -> bool:
    """Whether the class whose ``update`` is in force says ``word`` of it; a subclass with another one says it anew."""
    for kind in type(part).__mro__:
        if word in vars(kind) or "update" in vars(kind):
            return word in vars(kind)
    return False
