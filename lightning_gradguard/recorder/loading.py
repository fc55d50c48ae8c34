"""Puts recorded weights into a module, which must have the same parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.naming import select
from lightning_gradguard.recorder.bundle import ReplayError


@torch.no_grad()
def load(module: nn.Module, bundle: dict[str, Any], device: torch.device) -> None:
    """Puts the recorded weights and modes into a module, each tensor in its recorded dtype; all or nothing.

    Raises:
        ReplayError: If there are no weights, or the module's parameters are others.
    """
    weights = bundle["weights"]
    if weights is None:
        why = "; ".join([*bundle["left_out"], *bundle["notes"]]) or "they were not kept"
        raise ReplayError(f"there are no weights to replay with; not in the bundle: {why}")
    mine = _parameters(module)
    odd = [f"it lacks {name}" for name in weights if name not in mine]
    odd += [f"it has {name} more" for name in mine if name not in weights]
    odd += [
        f"{name} is {list(mine[name].shape)} and not {list(weights[name].shape)}"
        for name in weights
        if name in mine and mine[name].shape != weights[name].shape
    ]
    if odd:
        more = f" and {len(odd) - 3} more differences" if len(odd) > 3 else ""
        raise ReplayError(
            f"the module has other parameters than the recorded one: {', '.join(odd[:3])}{more}"
        )
    module.to(device)
    frozen, evaluated = set(bundle["module"].get("frozen", ())), set(bundle["module"].get("evaluated", ()))
    for name, parameter in _parameters(module).items():
        # A module in half precision was made in full precision here.
        parameter.data = weights[name].to(device, copy=True)
        parameter.requires_grad_(name not in frozen)
        parameter.grad = None
    for name, part in module.named_modules():
        part.training = name not in evaluated
    buffers = {name: t for name, t in tensors_by_name(module).items() if name in bundle["buffers"]}
    for name, buffer in buffers.items():
        recorded = bundle["buffers"][name]
        if buffer.shape == recorded.shape:
            buffer.data = recorded.to(device, copy=True)


def tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers by the names that a bundle has them under."""
    return select([*module.named_parameters(), *module.named_buffers()], None)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    named = list(module.named_parameters())
    return select(named, None) if named else {}
