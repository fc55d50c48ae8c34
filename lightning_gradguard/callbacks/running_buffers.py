"""Running statistics of normalisations: a batch that is not finite must not outlive its step in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

#: Elements of a buffer above which it is no running statistic.
LARGEST_BUFFER = 2**20


class RunningBuffers:
    """What a module's small floating-point buffers were before a batch.

    A batch normalisation takes a batch into its running statistics in the forward pass, long before anybody can judge
    the step: one NaN there stays for ever, though the step is skipped and the weights are sound. So does a variance
    that overflows, of a batch whose gradients are finite. Infinity that was there before, as in a mask, stays.
    """

    def __init__(self) -> None:
        self._groups: list[list[Callable[[], Tensor | None]]] = []
        self._kept: list[tuple[list[torch.Size], Tensor] | None] = []

    def start(self, module: nn.Module) -> None:
        """Begins with these buffers."""
        groups: dict[tuple[torch.dtype, torch.device], dict[int, Callable[[], Tensor | None]]] = defaultdict(
            dict
        )
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and _may_be_a_statistic(buffer):
                    # By name, for a module may put a new tensor in its place.
                    groups[buffer.dtype, buffer.device].setdefault(
                        id(buffer), partial(part._buffers.get, name)
                    )
        self._groups, self._kept = [list(group.values()) for group in groups.values()], []

    @torch.no_grad()
    def keep(self) -> None:
        """Takes a copy before a batch; nothing is read from the device."""
        self._kept = []
        for group in self._groups:
            own = _now(group)
            self._kept.append(([b.shape for b in own], _flat(own)) if own else None)

    @torch.no_grad()
    def heal(self) -> None:
        """Puts back what has become not finite since; nothing is read from the device."""
        for group, before in zip(self._groups, self._kept, strict=False):
            own = _now(group)
            if before is None or [b.shape for b in own] != before[0]:
                continue
            flat, kept = _flat(own), before[1]
            sound = torch.where(torch.isfinite(flat) | ~torch.isfinite(kept), flat, kept)
            values = torch.split(sound, [buffer.numel() for buffer in own])
            # Through `data`: a graph that is still to be gone back through may have kept the buffer.
            torch._foreach_copy_(
                [b.data for b in own], [v.view_as(b) for v, b in zip(values, own, strict=True)]
            )


def _may_be_a_statistic(buffer: Tensor) -> bool:
    return (
        type(buffer) is Tensor
        and buffer.is_floating_point()
        and 0 < buffer.numel() <= LARGEST_BUFFER
        # One that is expanded, or from inference mode, cannot be written to.
        and buffer.is_contiguous()
        and not buffer.is_inference()
    )


def _now(group: list[Callable[[], Tensor | None]]) -> list[Tensor]:
    return [b for get in group if (b := get()) is not None and _may_be_a_statistic(b)]


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
