"""Samples of what leaf modules give in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gradguard.introspection.probes import has_storage
from lightning_gradguard.stats.histogram import Samples, sample
from lightning_gradguard.stats.parameters import was_compiled
from lightning_gradguard.stats.sharding import is_sharded, local

#: Calls of one module in a pass that are sampled, the first ones.
MAX_CALLS = 8

#: Part of its range by which an output may differ from an end and still count as saturated.
NEAR = 0.01

#: Modules whose output says nothing that their input does not say.
_PASSES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
)
#: Modules whose units are the channels, which come after the batch.
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
#: Packages of modules that measure, such as losses.
_MEASURES = ("torchmetrics", "torch.nn.modules.loss")
#: Modules whose units are off where they give exactly zero.
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardswish)
_RANGES: dict[type[nn.Module], tuple[float, float]] = {
    nn.Sigmoid: (0.0, 1.0),
    nn.Hardsigmoid: (0.0, 1.0),
    nn.Tanh: (-1.0, 1.0),
    nn.Softsign: (-1.0, 1.0),
    nn.ReLU6: (-math.inf, 6.0),
}


#: `torch.jit.is_tracing`, which has no types.
_is_tracing: Callable[[], bool] = vars(torch.jit)["is_tracing"]


class Activations(NamedTuple):
    """Sampled outputs of one module.

    Attributes:
        calls: Samples of each call, one row each.
        saturated: Share of the elements that were read which lie within 1 % of the range from one of its ends,
            float32 []; None if the module has no such range.
        dead: Share of the units that gave zero for the whole batch, float32 []; None if the module is no rectifier. A
            unit is a channel of a convolution, else an entry of the last dimension.
    """

    calls: list[Samples]
    saturated: Tensor | None
    dead: Tensor | None


class ActivationProbe:
    """Hooks on leaf modules, which are there between `start` and `stop` alone.

    Compiled and scripted modules are left out: they refuse or ignore hooks, or are compiled again for each one. Modules
    that are added later are not seen, and a module with several names has the first one.

    A call whose output is of an unusual kind is left out: empty, nested, without numbers, or inside of a transform of
    `torch.func`. An error in a hook never reaches the training; the first one is kept.

    Args:
        module: The module.
        match: Returns True for the name of a module, and the module, that is wanted.
        max_samples: Largest number of elements read of each output; None reads all.

    Attributes:
        left_out: Names of compiled and scripted modules; "" is the module itself.
        error: The first error in a hook, or None.
    """

    def __init__(
        self, module: nn.Module, match: Callable[[str, nn.Module], bool], max_samples: int | None
    ) -> None:
        self._max_samples = max_samples
        self.left_out: list[str] = []
        self.error: Exception | None = None
        self._known: set[int] = set()
        self._leaves = [pair for pair in self._leaves_of(module, "") if match(*pair)]
        self._handles: list[Any] = []
        self._seen: dict[str, list[Samples]] = {}
        self._alive: dict[str, Tensor] = {}
        self._channels_first = False

    def start(self) -> None:
        """Add the hooks, and forget what was seen."""
        self.stop()
        self._seen, self._alive = {}, {}
        self._handles = [
            leaf.register_forward_hook(partial(self._observe, name)) for name, leaf in self._leaves
        ]

    def stop(self) -> None:
        """Remove the hooks; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> dict[str, Activations]:
        """Return what was seen by name of the module, in order of the first call, and forget it."""
        leaves, found = dict(self._leaves), {}
        for name, calls in self._seen.items():
            alive = self._alive.get(name)
            dead = None if alive is None else 1 - alive.float().mean()
            found[name] = Activations(calls, _saturated(leaves[name], calls), dead)
        self._seen, self._alive = {}, {}
        return found

    def _leaves_of(self, module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        """Yield leaf modules with their names, each once."""
        if id(module) in self._known:
            return
        self._known.add(id(module))
        is_scripted = isinstance(module, torch.jit.ScriptModule)
        if is_scripted or type(module).__name__ == "OptimizedModule" or was_compiled(module):
            self.left_out.append(name)
        elif _is_leaf(module):
            measures = type(module).__module__.startswith(_MEASURES)
            if name and not measures and not isinstance(module, _PASSES):
                yield name, module
        else:
            for child_name, child in module.named_children():
                yield from self._leaves_of(child, f"{name}.{child_name}" if name else child_name)

    def _observe(self, name: str, module: nn.Module, arguments: object, output: object) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(first, Tensor) or _is_tracing():
            return
        try:
            # Samples are ordinary tensors, also those of a teacher in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                # Of a sharded output this process reads its own part.
                values = local(first.detach()) if is_sharded(first) else first.detach()
                if type(values) is Tensor and has_storage(values):
                    self._add(name, module, values)
        except Exception as error:
            self.error = self.error or error

    def _add(self, name: str, module: nn.Module, values: Tensor) -> None:
        if not (values.is_floating_point() or values.is_complex()) or not values.ndim or not values.numel():
            return
        if len(self._seen.get(name, ())) < MAX_CALLS:
            samples = list(sample([values], max_samples=self._max_samples))
            self._seen.setdefault(name, []).extend(samples)
        if isinstance(module, _CONVOLUTIONS):
            self._channels_first = True
        elif isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding, nn.RNNBase)):
            self._channels_first = False
        if isinstance(module, _RECTIFIERS) and values.ndim > 1:
            unit = 1 if self._channels_first and values.ndim > 2 else values.ndim - 1
            alive = (values != 0).movedim(unit, -1).flatten(0, -2).any(dim=0)
            before = self._alive.get(name)
            same = before is not None and before.shape == alive.shape
            self._alive[name] = before | alive if same and before is not None else alive


def _is_leaf(module: nn.Module) -> bool:
    """Return True if a module has no parts but those that compute its weights."""
    return all(name == "parametrizations" for name, _ in module.named_children())


def _saturated(module: nn.Module, calls: list[Samples]) -> Tensor | None:
    """Return the share of sampled elements near an end of the module's range, float32 []."""
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        low, high = float(module.min_val), float(module.max_val)
    elif type(module) in _RANGES:
        low, high = _RANGES[type(module)]
    else:
        return None
    width = NEAR * (high - low) if math.isfinite(high - low) else NEAR * abs(high)
    near = torch.stack([((c.values <= low + width) | (c.values >= high - width)).sum() for c in calls]).sum()
    return near.float() / sum(c.values.numel() for c in calls)
