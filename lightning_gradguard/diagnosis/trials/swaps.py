"""Swaps in the forward pass: activations, normalisation, skips, depth, bounds; the module itself stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradguard.diagnosis.trials.change import Change
from lightning_gradguard.introspection.layer_calls import Call, Function, Layers, Plan


class Swaps(Layers):
    """A forward pass with a change in it, while it is active.

    The last layer of the pass makes the output. It is left as it is, and so is an activation after it, which
    belongs to the loss; only the last residual block's output is normalised for it.

    Args:
        module: What will run.
        change: What to change.
        plan: What the unchanged pass showed.
    """

    def __init__(self, module: nn.Module, change: Change, plan: Plan) -> None:
        super().__init__(module)
        self._change, self._plan = change, plan
        inner = [i for i in sorted(plan.square) if i < plan.last]
        self._skipped = frozenset(inner if change.skip else ())
        self._dropped = frozenset(inner[1::2] if change.shorten else ())

    def on_layer(self, call: Call, function: Function) -> Tensor:
        """The layer, with what belongs before and after it."""
        if call.number in self._dropped:
            return call.input * 1  # a tensor of its own, by which its activation is known
        x = call.input
        blocks = self._change.normalise and bool(self._skipped)
        if blocks and (call.number in self._skipped or call.number == self._plan.last):
            x = normalised(x, call.weight, by_example=call.weight.ndim <= 2)
        out: Tensor = function(x)
        if self._change.lipschitz:
            out = out / torch.linalg.matrix_norm(call.weight.flatten(1).float(), 2).to(out.dtype)
        if call.number >= self._plan.last:
            return out
        if self._change.normalise and not blocks and call.number not in self._plan.normalised:
            out = normalised(out, call.weight)
        if call.number not in self._plan.activated:
            out = self._add_skip(call, out)
        return out

    def on_activation(self, call: Call, name: str, function: Function, x: Tensor) -> Tensor:
        """The activation, or the one in its place."""
        if call.number >= self._plan.last:
            return super().on_activation(call, name, function, x)
        return x if call.number in self._dropped else self._add_skip(call, self._activate(function, x))

    def _add_skip(self, call: Call, out: Tensor) -> Tensor:
        return out + call.input if call.number in self._skipped and out.shape == call.input.shape else out

    def _activate(self, function: Function, x: Tensor) -> Tensor:
        kind = self._change.activation
        if kind == "leaky_relu":
            return F.leaky_relu(x, self._change.slope)
        out: Tensor = function(x) if kind is None else getattr(F, kind)(x)
        return out


def normalised(x: Tensor, weight: Tensor, *, by_example: bool = False) -> Tensor:
    """Zero mean and unit variance, as a normalisation layer begins.

    Of each feature or channel over the batch; of each step over its features in sequences, and of each example where
    there is but one.

    Args:
        x: Output or input of a layer.
        weight: The layer's; a convolution's has three dimensions or more.
        by_example: Each example over its features, whatever the batch.
    """
    convolution = weight.ndim > 2
    if (convolution or x.ndim == 2) and len(x) > 1 and not by_example:
        return F.batch_norm(x, None, None, training=True)
    return F.group_norm(x, 1) if convolution else F.layer_norm(x, x.shape[-1:])
