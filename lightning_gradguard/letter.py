"""What goes through the mailbox: one step's numbers packed into a vector, and read back into plain types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, compress, pairwise, repeat
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.signals.pipeline import Outcome
from lightning_gradguard.signals.reading import Detector
from lightning_gradguard.signals.trends import trends_of
from lightning_gradguard.verdicts.faults import Severity
from lightning_gradguard.verdicts.letter import Letter, Sight

#: Tensors named in a finding.
NAMED = 8

_HEAD, _VALUES, _FLAGS = 11, 4, 2
#: The reading of a detector that was never asked: neither raised nor cleared.
_UNSEEN = [0.0, 0.0, 0.0, math.nan, math.nan, 0.0]


class Posted(NamedTuple):
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
    outcome: Outcome
    batch: object
    asked: tuple[bool, ...]


def pack(outcome: Outcome, loss_scale: Tensor | None = None, late: Sequence[Tensor] = ()) -> Tensor:
    """Everything the host is to know of a step, as one float32 vector [N] on the device.

    Args:
        outcome: What the device made of it.
        loss_scale: Of a gradient scaler, float32 [], or None.
        late: Other numbers, float32 [] each, which are put last, and which `unpack` passes over.
    """
    stats, readings, clip = outcome
    trends, asked = trends_of(stats), [r for r in readings if r is not None]
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
        trends.usual.exp(),
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
    numbers: list[float], posted: Posted, detectors: Sequence[Detector], before: Sequence[Sight]
) -> Letter:
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
    return Letter(
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


def _sight(detector: Detector, numbers: list[float], named: tuple[str, ...]) -> Sight:
    raised, cleared, ceiling, value, limit, measure = numbers
    return Sight(
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
