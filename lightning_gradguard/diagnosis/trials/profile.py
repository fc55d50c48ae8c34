"""How gradients run over depth and over time, from the gradients that lie on a module after one backward pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

#: Fewest layers, and steps of a sequence, for which a tilt is a statement.
MIN_LAYERS, MIN_TIMES = 4, 10
#: Depth tilts that count as healthy, in decades: within the limits of `Exploding` and `DepthTilt`.
HEALTHY = (-1.8, 2.5)
#: Layers of a profile that slopes are taken between; of more, evenly spaced ones.
_MOST_LAYERS = 100


def depth_tilt(profile: Sequence[float]) -> float | None:
    """Decades by which a profile rises from the input to the output; None with fewer than four layers.

    The number of layers less one, times the median slope between pairs of them: what the verdict rests on, see
    `signals.trends.depth_tilt`, of one step.

    Args:
        profile: log10(‖g‖/‖w‖) of the layers that get a gradient, input first.

    >>> depth_tilt([-6.0, -4.0, -2.0, 0.0])
    6.0
    """
    if len(profile) < MIN_LAYERS:
        return None
    stride = 1 + (len(profile) - 1) // _MOST_LAYERS
    points = list(enumerate(profile))[::stride]
    slopes = sorted((b - a) / (j - i) for (i, a), (j, b) in combinations(points, 2))
    return (len(profile) - 1) * slopes[(len(slopes) - 1) // 2]


def layer_profile(parameters: Mapping[str, Tensor], layers: Iterable[str]) -> list[float]:
    """log10(‖g‖/‖w‖) of each layer that gets a gradient, decades: those of `whole_profile` that count in a tilt."""
    return [decades for decades in whole_profile(parameters, layers) if math.isfinite(decades)]


def whole_profile(parameters: Mapping[str, Tensor], layers: Iterable[str]) -> list[float]:
    """log10(‖g‖/‖w‖) of each layer, decades.

    -inf where the gradient is zero or there is none, inf where it is not finite, NaN where there is no such layer.
    A weight norm below a tenth of what a usual initialisation gives counts as that.
    """
    return [_decades(parameters.get(name)) for name in layers]


def _decades(weight: Tensor | None) -> float:
    if weight is None:
        return math.nan
    gradient = 0.0 if weight.grad is None else float(weight.grad.detach().float().norm())
    if not 0 < gradient < math.inf:
        return math.inf if gradient else -math.inf
    floor = 0.1 * math.sqrt(weight.numel() / max(weight[0].numel(), 1))
    return math.log10(gradient / max(float(weight.detach().float().norm()), floor))


def dead_share(parameters: Mapping[str, Tensor], layers: Iterable[str]) -> float:
    """Largest share of a layer's output rows whose gradient is exactly zero; of layers that have one."""
    shares = [
        float((gradient.flatten(1) == 0).all(1).float().mean())
        for name in layers
        if (weight := parameters.get(name)) is not None and (gradient := weight.grad) is not None
    ]
    return max(shares, default=0.0)


class TimeProfile:
    """Gradient with respect to each step of the sequences that recurrent layers of a module take.

    Of a layer it is taken at its input, of a cell that is called once for each step at those inputs. Hooks are put on
    the module, so use it in a `sandbox`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms: list[Tensor] = []
        self._steps: dict[nn.Module, dict[int, Tensor]] = {}  # of a cell: number of the call -> norm
        self._calls: Counter[nn.Module] = Counter()
        for layer in module.modules():
            if isinstance(layer, nn.RNNBase):
                layer.register_forward_pre_hook(self._before)
            elif isinstance(layer, nn.RNNCellBase):
                layer.register_forward_pre_hook(self._before_cell)

    def tilt(self) -> float | None:
        """Decades from the first to the last tenth of the sequence; None if there was none."""
        calls = [torch.stack([own[i] for i in sorted(own)]) for own in self._steps.values()]
        norms = next((n for n in (*self._norms, *calls) if len(n) >= MIN_TIMES), None)
        self._norms, self._steps = [], {}
        self._calls.clear()
        if norms is None:
            return None
        tenth, tiny = max(1, len(norms) // 10), torch.finfo(torch.float32).tiny
        first, last = (part.mean().clamp(min=tiny) for part in (norms[:tenth], norms[-tenth:]))
        return float(torch.log10(last / first))

    def _before(self, layer: nn.RNNBase, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (args and isinstance(args[0], Tensor) and args[0].ndim == 3):
            return None
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)
        time = 1 if layer.batch_first else 0
        x.register_hook(  # type: ignore[no-untyped-call]
            lambda g: self._norms.append(g.detach().float().transpose(0, time).flatten(1).norm(dim=1))
        )
        return (x, *args[1:])

    def _before_cell(self, cell: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (args and isinstance(args[0], Tensor)):
            return None
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)
        x = x * 1  # one for each call, where all steps take the same input
        number = self._calls[cell]
        self._calls[cell] += 1

        def note(gradient: Tensor) -> None:
            self._steps.setdefault(cell, {})[number] = gradient.detach().float().norm()

        x.register_hook(note)  # type: ignore[no-untyped-call]
        return (x, *args[1:])
