"""Depth profile: how gradients change from the first layer to the last, and the tilt of that."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradguard.stats.layout import Layout

#: Fewest layers for which a depth tilt means anything.
MIN_LAYERS = 4
#: Range of healthy depth tilts in decades. The lower end is the limit of `Exploding`; healthy trainings reach -1.56
#: (benchmarks/detection.md). The upper end is where `DepthTilt` clears; healthy trainings reach 2.27, and 2.58 in cases
#: that were held out (benchmarks/held_out.md).
HEALTHY_DEPTH_TILT = (-1.8, 2.5)


def offsets_and_tilt(profile: Tensor, live: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return each layer's distance from the middle one, and the tilt.

    Args:
        profile: float32 [P], log10(‖g‖/‖w‖) of each tensor, decades (factors of ten).
        live: Bool [P], tensors that count.
        layout: Gives the layers and their order.

    Returns:
        Distance in decades, float32 [P], NaN for what is no live layer; and `depth_tilt`, float32 [].
    """
    layered = torch.where(live & layout.is_layer, profile, torch.nan)
    return layered - torch.nanmedian(layered, 0).values, depth_tilt(profile, live, layout)


def depth_tilt(profile: Tensor, live: Tensor, layout: Layout) -> Tensor:
    """Return the depth tilt, float32 [].

    The decades (factors of ten) by which the profile rises from the first to the last layer. It is (L - 1) times the
    Theil-Sen slope over depth, the median of the slopes of pairs of layers, so that single odd layers do not matter.
    Positive: gradients shrink towards the input. NaN with fewer than four live layers.

    Args:
        profile: float32 [P], decades.
        live: Bool [P], tensors that count.
        layout: Gives the layers and their order.

    Source: Sen 1968, "Estimates of the regression coefficient based on Kendall's tau".
    """
    if layout.layers.numel() < MIN_LAYERS:
        return layout.constant(torch.nan)
    values, counts = profile[layout.layers], live[layout.layers]
    depth = torch.cumsum(counts, 0) - 1
    first, second = layout.pairs.long()
    rise = values[second] - values[first]
    slopes = torch.where(counts[first] & counts[second], rise / (depth[second] - depth[first]), torch.nan)
    total = counts.sum()
    return torch.where(total >= MIN_LAYERS, torch.nanmedian(slopes, 0).values * (total - 1), torch.nan)
