"""Follow calls of layers, by module or function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Names of functions of `torch`, of `torch.nn.functional` and of `Tensor`, without underscores around them.
_PRODUCTS = frozenset({"linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))})
_MATMULS = frozenset({"matmul", "mm", "addmm", "__matmul__"})
_ACTIVATIONS = frozenset({
    "relu", "relu6", "threshold", "leaky_relu", "prelu", "rrelu", "gelu", "silu", "elu", "celu", "selu", "mish",
    "hardswish", "softplus", "sigmoid", "expit", "special_expit", "hardsigmoid", "logsigmoid", "log_sigmoid",
    "tanh", "hardtanh", "softsign", "erf", "special_erf", "atan", "arctan",
})  # fmt: skip
NORMALISATIONS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})
#: Functions whose result still counts as the output of the layer that they were applied to.
_PASSES = NORMALISATIONS | {
    "add", "__add__", "__radd__", "__iadd__", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "flatten", "view", "reshape", "transpose", "permute", "contiguous", "squeeze", "unsqueeze", "clone",
}  # fmt: skip
_SEEN = _PRODUCTS | _MATMULS | _ACTIVATIONS | _PASSES

#: Uses of a weight in one pass from which they count as a loop.
LOOP = 4

Function = Callable[..., Any]


class LayerCall(NamedTuple):
    """One call of a layer.

    Attributes:
        number: Index of the call in the pass, from 0.
        input: The tensor that the layer was applied to.
        weight: Its weight.
        bias: Its bias, if it has one.
    """

    number: int
    input: Tensor
    weight: Tensor
    bias: Tensor | None


class LayerMode(TorchFunctionMode):
    """Mode that follows layer outputs to their activations.

    A matrix product is a layer if an operand is one of the parameters; a bias that is added separately belongs to it.
    The inside of a fused function (attention, a recurrent layer) is not visible. Numbering restarts each time the mode
    is entered.

    Args:
        module: The module whose parameters make a product a layer.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._count = 0
        # By the id of an output; the tensor is held so that its id is not reused.
        self._outputs: dict[int, tuple[Tensor, LayerCall]] = {}

    def __enter__(self) -> LayerMode:
        self._count = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._outputs.clear()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def on_layer(self, call: LayerCall, function: Function) -> Tensor:
        """Return a layer's output; ``function`` takes its input."""
        out: Tensor = function(call.input)
        return out

    def on_activation(self, call: LayerCall, name: str, function: Function, x: Tensor) -> Tensor:
        """Return the activation; ``function`` takes the layer's output."""
        out: Tensor = function(x)
        return out

    def on_normalisation(self, call: LayerCall) -> None:
        """Handle the normalization of a layer's output."""

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = name if name.startswith("__") else name.strip("_")  # `threshold` calls itself `_threshold`
        if name not in _SEEN or not args:
            return func(*args, **kwargs)
        operands = self._operands(name, args, kwargs)
        if operands is not None:
            place, weight, bias = operands
            call = LayerCall(self._count, args[place], weight, bias)
            self._count += 1
            out = self.on_layer(call, lambda x: func(*args[:place], x, *args[place + 1 :], **kwargs))
            return self._remember(out, call)
        if id(args[0]) not in self._outputs:
            return func(*args, **kwargs)
        call = self._outputs[id(args[0])][1]
        if name in _ACTIVATIONS:
            return self.on_activation(call, name, lambda x: func(x, *args[1:], **kwargs), args[0])
        if name in NORMALISATIONS:
            self.on_normalisation(call)
        return self._remember(func(*args, **kwargs), call)

    def name_of(self, value: Any) -> str | None:
        """Return a parameter's name, also of its transpose."""
        return self._names.get(id(value)) or self._names.get(id(getattr(value, "_base", None)))

    def _operands(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, Tensor, Tensor | None] | None:
        """Return input index, weight and bias, or None."""
        if name in _PRODUCTS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            return 0, weight, args[2] if len(args) > 2 else kwargs.get("bias")
        if name not in _MATMULS:
            return None
        bias, first = (args[0], 1) if name == "addmm" else (None, 0)
        for place, other in ((first, first + 1), (first + 1, first)):
            if len(args) > first + 1 and self.name_of(args[other]) is not None:
                return place, args[other], bias
        return None

    def _remember(self, out: Any, call: LayerCall) -> Any:
        if isinstance(out, Tensor):
            self._outputs[id(out)] = (out, call)
        return out


@dataclass
class LayerStructure:
    """Structure of a forward pass, by layer call.

    Attributes:
        weights: Names of the weight and of the bias of each layer that was called; None for what is no parameter.
        square: Layers whose output has the shape of their input.
        activated: Layers whose output goes into an activation.
        normalised: Layers whose output goes into a normalization.
        activations: Names of the activations that follow a layer, one entry for each call.
    """

    weights: list[tuple[str | None, str | None]] = field(default_factory=list)
    square: set[int] = field(default_factory=set)
    activated: set[int] = field(default_factory=set)
    normalised: set[int] = field(default_factory=set)
    activations: list[str] = field(default_factory=list)

    @property
    def repeated(self) -> frozenset[str]:
        """Weights of a recurrence written as a loop."""
        times = Counter(weight for weight, _ in self.weights if weight is not None)
        return frozenset(name for name, count in times.items() if count >= LOOP)

    @property
    def last(self) -> int:
        """Number of the output layer; -1 without layers."""
        return len(self.weights) - 1


class StructureRecorder(LayerMode):
    """Mode that records a pass and changes nothing.

    Attributes:
        structure: The structure of the newest pass.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.structure = LayerStructure()

    def __enter__(self) -> LayerMode:
        self.structure = LayerStructure()
        return super().__enter__()

    def on_layer(self, call: LayerCall, function: Function) -> Tensor:
        """Record a layer's weights and shape."""
        out = super().on_layer(call, function)
        self.structure.weights.append((self.name_of(call.weight), self.name_of(call.bias)))
        if out.shape == call.input.shape:
            self.structure.square.add(call.number)
        return out

    def on_activation(self, call: LayerCall, name: str, function: Function, x: Tensor) -> Tensor:
        """Record an activation."""
        self.structure.activated.add(call.number)
        self.structure.activations.append(name)
        return super().on_activation(call, name, function, x)

    def on_normalisation(self, call: LayerCall) -> None:
        """Record a normalization."""
        self.structure.normalised.add(call.number)
