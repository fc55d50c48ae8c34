"""One run of an arm, regime, learning rate and seed, from the first step to the loss on held-out text."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from benchmarks.lm.model import CONTEXT, LanguageModel
from benchmarks.lm.regimes import Accidents
from benchmarks.lm.text import library, windows
from lightning_gradguard import AGC, AdaGC, AutoClip, ClipRate, Guard, NormClip, SpikeClip, SpikeScore, ZClip
from lightning_gradguard.results import GradientHalt, Report

#: Arm to its clipper, each with its published values; the package's paper or reference gives them.
ARMS: dict[str, Any] = {
    "none": None,
    "NormClip(1.0)": NormClip(1.0),
    "AGC": AGC(exclude=("head.*",)),
    "AutoClip": AutoClip(),
    "ZClip": ZClip(),
    "AdaGC": AdaGC(),
    "SpikeClip": SpikeClip(),
}
#: Arms of the NaN regime without a guard: name to the norm that torch clips to.
BARE = {"none, no guard": math.inf, "clip_grad_norm_(1.0), no guard": 1.0}
#: Peak learning rates, from reasonable to too high.
RATES = (3e-3, 1e-2, 3e-2)
STEPS, BATCH = 400, 16
#: Share of the steps in which the learning rate rises; then it falls along a cosine to a tenth.
WARM_UP = 0.1
#: Number of held-out windows for the final loss.
EXAM = 512


def schedule(step: int, steps: int) -> float:
    """Return the factor on the peak learning rate."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def train(clipper: Any, regime: str, rate: float, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Train once.

    Args:
        clipper: A clipper; None for none; or a float: torch's clipping to that norm, without a guard.
        regime: A key of `REGIMES`.
        rate: Peak learning rate.
        seed: Seed of the weights, the batches and the accidents.
        steps: Number of steps.

    Returns:
        ``loss``: held-out, nats per token; ``score``: spike score of the norms before clipping; ``clipped``: share of
        the steps that were taken and clipped; ``skipped``: steps not taken; ``halted``: True if the guard halted.
    """
    torch.manual_seed(seed)
    text, random = library(), torch.Generator().manual_seed(seed)
    model, accidents = LanguageModel(), Accidents(regime, steps, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    # No detectors, since only clippers are compared. Non-finite steps are skipped for every arm.
    if isinstance(clipper, float):
        guard: Any = Bare(model, clipper)
    else:
        guard = Guard(model.named_parameters(), optimizer=optimizer, detectors=(), clipper=clipper)
    norms: list[float] = []
    scales: list[float] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * schedule(step, steps)
        starts = torch.randint(len(text.train) - CONTEXT, (BATCH,), generator=random)
        window = windows(text.train, starts, CONTEXT)
        tokens, targets, factor = accidents.batch(step, window[:, :-1], window[:, 1:])
        optimizer.zero_grad()
        loss = model.cross_entropy(tokens, targets) * factor
        loss.backward()
        accidents.gradients(step, model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = guard.step(loss=loss)
        except GradientHalt:
            break
        if not report.skip:
            scales.append(report.scale)
            optimizer.step()
        norms.append(report.total_norm)
    score, share = SpikeScore(), ClipRate()
    score.update(torch.tensor(norms))
    share.update(torch.tensor(scales))
    return {
        "regime": regime,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "loss": exam(model, text.held_out),
        "score": score.compute().item(),
        "clipped": share.compute().item(),
        "skipped": len(norms) - len(scales),
        "halted": len(norms) < steps,
    }


class Bare:
    """Replacement for the guard in arms without one: torch's own clipping, and every step is taken."""

    def __init__(self, model: LanguageModel, max_norm: float) -> None:
        self.model, self.max_norm = model, max_norm

    def step(self, loss: torch.Tensor) -> Report:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm).item()
        scale = min(1.0, self.max_norm / norm)
        return Report(0, loss.item(), norm, norm * scale, self.max_norm, scale, skip=False)


@torch.no_grad()
def exam(model: LanguageModel, text: torch.Tensor) -> float:
    """Return the loss on held-out text, on the same windows for all runs."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, EXAM).long()
    return model.loss(windows(text, starts, CONTEXT)).item()
