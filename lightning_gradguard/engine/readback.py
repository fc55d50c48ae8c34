"""Read packed step results back to the host."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, compress, pairwise, repeat
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.detectors.base import Detector, DetectorTraits
from lightning_gradguard.engine.evaluate import Evaluation, GuardParts
from lightning_gradguard.engine.step_context import StepContext
from lightning_gradguard.engine.step_record import DetectorResult, StepRecord
from lightning_gradguard.results import Severity
from lightning_gradguard.stats.grad_stats import stats_of
from lightning_gradguard.stats.layout import Layout

#: Most tensors named in a finding.
NAMED = 8

# Numbers in the packed vector: of the step, and of each detector that was asked.
_STEP_NUMBERS, _STEP_FLAGS = 12, 2
_RESULT_NUMBERS, _RESULT_FLAGS = 4, 2
#: Numbers of a detector that was never asked: neither raised nor cleared.
_NEVER_ASKED = [0.0, 0.0, 0.0, math.nan, math.nan, 0.0]


class PendingStep(NamedTuple):
    """A step whose numbers have not arrived yet.

    Attributes:
        step: Number of the step.
        has_loss: True if a loss was given.
        scaled: True if a gradient scaler is in use.
        evaluation: Results on the device.
        asked: For each detector, True if it was asked.
        context: Facts from the caller.
    """

    step: int
    has_loss: bool
    scaled: bool
    evaluation: Evaluation
    asked: tuple[bool, ...]
    context: StepContext


class Readback:
    """Carries one vector a step to the host.

    With ``lag=0`` a vector is read as soon as it is posted, which waits for the device. With ``lag=1`` only its copy is
    started, and the vector of the step before is read, which has arrived long since.

    Args:
        lag: 0 or 1.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._under_way: deque[tuple[Tensor, torch.cuda.Event | None, PendingStep]] = deque()

    def exchange(self, packed: Tensor, step: PendingStep) -> tuple[list[float], PendingStep] | None:
        """Post a step's numbers; return those due, or None.

        Args:
            packed: float32 [N] on any device, from `pack`.
            step: The step they belong to.
        """
        copy, arrived = packed.detach(), None
        if self.lag and packed.is_cuda:
            copy = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
            copy.copy_(packed.detach(), non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._under_way.append((copy, arrived, step))
        return self.take() if len(self._under_way) > self.lag else None

    def take(self) -> tuple[list[float], PendingStep] | None:
        """Take the oldest numbers, or None; wait if needed."""
        if not self._under_way:
            return None
        packed, arrived, step = self._under_way.popleft()
        if arrived is not None:
            arrived.synchronize()
        return read(packed), step

    def under_way(self) -> list[tuple[Tensor, PendingStep]]:
        """Return host copies of what is under way, oldest first."""
        for _, arrived, _ in self._under_way:
            if arrived is not None:
                arrived.synchronize()
        return [(packed.cpu(), step) for packed, _, step in self._under_way]

    def put_back(self, packed: Tensor, step: PendingStep) -> None:
        """Append numbers that `under_way` returned."""
        self._under_way.append((packed, None, step))

    def __getstate__(self) -> dict[str, object]:
        # A CUDA event can be neither copied nor pickled.
        return {"lag": self.lag, "_under_way": deque((p, None, step) for p, step in self.under_way())}


def read(vector: Tensor) -> list[float]:
    """Read a vector [N] now, and wait for the device."""
    numbers: list[float] = vector.detach().cpu().tolist()
    return numbers


def pack(
    evaluation: Evaluation, loss_scale: Tensor | None = None, thresholds: Sequence[Tensor] = ()
) -> Tensor:
    """Pack a step into one float32 vector [N].

    Args:
        evaluation: Results on the device.
        loss_scale: Scale of a gradient scaler, float32 [], or None.
        thresholds: Thresholds of deferred steps, float32 [] each. They come last, and `unpack` leaves them out.
    """
    stats, readings, clip = evaluation
    trends, asked = stats.trends, [r for r in readings if r is not None]
    unknown = stats.layout.constant(torch.nan)
    flags = [stats.finite, stats.total < stats.total if clip is None else (clip.norms < stats.norms).any()]
    head = [
        stats.total,
        stats.total if clip is None else torch.linalg.vector_norm(clip.norms),
        unknown if clip is None else clip.threshold,
        stats.loss,
        trends.loss_start,
        trends.loss,
        trends.first_loss,
        unknown if loss_scale is None else loss_scale.to(unknown.device).reshape(()),
        trends.tilt,
        stats.update_ratio,
        trends.baseline.exp(),
        stats.carried,
    ]
    for r in asked:
        flags += [r.raised, r.cleared]
        head += [number.to(torch.float32) for number in (r.ceiling, r.value, r.limit, r.measure)]
    parts = [stats.norms, torch.stack(head), torch.stack(flags).to(torch.float32)]
    if asked:
        worst = torch.topk(torch.stack([r.score for r in asked]), min(NAMED, stats.norms.numel()))
        parts += [worst.indices.to(torch.float32).flatten(), worst.values.flatten()]
        never = stats.layout.nowhere[0]
        parts.append(torch.stack([never if r.near is None else r.near for r in asked]).to(torch.float32))
    return torch.cat([*parts, torch.stack(tuple(thresholds))] if thresholds else parts)


def unpack(
    numbers: list[float],
    step: PendingStep,
    parts: GuardParts,
    previous: Sequence[DetectorResult],
) -> StepRecord:
    """Return the record that `pack` packed.

    Args:
        numbers: Numbers that `pack` wrote.
        step: The step they belong to.
        parts: Detectors and clipper.
        previous: Their newest results, which stand for detectors that were not asked; empty if there are none.
    """
    layout, gradients = step.evaluation.stats.layout, step.evaluation.stats.gradients
    count, asked = len(layout.names), sum(step.asked)
    cut = accumulate(
        (
            count,
            _STEP_NUMBERS + _RESULT_NUMBERS * asked,
            _STEP_FLAGS + _RESULT_FLAGS * asked,
            len(numbers),
        )
    )
    norms, head, flags, tail = (numbers[a:b] for a, b in pairwise((0, *cut)))
    width = min(NAMED, count)
    near = (
        tail[2 * asked * width :][:asked] or [0.0] * asked
    )  # a step under way that an older version saved has none
    results, at = [], 0
    for i, (detector, traits) in enumerate(zip(parts.detectors, parts.traits, strict=True)):
        if not step.asked[i]:
            results.append(
                previous[i] if previous else _result(detector, traits, _NEVER_ASKED, (), near=False)
            )
            continue
        places, scores = (tail[k * width : (k + 1) * width] for k in (at, asked + at))
        names = tuple(layout.names[int(p)] for p, s in zip(places, scores, strict=True) if s > -math.inf)
        own_flags = flags[_STEP_FLAGS + _RESULT_FLAGS * at :][:_RESULT_FLAGS]
        own_numbers = head[_STEP_NUMBERS + _RESULT_NUMBERS * at :][:_RESULT_NUMBERS]
        results.append(_result(detector, traits, own_flags + own_numbers, names, near=bool(near[at])))
        at += 1
    total, after, threshold, loss, start, mean, first, scale, tilt, ratio, baseline, carried = head[
        :_STEP_NUMBERS
    ]
    present = dict(zip(layout.ordered_names, map(norms.__getitem__, layout.order), strict=True))
    for name in compress(layout.names, map(is_, gradients, repeat(None))):
        del present[name]
    return StepRecord(
        total_norm=total,
        clipped_norm=after,
        threshold=threshold,
        clipped=bool(flags[1]),
        finite=bool(flags[0]),
        loss=loss,
        loss_start=start,
        loss_mean=mean,
        loss_first=first,
        loss_scale=scale,
        tilt=tilt,
        update_ratio=ratio,
        baseline_norm=baseline,
        carried=carried,
        norms=present,
        results=results,
    )


def save_under_way(readback: Readback) -> list[dict[str, Any]]:
    """Return the steps under way as plain types."""
    return [
        {
            "numbers": packed.clone(),
            "step": step.step,
            "has_loss": step.has_loss,
            "scaled": step.scaled,
            "elapsed": step.evaluation.stats.elapsed,
            "present": [gradient is not None for gradient in step.evaluation.stats.gradients],
            "asked": list(step.asked),
        }
        for packed, step in readback.under_way()
    ]


def restore_under_way(
    readback: Readback, saved: Sequence[dict[str, Any]], layout: Layout, weights: Tensor, updates: Tensor
) -> None:
    """Put back what `save_under_way` returned.

    Args:
        readback: Takes it.
        saved: What was under way, oldest first.
        layout: The tensors it is about.
        weights: float32 [P] weight norms.
        updates: float32 [P] update ratios.
    """
    for one in saved:
        if one["numbers"].ndim != 1 or one["numbers"].layout != torch.strided:
            raise ValueError("the numbers of a step under way must be one row")
        norms = one["numbers"][: len(layout.names)]
        # A parameter stands for its gradient: only its presence and type are asked for.
        gradients = tuple(
            p.detach() if there else None for p, there in zip(layout.parameters, one["present"], strict=True)
        )
        stats = stats_of(layout, gradients, norms.to(layout.numel.device), weights, updates, None)
        stats = stats.replace(has_loss=one["has_loss"], elapsed=one.get("elapsed", 0))
        evaluation = Evaluation(stats, (), None)
        step = PendingStep(
            one["step"], one["has_loss"], one["scaled"], evaluation, tuple(one["asked"]), StepContext()
        )
        readback.put_back(one["numbers"], step)


def _result(
    detector: Detector, traits: DetectorTraits, numbers: list[float], names: tuple[str, ...], *, near: bool
) -> DetectorResult:
    raised, cleared, ceiling, value, limit, measure = numbers
    return DetectorResult(
        detector=type(detector).__name__,
        fault=detector.fault,
        event=traits.event,
        needs_loss=traits.needs_loss,
        raised=bool(raised),
        cleared=bool(cleared),
        ceiling=Severity(int(ceiling)),
        value=value,
        limit=limit,
        measure=detector.measures[int(measure)],
        parameters=names,
        near=near,
    )
