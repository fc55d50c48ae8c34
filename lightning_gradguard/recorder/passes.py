"""What goes into a pass of a replay, and what comes out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_gradguard.recorder.randomness import Randomness, from_plain


@dataclass(frozen=True)
class Part:
    """One batch of the step: that of one process, and one of those that were accumulated.

    Attributes:
        rank: The process.
        number: The batch's number.
        batch: Encoded.
        random: States of the random generators before its forward pass.
        buffers: Name to tensor, before the step's first forward pass.
        stop: Steps of optimizers that precede the one in question in this batch; None to run it to its end.
    """

    rank: int
    number: int
    batch: Any
    random: Randomness
    buffers: dict[str, Tensor]
    stop: int | None


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass showed.

    Attributes:
        loss: NaN where there was none.
        norms: Name of each tensor of the optimizer that got a gradient, to its L2 norm, unscaled.
        total: Their norm.
        finite: Whether loss and gradients are.
        tilt: Depth tilt, decades; None with too few layers that get a gradient.
        gap: Decades by which the lowest layer's log10(‖g‖/‖w‖) lies below the middle one; None without layers.
        time_tilt: From the first to the last tenth of a sequence, decades; None without one.
        dead: Largest share of a layer's rows without any gradient.
        drew: Whether random numbers were drawn.
        raised: Class of the error that ended it; empty if none did.
        first_bad: Index of the backward pass that was not finite.
    """

    loss: float = math.nan
    norms: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    finite: bool = True
    tilt: float | None = None
    gap: float | None = None
    time_tilt: float | None = None
    dead: float = 0.0
    drew: bool = False
    raised: str = ""
    first_bad: int | None = None


def parts_of(bundle: dict[str, Any]) -> list[Part]:
    """The batches that a bundle holds."""
    return [
        Part(
            rank=bundle["rank"],
            number=part["number"],
            batch=part["batch"],
            random=from_plain(part["random"]),
            buffers=bundle["buffers"],
            stop=part["stop"],
        )
        for part in bundle["parts"]
    ]
