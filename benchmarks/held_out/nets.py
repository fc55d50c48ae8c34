"""Nets of the held-out cases on vectors or pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.models import Activation, Init


def initialise(net: nn.Module, weight: Init | None = None, bias: float | None = None) -> None:
    """Initialise all weights (two dimensions or more) and hidden biases; None keeps torch's defaults."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if weight is not None and parameter.ndim >= 2:
                weight(parameter)
            if bias is not None and name.endswith("bias") and "out" not in name and "norm" not in name:
                parameter.fill_(bias)


def xavier_uniform(weight: Tensor) -> None:
    nn.init.xavier_uniform_(weight)


class MLP(nn.Module):
    """``depth`` linear layers of equal width and an output layer, named ``fc0``, ``fc1`` and so on.

    Args:
        inputs: Number of features; inputs with more dimensions are flattened.
        outputs: Number of outputs.
        depth: Number of hidden layers.
        width: Width of the hidden layers.
        activation: Applied after each hidden layer.
        weight: Initialisation of all weights.
        bias: Initial value of all hidden biases.
        norm: Creates the normalisation after each hidden layer, before its activation.
        scale: Factor after each activation.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        depth: int,
        width: int,
        *,
        activation: Activation = torch.relu,
        weight: Init | None = None,
        bias: float | None = None,
        norm: Callable[[int], nn.Module] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.depth, self.activation, self.scale, self.normed = depth, activation, scale, norm is not None
        for k in range(depth):
            self.add_module(f"fc{k}", nn.Linear(inputs if k == 0 else width, width))
            if norm is not None:
                self.add_module(f"norm{k}", norm(width))
        self.out = nn.Linear(width, outputs)
        initialise(self, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for k in range(self.depth):
            x = self.get_submodule(f"fc{k}")(x)
            if self.normed:
                x = self.get_submodule(f"norm{k}")(x)
            x = self.scale * self.activation(x)
        return self.out(x)


class ResidualMLP(nn.Module):
    """Blocks of two linear layers around a skip connection, each after a layer normalisation."""

    def __init__(self, inputs: int, outputs: int, blocks: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks + 1))
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first, second, norm in zip(self.first, self.second, self.norms, strict=False):
            x = x + second(F.gelu(first(norm(x))))
        return self.out(self.norms[-1](x))


class Highway(nn.Module):
    """Layers with gates that choose between a transformation and its input.

    Args:
        depth: Number of gated layers.
        width: Width of the layers.
        gate: Initial bias of the gates; high values carry nothing over.
        weight: Initialisation of the transformations.
    """

    def __init__(self, depth: int, width: int, gate: float, weight: Init) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.transforms = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, 10)
        with torch.no_grad():
            for transform, gating in zip(self.transforms, self.gates, strict=True):
                weight(transform.weight)
                gating.bias.fill_(gate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for transform, gating in zip(self.transforms, self.gates, strict=True):
            gate = torch.sigmoid(gating(x))
            x = gate * torch.tanh(transform(x)) + (1 - gate) * x
        return self.out(x)


class VisionTransformer(nn.Module):
    """Transformer on 2 x 2 patches of an 8 x 8 picture, with a class token and ``depth`` encoder layers."""

    def __init__(self, outputs: int = 10, *, width: int = 24, depth: int = 2, pre_norm: bool = True) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 3, 2 * width, 0.0, batch_first=True, norm_first=pre_norm, activation="gelu"
            )
            for _ in range(depth)
        )
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, outputs)

    def patches(self, x: Tensor) -> Tensor:
        """Return embedded patches [B, 16, width], without positions."""
        return self.patch(x).flatten(2).transpose(1, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """Return the class token and the patches with positions, [B, 17, width]."""
        return torch.cat([self.cls.expand(len(x), -1, -1), self.patches(x)], 1) + self.pos

    def encode(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encode(self.tokens(x))[:, 0])


def two_convolutions(first: int = 8, second: int = 8) -> nn.Sequential:
    """Return two plain 3 x 3 convolutions and a linear layer for 8 x 8 pictures, with torch's initialisation."""
    return nn.Sequential(
        nn.Conv2d(1, first, 3),
        nn.ReLU(),
        nn.Conv2d(first, second, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * second, 10),
    )
