"""Nets on vectors or pictures: chains, residual nets, convolutional nets, branches, experts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]
Init = Callable[[Tensor], object]


def he(gain: float = 1.0) -> Init:
    """Return a normal initialisation with variance gain² * 2 / fan-in."""
    return lambda w: nn.init.normal_(w, std=gain * math.sqrt(2 / w[0].numel()))


def xavier(gain: float = 1.0) -> Init:
    """Return a normal initialisation with variance gain² * 2 / (fan-in + fan-out)."""
    return lambda w: nn.init.xavier_normal_(w, gain)


def normal(std: float) -> Init:
    return lambda w: nn.init.normal_(w, std=std)


def orthogonal(gain: float = 1.0) -> Init:
    return lambda w: nn.init.orthogonal_(w, gain)


def scaled(sigma: float) -> Init:
    """Return a normal initialisation with variance sigma² / fan-in, the sigma_w of mean-field theory."""
    return lambda w: nn.init.normal_(w, std=sigma / math.sqrt(w[0].numel()))


def initialise(module: nn.Module, weight: Init | None = None, bias: float | None = None) -> None:
    """Initialise all weights (two dimensions or more) and all biases in place; None keeps torch's defaults."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2 and weight is not None:
                weight(parameter)
            elif name.endswith("bias") and bias is not None:
                parameter.fill_(bias)


class Chain(nn.Module):
    """Chain of ``depth`` equal layers and a head.

    Args:
        inputs: Number of features.
        outputs: Number of outputs.
        depth: Number of hidden layers.
        width: Width of the hidden layers.
        activation: Applied after each hidden layer.
        weight: Initialisation of all weights.
        bias: Initial value of all hidden biases.
        norm: Creates the normalisation after each hidden layer, before its activation.
        dropout: Share dropped after each hidden layer.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        depth: int,
        width: int = 32,
        activation: Activation = torch.relu,
        weight: Init | None = None,
        bias: float | None = None,
        norm: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [inputs] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.norms = nn.ModuleList(norm(width) for _ in range(depth)) if norm else None
        self.head = nn.Linear(width, outputs)
        self.activation, self.dropout = activation, dropout
        initialise(self.layers, weight, bias)
        initialise(self.head, weight)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.norms is not None:
                x = self.norms[i](x)
            x = self.activation(x)
            if self.dropout:
                x = F.dropout(x, self.dropout, self.training)
        return self.head(x)


class Residual(nn.Module):
    """Residual blocks of two linear layers.

    || ``norm`` comes before each layer; with ``zero`` each block starts as the identity.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        blocks: int,
        width: int = 32,
        norm: bool = True,
        zero: bool = False,
        weight: Init | None = None,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(blocks))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.last_norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, outputs)
        if weight is not None:
            initialise(self, weight)
        if zero:
            initialise(self.second, nn.init.zeros_, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, first, second in zip(self.norms, self.first, self.second, strict=True):
            x = x + second(torch.relu(first(norm(x))))
        return self.head(self.last_norm(x))


class ConvNet(nn.Module):
    """Chain of ``depth`` 3 x 3 convolutions of equal width, pooling over the picture, and a head."""

    def __init__(
        self,
        outputs: int,
        *,
        depth: int,
        width: int = 8,
        activation: Activation = torch.relu,
        weight: Init | None = None,
        bias: float | None = None,
        norm: bool = False,
        skip: bool = False,
    ) -> None:
        super().__init__()
        sizes = [1] + [width] * depth
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, stride=2 if i == 1 else 1)
            for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) if norm else nn.Identity() for _ in range(depth))
        self.head = nn.Linear(width * 4, outputs)
        self.activation, self.skip = activation, skip
        initialise(self.convs, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            out = self.activation(norm(conv(x)))
            x = x + out if self.skip and out.shape == x.shape else out
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Branches(nn.Module):
    """Two nets, each on its half of the inputs; their outputs are concatenated."""

    def __init__(self, left: nn.Module, right: nn.Module, cut: int, *, detach_left: bool = False) -> None:
        super().__init__()
        self.left, self.right, self.cut, self.detach_left = left, right, cut, detach_left

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x[:, : self.cut])
        return torch.cat([left.detach() if self.detach_left else left, self.right(x[:, self.cut :])], 1)


class Experts(nn.Module):
    """Mixture of experts; each example goes to its best one.

    || Some experts get no examples, and ``unused`` is never called.
    """

    def __init__(self, inputs: int, outputs: int, *, experts: int = 6, width: int = 24) -> None:
        super().__init__()
        self.gate = nn.Linear(inputs, experts)
        self.experts = nn.ModuleList(
            Chain(inputs, width, depth=1, width=width, weight=he()) for _ in range(experts)
        )
        self.unused = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)
        with torch.no_grad():
            self.gate.bias[-1] = -20.0  # this expert is never chosen

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = torch.softmax(self.gate(x), 1).max(1)
        out = x.new_zeros(len(x), self.head.in_features)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, weight[rows, None] * expert(x[rows]))
        return self.head(torch.relu(out))


class Half(nn.Module):
    """Net in half precision between single-precision inputs and outputs."""

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.net, self.dtype = net.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.dtype)).float()


class Apply(nn.Module):
    """Module that applies a function, for use between other modules."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
