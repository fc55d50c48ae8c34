"""What is held of the step under way, should it be the last: its batches, random numbers and buffers from before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradguard.doctor.batch import tensors_of
from lightning_gradguard.recorder.randomness import Randomness, capture

#: Bytes of accumulated micro-batches that are held until their step; the oldest are let go.
HELD_BYTES = 256_000_000
#: Elements of a buffer above which it is not copied at every step: such a one is most often a constant.
LARGEST_BUFFER = 2**20


@dataclass(frozen=True)
class Held:
    """A batch that goes into the step.

    Attributes:
        batch: The batch itself, no copy.
        number: Its number.
        random: States of the random generators before its forward pass.
        versions: How often each of its tensors had been written to.
    """

    batch: Any
    number: int
    random: Randomness
    versions: tuple[int, ...]

    @property
    def is_changed(self) -> bool:
        """Whether a tensor of the batch was written to since."""
        return self.versions != _versions(self.batch)


@dataclass
class Window:
    """From the first forward pass that goes into a step to the step.

    Attributes:
        buffers: Copies of the module's buffers from before.
        held: The batches, oldest first.
        dropped: How many were let go.
        steps: Steps that the newest of them led to; by hand there may be several.
    """

    buffers: dict[str, Tensor]
    held: list[Held] = field(default_factory=list)
    dropped: int = 0
    steps: list[int] = field(default_factory=list)

    def add(self, batch: Any, number: int) -> None:
        """Takes in a batch before its forward pass."""
        self.held.append(Held(batch, number, capture(), _versions(batch)))
        if len(self.held) > 1:
            sizes = [sum(t.nbytes for _, t in tensors_of(h.batch)) for h in self.held]
            while len(self.held) > 1 and sum(sizes) > HELD_BYTES:
                self.held.pop(0)
                sizes.pop(0)
                self.dropped += 1


def copy_buffers(module: nn.Module, onto: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a module's buffers, by the names that it has them under, but for very large ones.

    Args:
        module: Whose.
        onto: Earlier copies that nobody needs any more, to be written to.
    """
    own = {name: b for name, b in module.named_buffers() if b.numel() <= LARGEST_BUFFER}
    kinds = [(b.shape, b.dtype) for b in own.values()]
    with torch.no_grad():
        if own.keys() != onto.keys() or kinds != [(b.shape, b.dtype) for b in onto.values()]:
            return {name: buffer.clone() for name, buffer in own.items()}
        if own:
            torch._foreach_copy_(list(onto.values()), list(own.values()))
    return onto


def _versions(batch: Any) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for _, t in tensors_of(batch))
