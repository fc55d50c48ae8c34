"""Changes of the forward pass: activations, normalization, skips, depth, bounded slopes; the module is unchanged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.introspection.layer_calls import Function, LayerCall, LayerMode, LayerStructure


class SwappedForward(LayerMode):
    """Mode in which the forward pass runs with a change.

    The last layer of the pass makes the output. It stays as it is, and so does an activation after it, which belongs to
    the loss; only with residual blocks its input is normalized.

    Args:
        module: The module that will run.
        change: The change to make.
        structure: The structure of the unchanged pass.
    """

    def __init__(self, module: nn.Module, change: Change, structure: LayerStructure) -> None:
        super().__init__(module)
        self._change, self._structure = change, structure
        inner = [i for i in sorted(structure.square) if i < structure.last]
        self._skipped = frozenset(inner if change.skip else ())
        self._dropped = frozenset(inner[1::2] if change.shorten else ())

    def on_layer(self, call: LayerCall, function: Function) -> Tensor:
        """Run a layer with the changes before and after it."""
        if call.number in self._dropped:
            return call.input * 1  # a new tensor, by which its activation is recognized
        x = call.input
        blocks = self._change.normalise and bool(self._skipped)
        if blocks and (call.number in self._skipped or call.number == self._structure.last):
            x = normalised(x, call.weight, by_example=call.weight.ndim <= 2)
        out: Tensor = function(x)
        if self._change.lipschitz:
            out = out / torch.linalg.matrix_norm(call.weight.flatten(1).float(), 2).to(out.dtype)
        if call.number >= self._structure.last:
            return out
        if self._change.normalise and not blocks and call.number not in self._structure.normalised:
            out = normalised(out, call.weight)
        if call.number not in self._structure.activated:
            out = self._add_skip(call, out)
        return out

    def on_activation(self, call: LayerCall, name: str, function: Function, x: Tensor) -> Tensor:
        """Run the activation, or the one that replaces it."""
        if call.number >= self._structure.last:
            return super().on_activation(call, name, function, x)
        if call.number in self._dropped:
            return x
        kind = self._change.activation
        if kind == "leaky_relu":
            out = F.leaky_relu(x, self._change.slope)
        else:
            out = function(x) if kind is None else getattr(F, kind)(x)
        return self._add_skip(call, out)

    def _add_skip(self, call: LayerCall, out: Tensor) -> Tensor:
        return out + call.input if call.number in self._skipped and out.shape == call.input.shape else out


def normalised(x: Tensor, weight: Tensor, *, by_example: bool = False) -> Tensor:
    """Bring a tensor to zero mean and unit variance, as a new normalization layer does.

    Each feature or channel is normalized over the batch. A sequence is normalized over the features of each step, and a
    batch of one example over its features.

    Args:
        x: Output or input of a layer.
        weight: Weight of the layer; that of a convolution has three dimensions or more.
        by_example: Normalize each example over its features, whatever the batch.
    """
    convolution = weight.ndim > 2
    if (convolution or x.ndim == 2) and len(x) > 1 and not by_example:
        return F.batch_norm(x, None, None, training=True)
    return F.group_norm(x, 1) if convolution else F.layer_norm(x, x.shape[-1:])
