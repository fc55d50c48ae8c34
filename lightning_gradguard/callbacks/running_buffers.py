"""Copies of a module's small buffers.

They keep NaN and Inf out of running statistics, and go into flight records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

#: Elements above which a buffer is most often a constant, and never a running statistic; such a one is not copied.
LARGEST_BUFFER = 2**20


class RunningBuffers:
    """Small floating-point buffers from before a batch.

    Running means and variances are such buffers.

    A batch normalization adds a batch to its running statistics in the forward pass, before the step is judged. One NaN
    there stays for ever, although the step is skipped. So does a variance that overflows, even if the gradients are
    finite. Infinity that was there before the batch, as in a mask, stays.
    """

    def __init__(self) -> None:
        # Buffers of one dtype and device, and their flat copy with the shapes.
        self._groups: list[list[Callable[[], Tensor | None]]] = []
        self._copies: list[tuple[list[torch.Size], Tensor] | None] = []

    def start(self, module: nn.Module) -> None:
        """Find the buffers of a module."""
        groups: dict[tuple[torch.dtype, torch.device], dict[int, Callable[[], Tensor | None]]]
        groups = defaultdict(dict)
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and _may_be_a_statistic(buffer):
                    # By name, since a module may put a new tensor in its place.
                    group = groups[buffer.dtype, buffer.device]
                    group.setdefault(id(buffer), partial(part._buffers.get, name))
        self._groups, self._copies = [list(group.values()) for group in groups.values()], []

    @torch.no_grad()
    def save(self) -> None:
        """Copy the buffers, without reading the device."""
        self._copies = []
        for group in self._groups:
            own = _current(group)
            self._copies.append(([b.shape for b in own], _flat(own)) if own else None)

    @torch.no_grad()
    def restore_nonfinite(self) -> None:
        """Restore non-finite elements, without reading the device.

        Only elements that were finite before the batch are restored.
        """
        for group, saved in zip(self._groups, self._copies, strict=False):
            own = _current(group)
            if saved is None or [b.shape for b in own] != saved[0]:
                continue
            now, before = _flat(own), saved[1]
            kept = torch.where(torch.isfinite(now) | ~torch.isfinite(before), now, before)
            values = torch.split(kept, [buffer.numel() for buffer in own])
            # Through `data`, since a graph that has yet to run backward may have saved the buffer.
            torch._foreach_copy_(
                [b.data for b in own], [v.view_as(b) for v, b in zip(values, own, strict=True)]
            )


def copy_buffers(module: nn.Module, onto: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of small buffers, by name.

    Args:
        module: The module.
        onto: Earlier copies that are no longer needed; they are overwritten if they fit.
    """
    own = {name: b for name, b in module.named_buffers() if b.numel() <= LARGEST_BUFFER}
    kinds = [(b.shape, b.dtype) for b in own.values()]
    with torch.no_grad():
        if own.keys() != onto.keys() or kinds != [(b.shape, b.dtype) for b in onto.values()]:
            return {name: buffer.clone() for name, buffer in own.items()}
        if own:
            torch._foreach_copy_(list(onto.values()), list(own.values()))
    return onto


def _may_be_a_statistic(buffer: Tensor) -> bool:
    return (
        type(buffer) is Tensor
        and buffer.is_floating_point()
        and 0 < buffer.numel() <= LARGEST_BUFFER
        # An expanded tensor, or one from inference mode, cannot be written to.
        and buffer.is_contiguous()
        and not buffer.is_inference()
    )


def _current(group: list[Callable[[], Tensor | None]]) -> list[Tensor]:
    return [b for get in group if (b := get()) is not None and _may_be_a_statistic(b)]


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
