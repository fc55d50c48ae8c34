"""A step that is due or stands out, judged in full: from statistics to report, findings, messages and diagnosis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_gradguard.clippers.base import apply_
from lightning_gradguard.engine import device_skip as lagging
from lightning_gradguard.engine import evaluate as pipeline
from lightning_gradguard.engine.history import history_of
from lightning_gradguard.engine.readback import PendingStep, pack, unpack
from lightning_gradguard.results import Fault, Report
from lightning_gradguard.stats.grad_stats import GradStats

if TYPE_CHECKING:
    from lightning_gradguard.guard import Guard


def judge(
    guard: Guard, stats: GradStats, number: int, scaler: torch.amp.GradScaler | None, batch: object
) -> Report:
    """Judges a step, and does what is to be done with it.

    Args:
        guard: Whose step it is.
        stats: Of the step.
        number: Of the step, in reports.
        scaler: The gradient scaler in use, or None.
        batch: What the loss was computed from, or None.

    Raises:
        GradientHalt: If training cannot go on.
    """
    late, passed = guard.quiet.learn(guard), guard.quiet.passed
    before = guard._states or pipeline.init(stats, guard.detectors, guard.clipper)
    outcome, states = pipeline.advance(stats, before, guard.detectors, guard.clipper, passed)
    asked = tuple([reading is not None for reading in outcome.readings])
    kept = None if guard._lag else batch
    posted = PendingStep(number, stats.has_loss, scaler is not None, outcome, kept, asked)
    packed = pack(outcome, None if scaler is None else scaler._scale, late)
    answer = guard._mailbox.exchange(packed, posted)
    if guard._lag:
        guard.quiet.stop()
        return lagging.judge_late(guard, outcome, before, states, answer)
    assert answer is not None
    guard.quiet.let_go(guard, answer[0][len(answer[0]) - len(late) :])
    guard.quiet.stop()
    guard.quiet.passed = passed  # until a step is taken, detectors have not heard of them
    said = report(guard, *answer)
    assert guard.letter is not None
    if said.skip:
        guard.watch.drop()
    else:
        guard._states = states
        guard.quiet.start(guard.letter, stats, states[-1], guard.judge)
        if outcome.clip is not None and guard.letter.clipped:
            apply_(stats.gradients, outcome.clip.multipliers)
    if any(f.fault == Fault.SPIKE for f in said.findings):
        guard.watch.sample_now()
    guard.watch.schedule.settle(not said.skip)
    guard._ask()
    guard._raise_if_halted(number)
    return said


def report(guard: Guard, numbers: list[float], posted: PendingStep) -> Report:
    """From a step's numbers to its report, findings, messages and diagnosis.

    Args:
        guard: Whose step it was.
        numbers: What came through the mailbox.
        posted: What is known of it besides.
    """
    letter = guard.letter = unpack(numbers, posted, guard.detectors, guard.sights)
    verdict = guard.judge.judge(
        posted.step,
        letter,
        has_loss=posted.has_loss,
        scaled=posted.scaled,
        clipping=guard.clipper is not None,
    )
    found, guard._halt = verdict.report, verdict.halt
    guard.report = found
    layout = posted.outcome.stats.layout
    if layout.names != guard._history.names:
        guard._history = history_of(layout, guard._history.steps)
    guard._history.add(found)
    if letter.finite:
        guard.calm, guard.sights = letter, letter.sights
    guard.counts["judged"] += 1
    guard.counts["clipped"] += letter.clipped and not found.skip
    guard.counts["skipped"] += found.skip
    guard.counts["nonfinite"] += not letter.finite
    guard.watch.schedule.heed(letter.loss_start, letter.loss_mean, bool(guard.judge.episodes))
    guard._findings.extend(found.findings)
    if found.findings:
        from lightning_gradguard.diagnosis import (
            facts,
        )  # the doctor is not asked for before something is found

        guard.diagnosis = facts.explain(guard, verdict, posted) or guard.diagnosis
    return found
