"""Measure gradients over depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from torch import Tensor

from lightning_gradguard.stats.samples import dead_row_share
from lightning_gradguard.stats.trends import MIN_LAYERS

#: Layers of a profile that slopes are taken between; a deeper profile is thinned out evenly.
_MAX_LAYERS = 100


def whole_profile(parameters: Mapping[str, Tensor], layers: Iterable[str]) -> list[float]:
    """Return log10(‖g‖/‖w‖) of each layer, decades.

    A decade is a factor of ten. A weight norm below a tenth of what a usual initialization gives counts as that tenth.

    Args:
        parameters: Parameters by name, with their gradients.
        layers: Names of the layers' weights, input first.

    Returns:
        One number for each layer: -inf for a gradient that is zero or missing, inf for one that is not finite, NaN for
        a layer that is not among the parameters.
    """
    return [_decades(parameters.get(name)) for name in layers]


def layer_profile(parameters: Mapping[str, Tensor], layers: Iterable[str]) -> list[float]:
    """Return the finite entries of `whole_profile`."""
    return [decades for decades in whole_profile(parameters, layers) if math.isfinite(decades)]


def depth_tilt(profile: Sequence[float]) -> float | None:
    """Return the depth tilt of a profile, decades.

    By so much gradients rise from input to output. None with fewer than four layers. The same statistic as
    `stats.trends.depth_tilt`, of one step and on the host: the number of layers less one, times the median slope
    between pairs of layers.

    Args:
        profile: log10(‖g‖/‖w‖) of the layers that get a gradient, input first.

    >>> depth_tilt([-6.0, -4.0, -2.0, 0.0])
    6.0
    """
    if len(profile) < MIN_LAYERS:
        return None
    stride = 1 + (len(profile) - 1) // _MAX_LAYERS
    points = list(enumerate(profile))[::stride]
    slopes = sorted((b - a) / (j - i) for (i, a), (j, b) in combinations(points, 2))
    return (len(profile) - 1) * slopes[(len(slopes) - 1) // 2]


def dead_shares(parameters: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, float]:
    """Return each layer's share of dead output rows.

    A row is dead if its gradient is exactly zero.

    Args:
        parameters: Parameters by name, with their gradients.
        layers: Names of the layers' weights.

    Returns:
        Shares from 0 to 1 by name, without layers that have no gradient or no rows.
    """
    gradients = {name: parameters[name].grad for name in layers if name in parameters}
    return {
        name: float(dead_row_share(gradient))
        for name, gradient in gradients.items()
        if gradient is not None and len(gradient)
    }


def dead_share(parameters: Mapping[str, Tensor], layers: Iterable[str]) -> float:
    """Return the largest of `dead_shares`, or 0."""
    return max(dead_shares(parameters, layers).values(), default=0.0)


def _decades(weight: Tensor | None) -> float:
    if weight is None:
        return math.nan
    gradient = 0.0 if weight.grad is None else float(weight.grad.detach().float().norm())
    if not 0 < gradient < math.inf:
        return math.inf if gradient else -math.inf
    floor = 0.1 * math.sqrt(weight.numel() / max(weight[0].numel(), 1))
    return math.log10(gradient / max(float(weight.detach().float().norm()), floor))
