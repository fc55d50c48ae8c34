"""Rebuild a recorded module and load its weights."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.flight_recorder.bundle import ReplayError
from lightning_gradguard.flight_recorder.serialization import decode
from lightning_gradguard.stats.parameters import select


def build_module(kind: Callable[..., Any], bundle: dict[str, Any], given: Mapping[str, Any]) -> nn.Module:
    """Construct a module from its recorded hyper-parameters.

    Args:
        kind: The module's class, or any function that returns a module.
        bundle: Bundle that holds the hyper-parameters.
        given: Further arguments; they replace recorded ones of the same name.

    Raises:
        ReplayError: If the call fails or returns no module.
    """
    name = getattr(kind, "__qualname__", repr(kind))
    try:
        arguments = {**_recorded_arguments(bundle, kind), **given}
    except ValueError as error:
        raise ReplayError(f"the recorded arguments of {name} cannot be used: {error}") from error
    try:
        module = kind(**arguments)
    except Exception as error:
        missing = bundle["hyper_parameters"].get("left_out", [])
        hint = f"; not recorded, since not plain: {', '.join(missing)}" if missing else ""
        raise ReplayError(
            f"cannot build {name} from {', '.join(arguments) or 'no arguments'}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}{hint}; give its arguments with --args name=value"
        ) from error
    if not isinstance(module, nn.Module):
        raise ReplayError(f"{name} must return an nn.Module, got {type(module).__name__}")
    return module


def _recorded_arguments(bundle: dict[str, Any], kind: Callable[..., Any]) -> dict[str, Any]:
    """Select arguments as Lightning's ``load_from_checkpoint`` does."""
    recorded = bundle["hyper_parameters"]
    values = {name: decode(value) for name, value in recorded["values"].items()}
    argument = recorded["argument"]
    accepted: Any = {}
    with contextlib.suppress(TypeError, ValueError):
        accepted = inspect.signature(kind).parameters
    if argument != "kwargs" and argument in accepted:
        return {argument: values}
    plain = {name: value for name, value in values.items() if not name.startswith("_")}
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return plain
    return {name: value for name, value in plain.items() if name in accepted}


@torch.no_grad()
def load_weights(module: nn.Module, bundle: dict[str, Any], device: torch.device) -> None:
    """Load recorded weights, buffers and modes into a module.

    Each tensor gets its recorded dtype.

    Args:
        module: Changed in place, or not at all if this raises.
        bundle: Bundle that holds the weights.
        device: Device to move the module to.

    Raises:
        ReplayError: If the bundle holds no weights, or the module's parameters do not match them.
    """
    weights = bundle["weights"]
    if weights is None:
        why = "; ".join([*bundle["left_out"], *bundle["notes"]]) or "they were not kept"
        raise ReplayError(f"the record holds no weights to replay with: {why}")
    own = _parameters(module)
    differences = [f"{name} is missing" for name in weights if name not in own]
    differences += [f"{name} is not in the record" for name in own if name not in weights]
    differences += [
        f"{name} has shape {list(own[name].shape)}, recorded {list(weights[name].shape)}"
        for name in weights
        if name in own and own[name].shape != weights[name].shape
    ]
    if differences:
        more = f" and {len(differences) - 3} more differences" if len(differences) > 3 else ""
        raise ReplayError(
            f"the module's parameters do not match the record: {', '.join(differences[:3])}{more}; "
            "build it with the class and the arguments of the recorded run"
        )
    module.to(device)
    frozen, evaluated = set(bundle["module"].get("frozen", ())), set(bundle["module"].get("evaluated", ()))
    for name, parameter in _parameters(module).items():
        # Lightning builds a module in the precision of the run; here it was built in full precision.
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
    """Return parameters and buffers by their recorded names."""
    return select([*module.named_parameters(), *module.named_buffers()], None)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    named = list(module.named_parameters())
    return select(named, None) if named else {}
