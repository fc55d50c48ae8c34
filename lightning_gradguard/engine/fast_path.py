"""Accept unremarkable steps with one short read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import (
    WINDOW,
    Bounds,
    Clip,
    is_memoryless,
    reads_norms_only,
    supports_fast_path,
)
from lightning_gradguard.engine import readback
from lightning_gradguard.engine.evaluate import GuardParts, GuardState, fold_in
from lightning_gradguard.engine.step_record import StepRecord
from lightning_gradguard.results import Report
from lightning_gradguard.stats.grad_stats import LARGEST_NORM, GradStats
from lightning_gradguard.stats.trends import expected_norm

#: Smallest and largest global norm of an accepted step, relative to the baseline.
_LOW, _HIGH = 0.5, 2.0
#: Rise of the loss above its start, as a part of it, from which no step is accepted.
_RISE = 0.4
#: Stands for "without end" in the saved state, which holds plain numbers.
_NO_END = 2**62

#: Key in the saved state, attribute.
_SAVED = {
    "passed": "accepted",
    "window": "_window",
    "most": "_most",
    "_usual": "_baseline",
    "_ceiling": "_ceiling",
    "_is_open": "_is_open",
    "_pattern": "_pattern",
    "_names": "_names",
    "_live": "_live",
}


class Accepted(NamedTuple):
    """An accepted step.

    Attributes:
        report: Its report.
        multipliers: What its gradients are to be scaled with, as in `Clip`; None if they are left alone.
        clipper_state: State of a clipper that was asked; None if it learns later.
        completed: Report and norms, float32 [P], of each step that is complete now, oldest first.
    """

    report: Report
    multipliers: Tensor | tuple[Tensor, ...] | None = None
    clipper_state: Any = None
    completed: Sequence[tuple[Report, array[float]]] = ()


class DeferredStep:
    """An accepted step with fields worked out on request.

    Args:
        stats: Statistics of the step, without its gradients.
        norms: float32 [P], gradient norms on the host.
        flush: Folds this step in and reads its threshold; dropped once that has happened.

    Attributes:
        stats: As given; None once the step is folded in.
        norms: float32 [P], gradient norms, NaN where there is no gradient.
        limit: The clipper's threshold on the device, float32 []; None before the step is folded in, and once read.
    """

    def __init__(self, stats: GradStats, norms: array[float], flush: Callable[[], None]) -> None:
        self.stats: GradStats | None = stats
        self.limit: Tensor | None = None
        self._flush: Callable[[], None] | None = flush
        self._threshold: float | None = None
        # Names alone: a report that is kept would keep the parameters too.
        self._names, self._order, self._pattern = stats.layout.names, stats.layout.order, stats.pattern
        everywhere = stats.present is stats.layout.everywhere
        if not everywhere:
            norms = array("f", [n if has else math.nan for n, has in zip(norms, self._pattern, strict=True)])
        self.norms = norms

    def finalize(self, threshold: float | None) -> None:
        """Set the threshold, which completes the step."""
        self._threshold, self._flush, self.limit = threshold, None, None

    def threshold(self) -> float | None:
        """Return the clipper's threshold; None without a clipper."""
        if self._flush is not None:
            self._flush()
        return self._threshold

    def norms_by_name(self) -> dict[str, float]:
        """Return norms by name, from input to output."""
        numbers = self.norms.tolist()
        return {self._names[i]: numbers[i] for i in self._order if self._pattern[i]}


class FastPath:
    """Accepts steps and holds them until they are folded in.

    A step is accepted if no full evaluation is due and all of this holds: everything is finite; the global norm is
    between half and twice the baseline; no tensor is near the limit at which it would be clipped; the loss is not far
    above its start; the same tensors have gradients as before; and deciding again on the newest results would change
    nothing. No detector is asked about such a step, though it counts as judged. Up to seven are folded into the running
    statistics together, with the same arithmetic, and new limits are taken from these.

    A clipper that gives bounds clips nothing within them, and learns later. One that reads norms only, or has no
    memory, is asked at once, since it may clip at any step.

    Args:
        parts: Detectors and clipper. A detector must be slow or safe on the fast path; a clipper must give bounds, read
            norms only or have no memory; else no step is accepted.
        clipping: False if the clipper is in force at no step that is accepted. They have no threshold then, and the
            clipper learns later.

    Attributes:
        accepted: Steps accepted since detectors were last asked.
        deferred: Accepted steps with their reports, not yet finalized, oldest first.
        asked: Clip and state of a clipper that was asked about the newest step, if that was not accepted; else None.
    """

    def __init__(self, parts: GuardParts, *, clipping: bool = True) -> None:
        self.clipper: Any = parts.clipper
        self._has_threshold = clipping and parts.clipper is not None
        self._asked_always = [not traits.slow for traits in parts.traits]
        is_safe = all(traits.slow or traits.fast_path_safe for traits in parts.traits)
        self._is_able, self._asks_clipper = is_safe, False
        if parts.clipper is not None:
            gives_bounds = supports_fast_path(parts.clipper)
            is_asked = reads_norms_only(parts.clipper) or is_memoryless(parts.clipper)
            self._is_able &= gives_bounds or is_asked
            self._asks_clipper = clipping and is_asked and not gives_bounds
        self.deferred: list[tuple[DeferredStep, Report]] = []
        self.close()

    def close(self, accepted: int = 0) -> None:
        """Accept no step until `open`.

        Args:
            accepted: Accepted steps that detectors have not heard of yet.
        """
        self.accepted, self._baseline, self._ceiling = accepted, 0.0, 0.0
        self._is_open, self._window, self._most = False, 0, 0
        self._renewed: Tensor | None = None
        self.asked: tuple[Clip, Any] | None = None
        self._pattern: tuple[bool, ...] = ()
        self._names: tuple[str, ...] = ()
        self._live: tuple[bool, ...] = ()
        self._bounds: Bounds | None = None

    def open(self, record: StepRecord, stats: GradStats, clipper_state: Any, most: float) -> None:
        """Open the fast path after an unremarkable step.

        Args:
            record: Numbers of that step.
            stats: Its statistics, on the device.
            clipper_state: State of the clipper after it.
            most: Steps at which deciding on its results again would change nothing; may be infinite.
        """
        self.close()
        raised = any(
            result.raised and asked for result, asked in zip(record.results, self._asked_always, strict=True)
        )
        if not self._is_able or raised or not most:
            return
        self._is_open, self._pattern, self._most = True, stats.pattern, int(min(most, _NO_END))
        self._names = stats.layout.ordered_names
        self._baseline = record.baseline_norm
        self._ceiling = record.loss_start + _RISE * abs(record.loss_start)
        self._set_bounds(stats, clipper_state)
        if self._bounds is None:
            self._live = tuple(record.norms.get(name, 0.0) > 0 for name in stats.layout.names)

    @property
    def is_window_over(self) -> bool:
        """True if the limits hold for no further step, so that `renew` has to be called."""
        return self._is_open and self._window == WINDOW - 1

    def renew(self, stats: GradStats, state: GuardState) -> None:
        """Take new limits.

        Args:
            stats: The coming step, whose norms do not matter.
            state: State before it, into which all deferred steps are folded.
        """
        live = (
            stats.layout.flags(self._live) if self._bounds is None else self._bounds.high > stats.layout.zeros
        )
        self._renewed, self._window = expected_norm(state.trends, live), 0
        # Of the norms only counts which are zero, and the same are as at the steps before.
        self._set_bounds(stats.replace(norms=state.trends.level.exp() * live), state.clipper)

    def accept(
        self, stats: GradStats, step: int, state: GuardState | None, flush: Callable[[], None]
    ) -> Accepted | None:
        """Accept a step, or return None if it is to be evaluated.

        Args:
            stats: The step.
            step: Its number.
            state: State of the guard, whose clipper is that of the step before; None only before the first step.
            flush: Folds in all deferred steps and finalizes them.
        """
        self.asked = None
        if stats.elapsed or not self._is_open or self.accepted >= self._most:
            return None
        if stats.pattern != self._pattern or stats.layout.ordered_names != self._names:
            return None
        clip, clipper_state = None, None
        if self._asks_clipper and state is not None:
            clip, clipper_state = self.asked = self.clipper.update(stats, state.clipper)
        # Deferred steps have a threshold if they have just been folded in, at the end of their window.
        thresholds = [d.limit for d, _ in self.deferred if d.limit is not None]
        packed = self._pack(stats, clip, thresholds)
        numbers, count = readback.read(packed), len(stats.layout.names)
        if self._renewed is not None:
            self._baseline, self._renewed = numbers.pop(), None
        total, loss, outside, joint = numbers[count : count + 4]
        # What the clip does is there if the clipper was asked.
        others = numbers[count + 4 :]
        clipped, limits = (others[:3], others[3:]) if clip is not None else ([], others)
        # No comparison with NaN is true.
        if not (
            _LOW * self._baseline <= total <= _HIGH * self._baseline and outside == 0 and abs(joint) <= 1
        ):
            return None
        if total >= LARGEST_NORM:  # which may be less than twice the baseline
            return None
        if self._bounds is None and tuple([norm > 0 for norm in numbers[:count]]) != self._live:
            return None
        if stats.has_loss and not -math.inf < loss <= self._ceiling:
            return None
        completed = self.finalize(limits) if thresholds else []
        self.accepted, self._window, self.asked = self.accepted + 1, self._window + 1, None
        norms = array("f", numbers[:count])
        deferred = DeferredStep(stats.replace(gradients=(), norms=packed[:count]), norms, flush)
        after, multipliers = total, None
        if clip is not None:
            after, threshold, is_clipped = clipped
            deferred.finalize(threshold)
            multipliers = clip.multipliers if is_clipped else None
        report = Report.deferred(step, loss if stats.has_loss else None, total, after, deferred)
        self.deferred.append((deferred, report))
        return Accepted(report, multipliers, clipper_state, completed)

    def fold_in(self, state: GuardState | None) -> tuple[list[Tensor], GuardState | None]:
        """Fold deferred steps into the running statistics.

        Args:
            state: The guard's state before them; None only if there are none.

        Returns:
            Thresholds of all deferred steps, float32 [] each, for `finalize` once they are read; and the new state.
        """
        new = [(deferred, deferred.stats) for deferred, _ in self.deferred if deferred.stats is not None]
        if new:
            assert state is not None
            limits, state = fold_in(
                [stats for _, stats in new], state, None if self._asks_clipper else self.clipper
            )
            for (deferred, _), limit in zip(new, limits, strict=True):
                deferred.stats, deferred.limit = None, limit
        return [d.limit for d, _ in self.deferred if d.limit is not None], state

    def finalize(self, thresholds: Sequence[float]) -> list[tuple[Report, array[float]]]:
        """Complete the deferred steps.

        Args:
            thresholds: Those that `fold_in` returned, read on the host.

        Returns:
            Report and norms, float32 [P], of each step, oldest first.
        """
        completed = []
        for (deferred, report), threshold in zip(self.deferred, thresholds, strict=True):
            if not self._asks_clipper:
                deferred.finalize(threshold if self._has_threshold else None)
            completed.append((report, deferred.norms))
        self.deferred = []
        return completed

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain types and tensors.

        Deferred steps must have been folded in.
        """
        state = {key: getattr(self, attribute) for key, attribute in _SAVED.items()}
        bounds = None if self._bounds is None else {k: v.clone() for k, v in self._bounds._asdict().items()}
        return {**state, "_bounds": bounds, "clipper": repr(self.clipper)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore the state that `state_dict` returned, on a device."""
        self.deferred = []
        self.close()
        for key, attribute in _SAVED.items():
            if key in state:  # not in those of earlier versions
                setattr(self, attribute, state[key])
        # The clipper may be of the same class with other options.
        self._is_open &= self._is_able and state["clipper"] == repr(self.clipper)
        bounds = state["_bounds"]
        self._bounds = None if bounds is None else Bounds(**{k: v.to(device) for k, v in bounds.items()})

    def _set_bounds(self, stats: GradStats, clipper_state: Any) -> None:
        """Take the clipper's bounds for the next steps, if it gives any."""
        if self.clipper is not None and supports_fast_path(self.clipper):
            self._bounds = self.clipper.bounds(stats, clipper_state)

    def _pack(self, stats: GradStats, clip: Clip | None, thresholds: Sequence[Tensor]) -> Tensor:
        """Pack norms [P], global norm, loss, position within the bounds [2], what the clip does [3], thresholds.

        Last comes a new baseline, if there is one.
        """
        within = [stats.layout.constant(0.0)] * 2 if self._bounds is None else self._bounds.compare(stats)
        clipped = []
        if clip is not None:
            is_clipped = (clip.norms < stats.norms).any().to(torch.float32)
            clipped = [torch.linalg.vector_norm(clip.norms), clip.threshold, is_clipped]
        baseline = [] if self._renewed is None else [self._renewed]
        rest = [stats.total, stats.loss, *within, *clipped, *thresholds, *baseline]
        return torch.cat([stats.norms, torch.stack(rest)])
