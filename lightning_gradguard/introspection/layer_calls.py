"""Sees the layers and the activations of a forward pass as they are called, as functions or as modules alike."""

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
_ACTIVATIONS = frozenset(
    {
        *(
            "relu",
            "relu6",
            "threshold",
            "leaky_relu",
            "prelu",
            "rrelu",
            "gelu",
            "silu",
            "elu",
            "celu",
            "selu",
            "mish",
        ),
        *(
            "hardswish",
            "softplus",
            "sigmoid",
            "expit",
            "special_expit",
            "hardsigmoid",
            "logsigmoid",
            "log_sigmoid",
        ),
        *("tanh", "hardtanh", "softsign", "erf", "special_erf", "atan", "arctan"),
    }
)
_NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})
#: What a layer's output may pass through and still be that layer's output.
_PASSES = _NORMS | {
    *(
        "add",
        "__add__",
        "__radd__",
        "__iadd__",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
    ),
    *("flatten", "view", "reshape", "transpose", "permute", "contiguous", "squeeze", "unsqueeze", "clone"),
}
_SEEN = _PRODUCTS | _MATMULS | _ACTIVATIONS | _PASSES

#: Uses of a weight in one pass from which they are a loop.
LOOP = 4

Function = Callable[..., Any]


class Call(NamedTuple):
    """One layer's turn in a forward pass.

    Attributes:
        number: Its place in the pass, from 0.
        input: What it was applied to.
        weight: Its weight.
        bias: Its bias, if it has one.
    """

    number: int
    input: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass
class Plan:
    """What a forward pass showed; layers by their number.

    Attributes:
        weights: Names of the weight and of the bias of each layer that was called; None for what is no parameter.
        square: Layers whose output has the shape of their input.
        activated: Layers whose output goes into an activation.
        normalised: Layers whose output goes into a normalisation.
        activations: Names of the activations that follow a layer, one entry for each call.
    """

    weights: list[tuple[str | None, str | None]] = field(default_factory=list)
    square: set[int] = field(default_factory=set)
    activated: set[int] = field(default_factory=set)
    normalised: set[int] = field(default_factory=set)
    activations: list[str] = field(default_factory=list)

    @property
    def repeated(self) -> frozenset[str]:
        """Weights that are applied again and again: a recurrence that is written as a loop."""
        times = Counter(weight for weight, _ in self.weights if weight is not None)
        return frozenset(name for name, count in times.items() if count >= LOOP)

    @property
    def last(self) -> int:
        """Number of the last layer, which makes the output; -1 if there is none."""
        return len(self.weights) - 1


class Layers(TorchFunctionMode):
    """Follows each layer's output to its activation; subclasses may return something else.

    A matrix product is a layer where an operand is one of the parameters; a bias that is added by itself comes after
    it. What is inside of a fused function (attention, a recurrent layer) is not seen. Everything begins anew when it
    is entered.

    Args:
        module: Whose parameters are meant.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._count = 0
        self._outputs: dict[
            int, tuple[Tensor, Call]
        ] = {}  # the tensor is held so that its id is not given anew

    def __enter__(self) -> Layers:
        self._count = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._outputs.clear()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def on_layer(self, call: Call, function: Function) -> Tensor:
        """What a layer gives; ``function`` takes its input."""
        out: Tensor = function(call.input)
        return out

    def on_activation(self, call: Call, name: str, function: Function, x: Tensor) -> Tensor:
        """What an activation of a layer's output gives; ``function`` takes its input."""
        out: Tensor = function(x)
        return out

    def on_norm(self, call: Call) -> None:
        """A layer's output is normalised."""

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Sorts the calls."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = name if name.startswith("__") else name.strip("_")  # `threshold` calls itself `_threshold`
        if name not in _SEEN or not args:
            return func(*args, **kwargs)
        operands = self._operands(name, args, kwargs)
        if operands is not None:
            place, weight, bias = operands
            call = Call(self._count, args[place], weight, bias)
            self._count += 1
            return self._note(
                self.on_layer(call, lambda x: func(*args[:place], x, *args[place + 1 :], **kwargs)), call
            )
        if id(args[0]) not in self._outputs:
            return func(*args, **kwargs)
        call = self._outputs[id(args[0])][1]
        if name in _ACTIVATIONS:
            return self.on_activation(call, name, lambda x: func(x, *args[1:], **kwargs), args[0])
        if name in _NORMS:
            self.on_norm(call)
        return self._note(func(*args, **kwargs), call)

    def name_of(self, value: Any) -> str | None:
        """Name of a parameter, also of a transposed one; None if it is none."""
        return self._names.get(id(value)) or self._names.get(id(getattr(value, "_base", None)))

    def _operands(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, Tensor, Tensor | None] | None:
        """Place of a layer's input among the arguments, its weight and bias; None if this is no layer's call."""
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

    def _note(self, out: Any, call: Call) -> Any:
        if isinstance(out, Tensor):
            self._outputs[id(out)] = (out, call)
        return out


class Recorder(Layers):
    """Writes down a forward pass and changes nothing.

    Attributes:
        plan: Of the newest pass.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.plan = Plan()

    def __enter__(self) -> Layers:
        self.plan = Plan()
        return super().__enter__()

    def on_layer(self, call: Call, function: Function) -> Tensor:
        """Notes its weights, and whether a skip would fit."""
        out = super().on_layer(call, function)
        self.plan.weights.append((self.name_of(call.weight), self.name_of(call.bias)))
        if out.shape == call.input.shape:
            self.plan.square.add(call.number)
        return out

    def on_activation(self, call: Call, name: str, function: Function, x: Tensor) -> Tensor:
        """Notes it."""
        self.plan.activated.add(call.number)
        self.plan.activations.append(name)
        return super().on_activation(call, name, function, x)

    def on_norm(self, call: Call) -> None:
        """Notes it."""
        self.plan.normalised.add(call.number)
