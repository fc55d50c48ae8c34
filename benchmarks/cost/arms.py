"""Single steps: `Guard.step`, a plain norm, torch's clipping and the peers, on gradients of many shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import grad_norm
from torch import nn

from benchmarks.cost import peers
from benchmarks.cost.models import Transformer, tensors
from lightning_gradguard import AGC, AdaGC, AutoClip, Guard, NormClip, SpikeClip, SteadyClip, ZClip
from lightning_gradguard.cli.cost import CYCLE, MAX_NORM, WARM_UP, SyntheticTraining, Timings, measure
from lightning_gradguard.clippers import Clipper

OURS = "Guard, SpikeClip"
AGC_HERE, AGC_THERE = "Guard, AGC", "timm AGC"

#: Further clippers: name of the arm to the clipper.
CLIPPERS: dict[str, Callable[[], Clipper]] = {
    "Guard, SteadyClip": SteadyClip,
    "Guard, NormClip": lambda: NormClip(MAX_NORM),
    "Guard, AutoClip": AutoClip,
    "Guard, ZClip": ZClip,
    "Guard, AdaGC": AdaGC,
    AGC_HERE: AGC,
}

TRANSFORMER = "transformer, 30 million in 100 tensors"
THOUSAND, FOUR_THOUSAND = "1,000 tensors of 32 × 32", "4,000 tensors of 32 × 32"
TOY = "toy, 13 layers of 64"

#: Models whose gradients are measured: description to constructor.
WORKLOADS: dict[str, Callable[[], nn.Module]] = {
    TRANSFORMER: lambda: Transformer(layers=8, width=512, vocabulary=8832, context=512),
    "4 tensors of 2,740 × 2,740": lambda: tensors([(2740, 2740)] * 4),
    THOUSAND: lambda: tensors([(32, 32)] * 1000),
    FOUR_THOUSAND: lambda: tensors([(32, 32)] * 4000),
    "1,000 vectors of 4": lambda: tensors([(4,)] * 1000),
    TOY: lambda: tensors([(64, 64), (64,)] * 13),
}


def timings(
    model: nn.Module, steps: int, clock: Callable[[], float], everything: bool = True
) -> tuple[Timings, dict[str, float]]:
    """Time all arms on the gradients of one model.

    Args:
        model: Model whose parameters get random gradients.
        steps: Steps to time.
        clock: Clock that returns seconds.
        everything: Time all clippers and peers, too.

    Returns:
        The timings, and the share of steps that each clipper clipped.
    """
    guards = warmed_up(model) if everything else {}
    # Half of the start and less: that is when a guard looks closer at one of 32 steps only.
    loss = torch.tensor(0.5)
    more: dict[str, Callable[[], object]] = {
        name: lambda guard=guard: guard.step(loss=loss)  # type: ignore[misc]
        for name, guard in guards.items()
    }
    found = measure(model, SpikeClip(), steps, more | (of_peers(model) if everything else {}), clock)
    clipped = {name: guard.counts["clipped"] / guard.counts["judged"] for name, guard in guards.items()}
    return found, {OURS: found.clipped} | clipped if everything else {}


def warmed_up(model: nn.Module) -> dict[str, Guard]:
    """Return a guard for each of `CLIPPERS`, after as many steps as `measure` lets its own take before the clock."""
    training = SyntheticTraining(model)
    guards = {name: Guard(model.named_parameters(), clipper=make()) for name, make in CLIPPERS.items()}
    for _ in range(WARM_UP - CYCLE):
        training.advance()
        for guard in guards.values():
            training.restore()
            guard.step(loss=training.loss)
    return guards


def of_peers(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Return each peer's work per step, as far as it can be called on its own."""
    arms: dict[str, Callable[[], object]] = {"Lightning's grad_norm": lambda: grad_norm(model, norm_type=2)}
    if (zclip := peers.find("zclip")) is not None:
        spikes: Any = zclip.ZClip()
        arms["zclip"] = lambda: spikes.step(model)
    if (agc := peers.find(AGC_THERE)) is not None:
        arms[AGC_THERE] = lambda: agc.adaptive_clip_grad(model.parameters())
    if (module := peers.find("torch-module-monitor")) is not None:
        monitor: Any = module.ModuleMonitor(monitor_step_fn=lambda step: True)
        monitor.add_gradient_metric("norm", torch.linalg.vector_norm)
        monitor.set_module(model)
        numbers = itertools.count()

        def step() -> None:
            monitor.begin_step(next(numbers))
            monitor.monitor_gradients()
            monitor.end_step()

        arms["torch-module-monitor"] = step
    return arms
