"""Tables: models of rtdl-revisiting-models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.real.case import EndsBelow, Model, Run
from benchmarks.real.plain import Numbered, Plain, adamw, seeded, train

NUMBERS, CHOICES = 6, [4, 3]


def rows(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers, choices and a target that depends on products of both."""
    x = torch.randn(count, NUMBERS, generator=generator)
    c = torch.stack([torch.randint(size, (count,), generator=generator) for size in CHOICES], 1)
    y = x[:, 0] * (c[:, 0] - 1.5) + (x[:, 1] * x[:, 2]).tanh() + x[:, 3].abs() - 0.8 + 0.5 * (c[:, 1] == 2)
    return x, c, y / 1.5


def _train(net: Any, seed: int, steps: int, optimizer: Any, encode: bool, scale: float = 1.0) -> Run:
    def batches(number: int) -> tuple[Tensor, Tensor, Tensor]:
        x, c, y = rows(seeded(seed, number), 128)
        x[:, :3] *= scale
        return x, c, y

    def loss(net: Any, batch: Any) -> Tensor:
        x, c, y = batch
        if encode:
            one = [F.one_hot(c[:, i], size).float() for i, size in enumerate(CHOICES)]
            return F.mse_loss(net(torch.cat([x, *one], 1)).squeeze(1), y)
        return F.mse_loss(net(x, c).squeeze(1), y)

    return train(Plain(net, loss, optimizer), Numbered(batches), steps)


def ft_transformer(seed: int, steps: int = 300, scale: float = 1.0) -> Run:
    """Return the feature tokenizer and transformer.

    Args:
        seed: Seed of weights and data.
        steps: Optimizer steps.
        scale: Factor on the first three columns.
    """
    from rtdl_revisiting_models import FTTransformer

    net = FTTransformer(
        n_cont_features=NUMBERS,
        cat_cardinalities=CHOICES,
        d_out=1,
        n_blocks=2,
        d_block=32,
        attention_n_heads=4,
        attention_dropout=0.1,
        ffn_d_hidden=None,
        ffn_d_hidden_multiplier=4 / 3,
        ffn_dropout=0.1,
        residual_dropout=0.0,
    )
    return _train(net, seed, steps, adamw(2e-3), encode=False, scale=scale)


def resnet(seed: int, steps: int = 300, change: Callable[[Any], None] | None = None) -> Run:
    """Return the residual net for tables; ``change`` spoils it."""
    from rtdl_revisiting_models import ResNet

    net = ResNet(
        d_in=NUMBERS + sum(CHOICES),
        d_out=1,
        n_blocks=3,
        d_block=48,
        d_hidden=None,
        d_hidden_multiplier=2.0,
        dropout1=0.1,
        dropout2=0.0,
    )
    if change is not None:
        change(net)
    return _train(net, seed, steps, adamw(2e-3), encode=True)


HEALTHY = (
    Model(
        "ft-transformer",
        "Feature tokenizer and transformer",
        "rtdl-revisiting-models",
        "tabular",
        ft_transformer,
        learned=EndsBelow(0.3),
        order=(
            "*cont_embeddings.weight",
            "*blocks.0.attention.W_q.weight",
            "*blocks.1.ffn.linear2.weight",
            "*output.linear.weight",
        ),
    ),
    Model(
        "tabular-resnet",
        "Residual net for tables",
        "rtdl-revisiting-models",
        "tabular",
        resnet,
        learned=EndsBelow(0.3),
        order=(
            "net.input_projection.weight",
            "net.blocks.0.linear1.weight",
            "net.blocks.2.linear2.weight",
            "net.output.linear.weight",
        ),
    ),
)
