"""What goes through the mailbox: one step's numbers packed into a vector, and read back into plain types."""

from __future__ import annotations

from collections.abc import Sequence
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

_HEAD = 12
_PER_READING = 6


class Posted(NamedTuple):
    """What the host remembers of a step whose letter is under way."""

    step: int
    has_loss: bool
    scaled: bool
    outcome: Outcome
    batch: object


def pack(outcome: Outcome, loss_scale: Tensor | None = None) -> Tensor:
    """Everything the host is to know of a step, as one float32 vector [N] on the device."""
    stats, readings, clip = outcome
    trends = trends_of(stats)
    layers = stats.layout.layers
    unknown = torch.full_like(stats.total, torch.nan)
    head = [
        stats.total,
        stats.total if clip is None else torch.linalg.vector_norm(clip.norms),
        unknown if clip is None else clip.threshold,
        stats.total > stats.total if clip is None else (clip.norms < stats.norms).any(),
        stats.finite,
        stats.loss,
        trends.loss_start,
        trends.loss,
        trends.first_loss,
        unknown if loss_scale is None else loss_scale.to(unknown.device).reshape(()),
        trends.tilt,
        torch.nanmedian(stats.updates[layers]) if layers.numel() else unknown,
    ]
    for r in readings:
        head += [r.raised, r.cleared, r.ceiling, r.value, r.limit, r.measure]
    parts = [torch.stack([number.to(torch.float32) for number in head]), stats.norms]
    if readings:
        worst = torch.topk(torch.stack([r.score for r in readings]), min(NAMED, stats.norms.numel()))
        parts += [worst.indices.to(torch.float32).flatten(), worst.values.flatten()]
    return torch.cat(parts)


def norms_in(numbers: Tensor, tensors: int, detectors: int) -> Tensor:
    """The norms of so many tensors, float32 [P], in what `pack` wrote."""
    cut = _HEAD + _PER_READING * detectors
    return numbers[cut : cut + tensors]


def unpack(numbers: list[float], outcome: Outcome, detectors: Sequence[Detector]) -> Letter:
    """Reads back what `pack` wrote; of ``outcome`` only what the host knew before is used."""
    layout, gradients = outcome.stats.layout, outcome.stats.gradients
    count = len(layout.names)
    cut = _HEAD + _PER_READING * len(detectors)
    norms, tail = numbers[cut : cut + count], numbers[cut + count :]
    width = min(NAMED, count)
    places, scores = tail[: len(detectors) * width], tail[len(detectors) * width :]
    sights = []
    for i, detector in enumerate(detectors):
        ranked = zip(places[i * width : (i + 1) * width], scores[i * width : (i + 1) * width], strict=True)
        named = tuple(layout.names[int(place)] for place, score in ranked if score > -float("inf"))
        sights.append(_sight(detector, numbers[_HEAD + _PER_READING * i :][:_PER_READING], named))
    total, after, threshold, clipped, finite, loss, start, mean, first, scale, tilt, ratio = numbers[:_HEAD]
    present = {layout.names[i]: norms[i] for i in layout.order if gradients[i] is not None}
    return Letter(
        total_norm=total,
        clipped_norm=after,
        threshold=threshold,
        clipped=bool(clipped),
        finite=bool(finite),
        loss=loss,
        loss_start=start,
        loss_mean=mean,
        loss_first=first,
        loss_scale=scale,
        tilt=tilt,
        update_ratio=ratio,
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
