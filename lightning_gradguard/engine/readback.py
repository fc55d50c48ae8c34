"""The one door from device to host: one packed tensor per step, read now or one step later; a short one if quiet."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise, repeat
from operator import is_
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_gradguard.detectors.base import Detector
from lightning_gradguard.engine.evaluate import Evaluation
from lightning_gradguard.results import Fault, Severity

if TYPE_CHECKING:
    from numpy.typing import NDArray

Context = TypeVar("Context")


class Readback(Generic[Context]):
    """Carries one float32 vector per step to the host, with the host's own note of what it was about.

    With ``lag=0`` the letter just posted is read at once, and the device is waited for. With ``lag=1`` its copy
    is only started, and the letter of the step before is read, which has long arrived.

    Args:
        lag: 0 or 1.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, Context]] = deque()

    def exchange(self, letter: Tensor, context: Context) -> tuple[list[float], Context] | None:
        """Posts a letter and takes out the one that is due, or None.

        Args:
            letter: float32 [N] on any device.
            context: What the host wants back together with the numbers.
        """
        copy, arrived = letter.detach(), None
        if self.lag and letter.is_cuda:
            copy = torch.empty(letter.shape, dtype=letter.dtype, pin_memory=True)
            copy.copy_(letter.detach(), non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._waiting.append((copy, arrived, context))
        return self.take() if len(self._waiting) > self.lag else None

    def waiting(self) -> list[tuple[Tensor, Context]]:
        """The letters under way in the host's memory, oldest first; they stay under way."""
        for _, arrived, _ in self._waiting:
            if arrived is not None:
                arrived.synchronize()
        return [(letter.cpu(), context) for letter, _, context in self._waiting]

    def put_back(self, letter: Tensor, context: Context) -> None:
        """Puts a letter behind those under way, as `waiting` gave it."""
        self._waiting.append((letter, None, context))

    def __getstate__(self) -> dict[str, object]:
        """A copy has the letters themselves."""
        return {
            "lag": self.lag,
            "_waiting": deque((letter, None, context) for letter, context in self.waiting()),
        }

    def take(self) -> tuple[list[float], Context] | None:
        """Takes out the oldest letter, waiting for it if need be; None when there is none."""
        if not self._waiting:
            return None
        letter, arrived, context = self._waiting.popleft()
        if arrived is not None:
            arrived.synchronize()
        return read(letter), context


def read(vector: Tensor) -> list[float]:
    """Reads a vector [N] now, waiting for the device; in the step path only through a `Readback`."""
    # NumPy's conversion is ten times as fast as the tensor's own.
    numbers: list[float] = read_array(vector).tolist()
    return numbers


def read_array(vector: Tensor) -> NDArray[Any]:
    """The same as an array, which takes less memory than a list; in the step path a glance at what may be quiet."""
    numbers: NDArray[Any] = vector.detach().cpu().numpy()
    return numbers


class DetectorResult(NamedTuple):
    """A detector's reading of one step.

    Attributes:
        detector: Its class name.
        fault: What it means when raised.
        event: Each raised sight stands for itself, and never becomes critical.
        needs_loss: It says nothing unless the loss is given.
        raised: The condition holds.
        cleared: The condition is over; neither leaves things as they are.
        ceiling: Highest severity that the condition may reach.
        value: The number the verdict rests on.
        limit: Where the verdict begins.
        measure: What ``value`` is.
        parameters: Tensors concerned, worst first.
    """

    detector: str
    fault: Fault
    event: bool
    needs_loss: bool
    raised: bool
    cleared: bool
    ceiling: Severity
    value: float
    limit: float
    measure: str
    parameters: tuple[str, ...]

    def to_plain(self) -> list[object]:
        """Itself in plain types, for `from_plain`."""
        fault, ceiling = self.fault.value, int(self.ceiling)
        flags = self.event, self.needs_loss, self.raised, self.cleared
        return [
            self.detector,
            fault,
            *flags,
            ceiling,
            self.value,
            self.limit,
            self.measure,
            list(self.parameters),
        ]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> DetectorResult:
        """What `to_plain` gave."""
        sight = cls(*plain)
        return sight._replace(
            fault=Fault(sight.fault), ceiling=Severity(sight.ceiling), parameters=tuple(sight.parameters)
        )


#: Stands in where no detector of non-finite steps is set: such steps are skipped all the same.
UNSEEN = DetectorResult(
    detector="Guard",
    fault=Fault.NONFINITE,
    event=True,
    needs_loss=False,
    raised=True,
    cleared=False,
    ceiling=Severity.CRITICAL,
    value=1.0,
    limit=0.0,
    measure="steps with a non-finite gradient or loss",
    parameters=(),
)


@dataclass(frozen=True)
class StepRecord:
    """One step; NaN stands for what is not known.

    Attributes:
        total_norm: Global norm before clipping.
        clipped_norm: Global norm after clipping.
        threshold: Largest global norm the clipper allows.
        clipped: Whether the clipper shortened any gradient, be it by too little to show in the global norm.
        finite: Whether the gradients, their norm, and the loss are.
        loss: Of this step.
        loss_start: Median of the first five losses.
        loss_mean: Running mean of the loss.
        loss_first: The very first, of weights that no step has touched.
        loss_scale: Of a gradient scaler.
        tilt: Depth tilt in decades.
        update_ratio: Median applied update ratio of the layers.
        usual_norm: Usual global norm; 0 before there is one.
        norms: Name of each tensor with a gradient to its norm before clipping, from input to output.
        sights: One for each detector.
    """

    total_norm: float
    clipped_norm: float
    threshold: float
    clipped: bool
    finite: bool
    loss: float
    loss_start: float
    loss_mean: float
    loss_first: float
    loss_scale: float
    tilt: float
    update_ratio: float
    usual_norm: float
    norms: dict[str, float]
    sights: list[DetectorResult]


#: Tensors named in a finding.
NAMED = 8

_HEAD, _VALUES, _FLAGS = 11, 4, 2
#: The reading of a detector that was never asked: neither raised nor cleared.
_UNSEEN = [0.0, 0.0, 0.0, math.nan, math.nan, 0.0]


class PendingStep(NamedTuple):
    """What the host remembers of a step whose letter is under way.

    Attributes:
        step: Its number.
        has_loss: A loss was given.
        scaled: A gradient scaler is in use.
        outcome: What the device made of it.
        batch: What the loss was computed from, or None.
        asked: Which of the detectors have a reading.
    """

    step: int
    has_loss: bool
    scaled: bool
    outcome: Evaluation
    batch: object
    asked: tuple[bool, ...]


def pack(outcome: Evaluation, loss_scale: Tensor | None = None, late: Sequence[Tensor] = ()) -> Tensor:
    """Everything the host is to know of a step, as one float32 vector [N] on the device.

    Args:
        outcome: What the device made of it.
        loss_scale: Of a gradient scaler, float32 [], or None.
        late: Other numbers, float32 [] each, which are put last, and which `unpack` passes over.
    """
    stats, readings, clip = outcome
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
    ]
    for r in asked:
        flags += [r.raised, r.cleared]
        head += [number.to(torch.float32) for number in (r.ceiling, r.value, r.limit, r.measure)]
    parts = [stats.norms, torch.stack(head), torch.stack(flags).to(torch.float32)]
    if asked:
        worst = torch.topk(torch.stack([r.score for r in asked]), min(NAMED, stats.norms.numel()))
        parts += [worst.indices.to(torch.float32).flatten(), worst.values.flatten()]
    return torch.cat([*parts, torch.stack(tuple(late))] if late else parts)


def unpack(
    numbers: list[float], posted: PendingStep, detectors: Sequence[Detector], before: Sequence[DetectorResult]
) -> StepRecord:
    """Reads back what `pack` wrote; of the outcome only what the host knew before is used.

    Args:
        numbers: What `pack` wrote.
        posted: What it was about.
        detectors: All of them.
        before: Their newest sights, which stand for those that were not asked; empty if there are none.
    """
    layout, gradients = posted.outcome.stats.layout, posted.outcome.stats.gradients
    count, asked = len(layout.names), sum(posted.asked)
    cut = accumulate((count, _HEAD + _VALUES * asked, 2 + _FLAGS * asked, len(numbers)))
    norms, head, flags, tail = (numbers[a:b] for a, b in pairwise((0, *cut)))
    width = min(NAMED, count)
    sights, at = [], 0
    for i, detector in enumerate(detectors):
        if not posted.asked[i]:
            sights.append(before[i] if before else _sight(detector, _UNSEEN, ()))
            continue
        places, scores = (tail[k * width : (k + 1) * width] for k in (at, asked + at))
        named = tuple(layout.names[int(p)] for p, s in zip(places, scores, strict=True) if s > -math.inf)
        said = flags[2 + _FLAGS * at :][:_FLAGS] + head[_HEAD + _VALUES * at :][:_VALUES]
        sights.append(_sight(detector, said, named))
        at += 1
    total, after, threshold, loss, start, mean, first, scale, tilt, ratio, usual = head[:_HEAD]
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
        usual_norm=usual,
        norms=present,
        sights=sights,
    )


def _sight(detector: Detector, numbers: list[float], named: tuple[str, ...]) -> DetectorResult:
    raised, cleared, ceiling, value, limit, measure = numbers
    return DetectorResult(
        detector=type(detector).__name__,
        fault=detector.fault,
        event=getattr(detector, "event", False),
        needs_loss=getattr(detector, "needs_loss", False),
        raised=bool(raised),
        cleared=bool(cleared),
        ceiling=Severity(int(ceiling)),
        value=value,
        limit=limit,
        measure=detector.measures[int(measure)],
        parameters=named,
    )
