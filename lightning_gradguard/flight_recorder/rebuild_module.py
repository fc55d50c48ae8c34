"""Builds the module of a bundle: the class that was named, from the recorded hyper-parameters."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.flight_recorder.bundle import ReplayError
from lightning_gradguard.flight_recorder.serialization import decode
from lightning_gradguard.stats.parameters import select


def build(spec: str, bundle: dict[str, Any], given: dict[str, Any]) -> nn.Module:
    """Imports a class, from the current folder too, and makes a module of it.

    Args:
        spec: Such as ``train:Model``; anything that can be called and returns a module will do.
        bundle: Its hyper-parameters are the arguments, as far as the class takes them.
        given: Further arguments, which come before the recorded ones.

    Raises:
        ReplayError: If it cannot be imported, called, or is no module.
    """
    kind = _find(spec)
    arguments = {**_recorded(bundle, kind), **given}
    try:
        module = kind(**arguments)
    except Exception as error:
        missing = bundle["hyper_parameters"].get("left_out", [])
        hint = f"; not plain, so not recorded: {', '.join(missing)}" if missing else ""
        raise ReplayError(
            f"{spec} could not be built from {', '.join(arguments) or 'no arguments'}: {type(error).__name__}: "
            f"{_line(error)}{hint}; give others with --args name=value"
        ) from error
    if not isinstance(module, nn.Module):
        raise ReplayError(f"{spec} must give a module, got {type(module).__name__}")
    return module


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Arguments as they are typed: ``name=value``, or one JSON object; a value that is no JSON is a string.

    Raises:
        ReplayError: If one is neither.

    >>> parse_arguments(["width=8", "kind=relu", '{"lr": 0.1}'])
    {'width': 8, 'kind': 'relu', 'lr': 0.1}
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if equals and name.isidentifier():
            arguments[name] = _value(value)
        elif isinstance(found := _value(text), dict):
            arguments.update(found)
        else:
            raise ReplayError(f"--args must be name=value or a JSON object, got {text!r}")
    return arguments


def _find(spec: str) -> Callable[..., Any]:
    name, _, path = spec.partition(":")
    if not name or not path:
        raise ReplayError(f"--module must be a module and a class, such as train:Model, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
        for part in path.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise ReplayError(f"{spec} could not be imported: {type(error).__name__}: {_line(error)}") from error
    if not callable(found):
        raise ReplayError(f"{spec} must be a class, got {found!r}")
    return found  # type: ignore[no-any-return]


def _recorded(bundle: dict[str, Any], kind: Callable[..., Any]) -> dict[str, Any]:
    """The hyper-parameters that a class takes, as Lightning hands them over."""
    kept = bundle["hyper_parameters"]
    values = {name: decode(value) for name, value in kept["values"].items()}
    argument = kept["argument"]
    taken: Any = {}
    with contextlib.suppress(TypeError, ValueError):
        taken = inspect.signature(kind).parameters
    if argument != "kwargs" and argument in taken:
        return {argument: values}
    plain = {name: value for name, value in values.items() if not name.startswith("_")}
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return plain
    return {name: value for name, value in plain.items() if name in taken}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


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
