"""All that is read of the tensors at one step; where they are spread over ranks, put together in one all-reduce."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.norms import local_norms, weight_norms
from lightning_gradguard.stats.samples import (
    dead_shares,
    dead_shares_from_rows,
    local_live_rows,
    local_lost_shares,
    local_sample,
    lost_shares,
    sample,
)
from lightning_gradguard.stats.sharding import Shards, mean_over_ranks, world_size


class Collected(NamedTuple):
    """What was read, the same on every rank; None for what was not due.

    Attributes:
        norms: float32 [P], their L2 norms.
        loss: float32 [], mean over ranks.
        time_tilt: float32 [], mean over the ranks that saw a sequence; NaN if none did.
        weights: float32 [P], L2 norm of each parameter.
        sample: float32 [P, SAMPLES], elements of each parameter, as `samples.sample` takes them.
        dead: float32 [P], as `samples.dead_shares`.
        lost: float32 [P], as `samples.lost_shares`.
    """

    norms: Tensor
    loss: Tensor | None
    time_tilt: Tensor | None
    weights: Tensor | None
    sample: Tensor | None
    dead: Tensor | None
    lost: Tensor | None


def collect(
    layout: Layout,
    gradients: tuple[Tensor | None, ...],
    loss: Tensor | None,
    time_tilt: Tensor | None = None,
    *,
    asked: bool = False,
    fresh: bool = False,
    sampled: bool = False,
) -> Collected:
    """Reads the gradients, and what else is due.

    Args:
        layout: The watched tensors.
        gradients: The P gradients, as `gradients_of` gives them.
        loss: Scalar loss of this rank, or None.
        time_tilt: What this rank saw of a sequence, if anything.
        asked: Whether all ranks were asked for it.
        fresh: Whether weight norms and the shares of dead rows and lost elements are due.
        sampled: Whether a sample of the weights is due.
    """
    norms = local_norms(gradients, layout)
    said = _Said(loss, time_tilt, asked)
    if layout.shards is not None:
        return _put_together(layout, layout.shards, gradients, norms, said, fresh, sampled)
    if world_size() > 1 and (asked or loss is not None):
        loss, time_tilt = said.heard(mean_over_ranks(said.numbers(norms.device)))
    return Collected(
        norms=norms,
        loss=loss,
        time_tilt=time_tilt,
        weights=weight_norms(layout) if fresh else None,
        sample=sample(layout) if sampled else None,
        dead=dead_shares(gradients, layout) if fresh else None,
        lost=lost_shares(gradients, layout) if fresh else None,
    )


def collect_sample(layout: Layout) -> Tensor:
    """`samples.sample` of the whole tensors; where they are spread, every rank has to call it."""
    if layout.shards is None:
        return sample(layout)
    return layout.shards.sum_over_ranks([local_sample(layout, layout.shards)])[0].to(torch.float32)


class _Said(NamedTuple):
    """What one rank alone knows of a step: its loss, and what it saw of a sequence if all were asked."""

    loss: Tensor | None
    time_tilt: Tensor | None
    asked: bool

    def numbers(self, device: torch.device) -> Tensor:
        """float32 [0 to 3], of one length on all ranks, whose means over ranks `heard` takes."""
        device = device if self.loss is None else self.loss.device
        said = [] if self.loss is None else [self.loss.detach().to(torch.float32).reshape(())]
        if self.asked:
            tilt = torch.tensor(torch.nan, dtype=torch.float32) if self.time_tilt is None else self.time_tilt
            tilt = tilt.to(device, torch.float32)
            known = ~tilt.isnan()
            said += [torch.where(known, tilt, 0.0), known.to(torch.float32)]
        return torch.stack(said) if said else torch.zeros(0, device=device, dtype=torch.float32)

    def heard(self, means: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Mean loss, and mean time tilt of those who saw a sequence."""
        loss = None if self.loss is None else means[0]
        return loss, means[-2] / means[-1] if self.asked else None


def _put_together(
    layout: Layout,
    shards: Shards,
    gradients: tuple[Tensor | None, ...],
    norms: Tensor,
    said: _Said,
    fresh: bool,
    sampled: bool,
) -> Collected:
    """Reads what this rank holds, and sums everything in one all-reduce."""
    parts = {
        "norms": shards.squares(norms),
        "said": said.numbers(norms.device).to(norms.device) / world_size(),
    }
    if fresh:
        parts["weights"] = shards.squares(local_norms(layout.parameters, layout))
        parts["live"] = local_live_rows(gradients, layout, shards)
        parts["lost"] = local_lost_shares(gradients, layout, shards)
    if sampled:
        parts["sample"] = local_sample(layout, shards)
    total = dict(zip(parts, shards.sum_over_ranks(list(parts.values())), strict=True))
    loss, tilt = said.heard(total["said"].to(torch.float32))
    return Collected(
        norms=total["norms"].sqrt().to(torch.float32),
        loss=loss,
        time_tilt=tilt,
        weights=total["weights"].sqrt().to(torch.float32) if fresh else None,
        sample=total["sample"].to(torch.float32) if sampled else None,
        dead=dead_shares_from_rows(total["live"], gradients, layout, shards) if fresh else None,
        lost=total["lost"].to(torch.float32) if fresh else None,
    )
