"""Running statistics of normalisations: a batch that is not finite must not outlive its step in them."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

#: Elements of a buffer above which it is no running statistic.
LARGEST_BUFFER = 2**20


class Buffers:
    """The newest finite value of every element of a module's small floating-point buffers.

    A batch normalisation takes a batch into its running statistics in the forward pass, long before anybody can judge
    the step: one NaN there stays for ever, though the step is skipped and the weights are sound.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[list[Tensor], Tensor]] = []

    @torch.no_grad()
    def start(self, module: nn.Module) -> None:
        """Begins with the buffers as they are."""
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for buffer in module.buffers():
            if type(buffer) is Tensor and buffer.is_floating_point() and 0 < buffer.numel() <= LARGEST_BUFFER:
                groups[buffer.dtype, buffer.device].append(buffer)
        self._groups = [(own, _flat(own)) for own in groups.values()]

    @torch.no_grad()
    def keep(self) -> None:
        """Takes in what is finite; nothing is read from the device."""
        self._groups = [
            (own, torch.where(torch.isfinite(flat := _flat(own)), flat, kept)) for own, kept in self._groups
        ]

    @torch.no_grad()
    def heal(self) -> None:
        """Puts the newest finite value where there is none; nothing is read from the device."""
        for own, kept in self._groups:
            parts = torch.split(kept, [b.numel() for b in own])
            for buffer, before in zip(own, parts, strict=True):
                buffer.copy_(torch.where(torch.isfinite(buffer), buffer, before.view_as(buffer)))


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
