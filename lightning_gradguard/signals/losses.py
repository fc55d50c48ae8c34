"""Running statistics of the loss, which tell whether a training makes progress."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gradguard.signals.stats import GradStats

if TYPE_CHECKING:
    from lightning_gradguard.signals.view import TrendState

_GAIN, _SLOW_GAIN = 0.05, 0.01
_FIRST = 5
_FIELDS = ("first_losses", "loss_start", "loss", "loss_spread", "slow_loss", "best_loss", "loss_steps")


def init(zero: Tensor) -> dict[str, Tensor]:
    """No loss yet.

    Args:
        zero: float32 [], on the device.
    """
    return {
        "first_losses": zero.new_full((_FIRST,), torch.nan),
        "loss_start": torch.full_like(zero, torch.nan),
        "loss": zero,
        "loss_spread": zero,
        "slow_loss": zero,
        "best_loss": torch.full_like(zero, torch.inf),
        "loss_steps": zero,
    }


def follow(stats: GradStats, state: TrendState) -> dict[str, Tensor]:
    """What is known after this step, of which one outlier moves little; as it was where no loss is given.

    Returns:
        First losses, float32 [5], their median, winsorised mean, mean absolute deviation, slower mean, lowest mean, and
        count, float32 [] each: fields of `TrendState`.
    """
    known = {name: getattr(state, name) for name in _FIELDS}
    if not stats.has_loss:
        return known
    number, before = stats.layout.constant, state.loss_steps
    count, offset = before + number(1.0), stats.loss - state.loss
    # The loss itself at least, or one that was constant could not be seen to move.
    reach = torch.maximum(number(3.0) * state.loss_spread, state.loss.abs())
    winsorised = torch.clamp(offset, -reach, reach)
    share = count.reciprocal()
    gain = torch.maximum(share, number(_GAIN))
    if stats.elapsed:
        # Each of the first losses comes with a closer look.
        places, begun = torch.arange(_FIRST, device=count.device), before < number(_FIRST)
        known["first_losses"] = torch.where(places == before, stats.loss, state.first_losses)
        known["loss_start"] = torch.nanmedian(known["first_losses"], 0).values
        winsorised = torch.where(begun, offset, winsorised)
    loss = torch.addcmul(state.loss, gain, winsorised)
    # The first offset is the loss itself, and no deviation.
    spread = state.loss_spread.lerp(winsorised.abs(), gain) * (before > number(0.0))
    settled = count >= number(_FIRST)
    return {
        **known,
        "loss": loss,
        "loss_spread": spread,
        "slow_loss": state.slow_loss.lerp(loss, torch.maximum(share, number(_SLOW_GAIN))),
        "best_loss": torch.where(settled, torch.minimum(state.best_loss, loss), state.best_loss),
        "loss_steps": count,
    }
