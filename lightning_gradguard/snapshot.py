"""Copies of a training's state in the host's memory, and the way back to them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """Parameters, buffers and optimizer states as they are now.

    It takes the host's memory of one model with its optimizers, and one copy from the device. Of a sharded tensor each
    process keeps its own part. Learning rates and other settings of an optimizer are not part of it.

    Args:
        module: Whose parameters and buffers are kept.
        optimizers: Whose states are kept.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._parameters = [(tensor, _kept(tensor)) for tensor in module.parameters()]
        # By name, for a module may put a new tensor in a buffer's place.
        self._buffers = [
            (part._buffers, name, _kept(buffer))
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        self._states = [
            (
                optimizer,
                {p: _kept(optimizer.state[p]) for p in _parameters(optimizer) if p in optimizer.state},
            )
            for optimizer in optimizers
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Writes all of it back in place, and takes away the gradients; can be called again."""
        for tensor, kept in self._parameters:
            _local(tensor).copy_(_local(kept))
            tensor.grad = None
        for buffers, name, kept in self._buffers:
            _put_back(buffers, name, kept)
        for optimizer, states in self._states:
            for parameter in _parameters(optimizer):
                parameter.grad = None
                if parameter in states:
                    optimizer.state[parameter] = _returned(states[parameter], optimizer.state.get(parameter))
                else:  # it had taken no step yet
                    optimizer.state.pop(parameter, None)

    @property
    def nbytes(self) -> int:
        """Size in the host's memory."""
        kept = [kept for _, kept in self._parameters] + [kept for _, _, kept in self._buffers]
        kept += [states for _, states in self._states]
        return sum(t.numel() * t.element_size() for t in _inside(kept))


def lower_rates(
    optimizers: Iterable[torch.optim.Optimizer], schedulers: Iterable[Any], factor: float
) -> tuple[float, float]:
    """Multiplies all learning rates, those that schedulers begin from too, so that the next step does not undo it.

    Args:
        optimizers: Whose groups' ``lr`` are multiplied.
        schedulers: Learning-rate schedulers over them; chains and sequences of such as well.
        factor: Above 0.

    Returns:
        The largest learning rate before and after.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = max((float(group["lr"]) for group in groups), default=0.0)
    for group in groups:
        _multiply(group, "lr", factor)
        if "initial_lr" in group:
            _multiply(group, "initial_lr", factor)
    for scheduler in schedulers:
        for part in (scheduler, *getattr(scheduler, "_schedulers", ())):
            for name in ("base_lrs", "min_lrs", "max_lrs"):
                rates = getattr(part, name, None)
                if isinstance(rates, list):
                    setattr(part, name, [rate * factor for rate in rates])
            if isinstance(getattr(part, "_last_lr", None), list):
                part._last_lr = [float(group["lr"]) for group in part.optimizer.param_groups]
    return before, max((float(group["lr"]) for group in groups), default=0.0)


def _multiply(group: dict[str, Any], name: str, factor: float) -> None:
    if isinstance(group[name], Tensor):
        group[name].mul_(factor)  # a capturable optimizer's, which has to stay the same tensor
    else:
        group[name] = group[name] * factor


def _put_back(buffers: dict[str, Tensor | None], name: str, kept: Tensor) -> None:
    """Writes a buffer back, into the tensor that is there where that can be written to."""
    now = buffers.get(name)
    if now is None or _local(now).shape != kept.shape:
        return
    if now.is_inference():
        buffers[name] = kept.to(now.device, copy=True)
    elif not torch._debug_has_internal_overlap(_local(now)):  # one that is expanded holds what it held
        _local(now).copy_(kept)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


@torch.no_grad()
def _kept(value: Any) -> Any:
    """A copy in the host's memory, of tensors in containers too."""
    if isinstance(value, Tensor):
        return _local(value).detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _kept(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_kept(entry) for entry in value)
    return copy.deepcopy(value)


def _returned(kept: Any, now: Any) -> Any:
    """A kept value as an optimizer holds it: in the tensor that is there, or a new one of the kept shape."""
    if isinstance(kept, Tensor):
        if isinstance(now, Tensor):
            _local(now).copy_(kept)
            return now
        return kept.clone()
    if isinstance(kept, dict):
        held = now if isinstance(now, dict) else {}
        return {key: _returned(entry, held.get(key)) for key, entry in kept.items()}
    if isinstance(kept, (list, tuple)):
        known = isinstance(now, (list, tuple)) and len(now) == len(kept)
        return type(kept)(_returned(entry, now[i] if known else None) for i, entry in enumerate(kept))
    return copy.deepcopy(kept)


def _inside(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _inside(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _inside(entry)
