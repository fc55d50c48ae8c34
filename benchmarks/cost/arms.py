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
from lightning_gradguard import SpikeClip
from lightning_gradguard.cli.cost import Timings, measure

OURS = "Guard, SpikeClip"

TRANSFORMER = "transformer, 30 million in 100 tensors"
THOUSAND, FOUR_THOUSAND = "1,000 tensors of 32 × 32", "4,000 tensors of 32 × 32"

#: Models whose gradients are measured: description to constructor.
WORKLOADS: dict[str, Callable[[], nn.Module]] = {
    TRANSFORMER: lambda: Transformer(layers=8, width=512, vocabulary=8832, context=512),
    "4 tensors of 2,740 × 2,740": lambda: tensors([(2740, 2740)] * 4),
    THOUSAND: lambda: tensors([(32, 32)] * 1000),
    FOUR_THOUSAND: lambda: tensors([(32, 32)] * 4000),
    "toy, 13 layers of 64": lambda: tensors([(64, 64), (64,)] * 13),
}


def timings(model: nn.Module, steps: int, clock: Callable[[], float], with_peers: bool = True) -> Timings:
    """Time all arms on the gradients of one model."""
    more = {} if not with_peers else of_peers(model)
    return measure(model, SpikeClip(), steps, more, clock)


def of_peers(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Return each peer's work per step, as far as it can be called on its own."""
    arms: dict[str, Callable[[], object]] = {"Lightning's grad_norm": lambda: grad_norm(model, norm_type=2)}
    if (zclip := peers.find("zclip")) is not None:
        spikes: Any = zclip.ZClip()
        arms["zclip"] = lambda: spikes.step(model)
    if (agc := peers.find("timm AGC")) is not None:
        arms["timm AGC"] = lambda: agc.adaptive_clip_grad(model.parameters())
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
