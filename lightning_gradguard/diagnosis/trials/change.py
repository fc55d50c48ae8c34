"""Make changes to batches and forward passes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradguard.diagnosis.trials.operation_patch import OperationPatch
from lightning_gradguard.introspection.batch import inputs_and_targets, map_tensors, tensors_of
from lightning_gradguard.introspection.layer_calls import Function, LayerCall, LayerMode, LayerStructure

#: Fewest examples of a batch that is halved, or whose features are standardized one by one.
MIN_EXAMPLES = 8


class Part(IntEnum):
    """Part of a training that a change touches, smallest change first."""

    SETTING = 1
    """A number of the optimizer, or a line that prepares the data."""
    INITIALIZATION = 2
    """The weights at the start; the model stays as it is."""
    OPERATION = 3
    """A layer, an activation or an operation, replaced by another of its kind."""
    NORMALIZATION = 4
    """A normalization is added to the layers."""
    ARCHITECTURE = 5
    """The paths that the data take through the model."""


def _touches(part: Part) -> dict[str, Part]:
    """Return the metadata of a field."""
    return {"part": part}


@dataclass(frozen=True)
class Change:
    """Change of a training; the default changes nothing.

    Each field is one thing that can be changed, so that changes combine. It says which part of the training it touches.

    Attributes:
        activation: Name in `torch.nn.functional` of the function that replaces each layer's activation.
        slope: Slope of the negative side of a leaky ReLU.
        normalise: Normalize each layer's output; in a residual block its input.
        skip: Add each layer's input to the output of its activation, where the shapes are the same.
        shorten: Leave out every other layer whose output has the shape of its input.
        initialise: "he", "xavier", or "orthogonal" for recurrent weights; draws these weights again.
        gates: "GRU" or "LSTM" in place of each plain recurrent layer.
        input: Standardize the inputs, batch by batch.
        target: Standardize the targets, by the mean and standard deviation of the batch of the trial.
        lipschitz: Divide each layer by the spectral norm of its weights (arXiv:1802.05957), so that no slope exceeds 1.
        rate: Factor of the learning rate.
        decay: Factor of the weight decay.
        momentum: Momentum in place of the optimizer's own.
        operation: Replacement of one operation, or of a tensor of the module.
        batch: "fill" replaces NaN and Inf in the batch by 0; "drop" leaves out rows that hold them.
    """

    activation: str | None = field(default=None, metadata=_touches(Part.OPERATION))
    slope: float = 0.1
    normalise: bool = field(default=False, metadata=_touches(Part.NORMALIZATION))
    skip: bool = field(default=False, metadata=_touches(Part.ARCHITECTURE))
    shorten: bool = field(default=False, metadata=_touches(Part.ARCHITECTURE))
    initialise: str | None = field(default=None, metadata=_touches(Part.INITIALIZATION))
    gates: str | None = field(default=None, metadata=_touches(Part.OPERATION))
    input: bool = field(default=False, metadata=_touches(Part.SETTING))
    target: bool = field(default=False, metadata=_touches(Part.SETTING))
    lipschitz: bool = field(default=False, metadata=_touches(Part.NORMALIZATION))
    rate: float = field(default=1.0, metadata=_touches(Part.SETTING))
    decay: float = field(default=1.0, metadata=_touches(Part.SETTING))
    momentum: float | None = field(default=None, metadata=_touches(Part.SETTING))
    operation: OperationPatch | None = field(default=None, metadata=_touches(Part.OPERATION))
    batch: str | None = field(default=None, metadata=_touches(Part.SETTING))

    @property
    def fields(self) -> frozenset[str]:
        """Names of the fields that are set."""
        plain = Change()
        return frozenset(
            f.name
            for f in dataclasses.fields(self)
            if f.name != "slope" and getattr(self, f.name) != getattr(plain, f.name)
        )

    @property
    def size(self) -> tuple[Part, ...]:
        """Parts of the training that change, largest first; sizes compare as these tuples do.

        So one larger part outweighs any number of smaller ones, and of two changes of the same parts the one that
        changes more is larger.

        >>> Change(rate=0.1).size < Change(initialise="he").size < Change(activation="relu").size
        True
        >>> Change(activation="relu", initialise="he").size < Change(normalise=True).size < Change(skip=True).size
        True
        """
        fields = [f for f in dataclasses.fields(self) if f.name in self.fields]
        return tuple(sorted((f.metadata["part"] for f in fields), reverse=True))

    @property
    def changes_forward(self) -> bool:
        """True if functions of the forward pass change."""
        return bool(self.fields & {"activation", "normalise", "skip", "shorten", "lipschitz"})

    def __or__(self, other: Change) -> Change:
        """Combine two changes.

        Raises:
            ValueError: If both change the same field.
        """
        both = self.fields & other.fields
        if both:
            raise ValueError(
                f"changes can be combined only if they differ: both change {', '.join(sorted(both))}"
            )
        return dataclasses.replace(self, **{name: getattr(other, name) for name in other.fields})


class Scale(NamedTuple):
    """Mean and standard deviation of a tensor."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of_targets(cls, batch: Any) -> Scale | None:
        """Return the scale of floating-point targets, or None."""
        target = inputs_and_targets(batch)[1]
        return None if target is None else cls.of_tensor(target)

    @classmethod
    def of_tensor(cls, x: Tensor) -> Scale:
        """Return the scale of a tensor's finite elements."""
        x = x.detach().float()
        x = x[x.isfinite()]
        return cls(x.mean(), x.std(unbiased=False).clamp(min=torch.finfo(torch.float32).tiny))

    @classmethod
    def of_features(cls, x: Tensor) -> Scale:
        """Return the scale of each column, if possible."""
        if x.ndim != 2 or len(x) < MIN_EXAMPLES or not bool(x.isfinite().all()):
            return cls.of_tensor(x)
        x = x.detach().float()
        deviation = x.std(0, unbiased=False)
        # A feature that never changes is only shifted.
        return cls(x.mean(0), torch.where(deviation > 0, deviation, torch.ones_like(deviation)))

    def apply(self, x: Tensor) -> Tensor:
        """Standardize a tensor."""
        return ((x - self.mean) / self.deviation).to(x.dtype)


def prepare_batch(batch: Any, change: Change, target_scale: Scale | None = None) -> Any:
    """Standardize inputs or targets, as the change says.

    Args:
        batch: Nested containers of tensors; see `inputs_and_targets` for which are the inputs and the targets.
        change: The change of the trial.
        target_scale: Mean and standard deviation of the targets, if these are standardized.
    """
    inputs, target = inputs_and_targets(batch)
    replaced: dict[int, Tensor] = {}
    if change.input and inputs is not None:
        replaced[id(inputs)] = Scale.of_features(inputs).apply(inputs)
    if change.target and target_scale is not None and target is not None:
        replaced[id(target)] = target_scale.apply(target)
    return map_tensors(batch, lambda tensor: replaced.get(id(tensor), tensor)) if replaced else batch


def half(batch: Any) -> Any:
    """Return every other example of a batch.

    A small batch, and one whose tensors differ in length, is returned whole.

    Args:
        batch: Nested containers of tensors, examples along the first dimension.
    """
    lengths = {len(tensor) for _, tensor in tensors_of(batch) if tensor.ndim}
    if len(lengths) != 1 or min(lengths) < MIN_EXAMPLES:
        return batch
    return map_tensors(batch, lambda tensor: tensor[::2] if tensor.ndim else tensor)


class SwappedForward(LayerMode):
    """Mode that changes the forward pass.

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
        """Run a layer with the changes around it."""
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
        """Run an activation, or its replacement."""
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
    """Normalize a tensor as a new layer does.

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
