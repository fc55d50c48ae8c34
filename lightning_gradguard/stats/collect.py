"""Values read of the tensors at one step.

If the tensors are sharded, the values are summed over ranks in one all-reduce.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.stats.layout import Layout
from lightning_gradguard.stats.norms import local_norms, weight_norms
from lightning_gradguard.stats.samples import (
    dead_shares,
    dead_shares_from_rows,
    fed_elements,
    local_fed_elements,
    local_live_rows,
    local_lost_shares,
    local_sample,
    lost_shares,
    sample,
)
from lightning_gradguard.stats.sharding import Shards, mean_over_ranks, world_size


class Collected(NamedTuple):
    """Values of one step, equal on every rank.

    None stands for what was not due.

    Attributes:
        norms: float32 [P], L2 norms of the gradients.
        loss: float32 [], mean over ranks.
        time_tilt: float32 [], mean over the ranks that measured one; NaN if none did.
        weights: float32 [P], L2 norm of each parameter.
        sample: float32 [P, SAMPLES], elements of each parameter, as `samples.sample` takes them.
        dead: float32 [P], as `samples.dead_shares`.
        lost: float32 [P], as `samples.lost_shares`.
        fed: Bool [P, SAMPLES], as `samples.fed_elements`; None also without a parameter in half precision.
        guess: Comparison of the loss with a guess, float32 [] each, mean over the ranks that know it; NaN if none does.
    """

    norms: Tensor
    loss: Tensor | None
    time_tilt: Tensor | None
    weights: Tensor | None
    sample: Tensor | None
    dead: Tensor | None
    lost: Tensor | None
    fed: Tensor | None
    guess: tuple[Tensor, ...] | None = None


def collect(
    layout: Layout,
    gradients: tuple[Tensor | None, ...],
    loss: Tensor | None,
    time_tilt: Tensor | None = None,
    guess: tuple[Tensor, ...] | None = None,
    *,
    tilt_due: bool = False,
    refresh_due: bool = False,
    sample_due: bool = False,
    guess_due: bool = False,
) -> Collected:
    """Read the gradients, and what else is due.

    Collective if there are several ranks: each has to call it.

    Args:
        layout: The tracked tensors.
        gradients: The P gradients, from `gradients_of`.
        loss: Scalar loss of this rank, or None.
        time_tilt: Time tilt that this rank measured, or None.
        guess: This rank's comparison of its loss with a guess, or None.
        tilt_due: Whether a time tilt was to be measured, which all ranks know.
        refresh_due: Whether weight norms, dead rows and lost elements are due.
        sample_due: Whether a sample of the weights is due.
        guess_due: Whether the loss was to be compared with a guess, which all ranks know.
    """
    norms = local_norms(gradients, layout)
    own = _RankValues(loss, time_tilt, tilt_due, guess, guess_due)
    if layout.shards is not None:
        return _collect_sharded(layout, layout.shards, gradients, norms, own, refresh_due, sample_due)
    if world_size() > 1 and (tilt_due or guess_due or loss is not None):
        loss, time_tilt, guess = own.from_means(mean_over_ranks(own.numbers(norms.device)))
    return Collected(
        norms=norms,
        loss=loss,
        time_tilt=time_tilt,
        weights=weight_norms(layout) if refresh_due else None,
        sample=sample(layout) if sample_due else None,
        dead=dead_shares(gradients, layout) if refresh_due else None,
        lost=lost_shares(gradients, layout) if refresh_due else None,
        fed=fed_elements(gradients, layout) if refresh_due and layout.is_half else None,
        guess=guess,
    )


def collect_sample(layout: Layout) -> Tensor:
    """Return `samples.sample` of whole tensors.

    Collective if the tensors are sharded: every rank has to call it.
    """
    if layout.shards is None:
        return sample(layout)
    return layout.shards.sum_over_ranks([local_sample(layout, layout.shards)])[0].to(torch.float32)


class _RankValues(NamedTuple):
    """Values that each rank has of its own."""

    loss: Tensor | None
    time_tilt: Tensor | None
    tilt_due: bool
    guess: tuple[Tensor, ...] | None
    guess_due: bool

    def numbers(self, device: torch.device) -> Tensor:
        """Return the numbers to average, float32 [0 to 7]."""
        device = device if self.loss is None else self.loss.device
        numbers = [] if self.loss is None else [self.loss.detach().to(torch.float32).reshape(())]
        own = [self.time_tilt] if self.tilt_due else []
        own += [None, None] if self.guess_due and self.guess is None else []
        own += [*self.guess] if self.guess_due and self.guess is not None else []
        for value in own:
            if value is None:
                value = torch.full((), torch.nan, device=device)
            number = value.to(device, torch.float32).reshape(())
            known = ~number.isnan()
            numbers += [torch.where(known, number, 0.0), known.to(torch.float32)]
        return torch.stack(numbers) if numbers else torch.zeros(0, device=device, dtype=torch.float32)

    def from_means(self, means: Tensor) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...] | None]:
        """Return mean loss, mean time tilt and mean comparison with a guess."""
        loss = None if self.loss is None else means[0]
        rest = means[0 if self.loss is None else 1 :]
        tilt = rest[0] / rest[1] if self.tilt_due else None
        rest = rest[2 if self.tilt_due else 0 :]
        return loss, tilt, (rest[0] / rest[1], rest[2] / rest[3]) if self.guess_due else None


def _collect_sharded(
    layout: Layout,
    shards: Shards,
    gradients: tuple[Tensor | None, ...],
    norms: Tensor,
    own: _RankValues,
    refresh_due: bool,
    sample_due: bool,
) -> Collected:
    """Read this rank's part, and sum all parts."""
    parts = {
        "norms": shards.squares(norms),
        "own": own.numbers(norms.device).to(norms.device) / world_size(),
    }
    if refresh_due:
        parts["weights"] = shards.squares(local_norms(layout.parameters, layout))
        parts["live"] = local_live_rows(gradients, layout, shards)
        parts["lost"] = local_lost_shares(gradients, layout, shards)
        if layout.is_half:
            parts["fed"] = local_fed_elements(gradients, layout, shards)
    if sample_due:
        parts["sample"] = local_sample(layout, shards)
    total = dict(zip(parts, shards.sum_over_ranks(list(parts.values())), strict=True))
    loss, tilt, guess = own.from_means(total["own"].to(torch.float32))
    return Collected(
        norms=total["norms"].sqrt().to(torch.float32),
        loss=loss,
        time_tilt=tilt,
        weights=total["weights"].sqrt().to(torch.float32) if refresh_due else None,
        sample=total["sample"].to(torch.float32) if sample_due else None,
        dead=dead_shares_from_rows(total["live"], gradients, layout, shards) if refresh_due else None,
        lost=total["lost"].to(torch.float32) if refresh_due else None,
        fed=total["fed"] > 0 if "fed" in total else None,
        guess=guess,
    )
