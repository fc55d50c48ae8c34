"""Healthy trainings whose data, batches or precision could mislead a rule."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import Chain, Half, he
from benchmarks.zoo.recipes import adam, adamw, chain, sgd
from benchmarks.zoo.tasks import Task, label_noise, linear, parity, regression, templates
from benchmarks.zoo.training import Training

_relu = {"depth": 4, "weight": he()}


def _scaler() -> dict[str, Any]:
    """Return real fp16 with a scale that starts too high and doubles every 40 steps: overflows are expected."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=40)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def _blobs(seed: int) -> Task:
    return templates(seed, noise=0.2, classes=3, features=16)


def _heavy_tails(seed: int) -> Task:
    """Return templates with Student noise of 2.5 degrees of freedom: some inputs are very large."""
    own = templates(seed)

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x, y = own.draw(generator, size)
        square = torch.randn(size, 5, generator=generator).square().mean(1, keepdim=True)
        return x / square.sqrt().clamp(min=0.15), y

    return Task(draw, inputs=64, outputs=10)


def _sparse(seed: int) -> Task:
    """Return bags of 5 out of 200 words with Zipf frequencies; most features are zero most of the time."""
    topic = torch.randint(4, (200,), generator=torch.Generator().manual_seed(seed))
    frequency = 1 / torch.arange(1.0, 201)

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (size,), generator=generator)
        weight = frequency * torch.where(topic == y[:, None], 8.0, 1.0)
        words = torch.multinomial(weight, 5, generator=generator)
        return torch.zeros(size, 200).scatter_(1, words, 1.0), y

    return Task(draw, inputs=200, outputs=4)


def _small_then_large(number: int) -> int:
    return 16 if number < 150 else 256


def _half(seed: int, *, dtype: torch.dtype) -> Training:
    task = templates(seed)
    return Training(Half(Chain(64, 10, depth=3, weight=he()), dtype), task, sgd(0.1), seed=seed)


CASES = [
    Case("H13", "blobs, to a loss of 1e-3", partial(chain, task=_blobs, depth=2), 0.99, kin=("dense", "sgd")),
    Case(
        "H14",
        "linear regression, to a loss of nothing",
        partial(chain, task=linear, depth=0, width=16, optimizer=sgd(0.1)),
        0.999,
        kin=("dense", "regression", "sgd"),
    ),
    Case(
        "H16",
        "heavy-tailed inputs",
        partial(chain, task=_heavy_tails, optimizer=adam(1e-3), **_relu),
        0.8,
        kin=("dense", "adam"),
    ),
    Case(
        "H17",
        "pure label noise: nothing to learn",
        partial(chain, task=label_noise, optimizer=sgd(0.05), **_relu),
        0.9,
        fixed=partial(chain, task=templates, optimizer=sgd(0.05), **_relu),
        kin=("dense", "sgd"),
    ),
    Case(
        "H18",
        "parity: a long plateau before learning begins",
        partial(chain, task=parity, depth=1, width=64, optimizer=sgd(0.05, momentum=0.9), batch_size=32),
        0.9,
        steps=900,
        kin=("dense", "momentum"),
    ),
    Case(
        "H19",
        "batches of 4",
        partial(chain, batch_size=4, optimizer=sgd(0.02), **_relu),
        0.8,
        kin=("dense", "sgd"),
    ),
    Case(
        "H21",
        "batch size 16, then 256",
        partial(chain, batch_size=_small_then_large, **_relu),
        0.9,
        kin=("dense", "batch size", "sgd"),
    ),
    Case(
        "H23",
        "loss times 65,536, Adam",
        partial(chain, reshape=lambda loss: 65536 * loss, optimizer=adam(2e-3), **_relu),
        0.9,
        kin=("dense", "adam"),
    ),
    Case(
        "H24",
        "loss times 1e-6, learning rate times 1e6",
        partial(chain, reshape=lambda loss: 1e-6 * loss, optimizer=sgd(1e5), **_relu),
        0.9,
        kin=("dense", "sgd"),
    ),
    Case(
        "H25",
        "gradient scaler that overflows and rises again",
        partial(chain, optimizer=adam(2e-3), **_relu),
        0.9,
        trainer=_scaler,
        kin=("dense", "mixed precision", "adam"),
    ),
    Case(
        "H26",
        "accumulation over 4 batches, with smaller windows at the ends of epochs",
        partial(chain, batch_size=16, per_epoch=42, **_relu),
        0.9,
        trainer=partial(dict, accumulate_grad_batches=4),
        kin=("dense", "accumulation", "sgd"),
    ),
    Case(
        "H57",
        "bf16 mixed precision",
        partial(chain, **_relu),
        0.9,
        trainer=partial(dict, precision="bf16-mixed"),
        kin=("dense", "mixed precision", "sgd"),
    ),
    Case(
        "H58",
        "parameters in half precision",
        partial(_half, dtype=torch.float16),
        0.9,
        kin=("dense", "low precision", "sgd"),
    ),
    Case(
        "H59",
        "parameters in bfloat16",
        partial(_half, dtype=torch.bfloat16),
        0.9,
        kin=("dense", "low precision", "sgd"),
    ),
    Case(
        "H60",
        "bags of words: most features are zero, most of the time",
        partial(chain, task=_sparse, optimizer=adam(3e-3), depth=2, weight=he()),
        0.6,
        kin=("dense", "sparse", "adam"),
    ),
    Case(
        "H61",
        "dropout of 0.7",
        partial(chain, depth=2, width=64, dropout=0.7, weight=he(), optimizer=adam(3e-3)),
        0.9,
        kin=("dense", "dropout", "adam"),
    ),
    Case(
        "H62",
        "clipped at a norm of 1, as is usual",
        partial(chain, optimizer=sgd(0.1, momentum=0.9), **_relu),
        0.9,
        trainer=partial(dict, gradient_clip_val=1.0),
        kin=("dense", "momentum"),
    ),
    Case(
        "H63",
        "regression with weight decay",
        partial(chain, task=regression, depth=3, weight=he(), optimizer=adamw(3e-3, weight_decay=0.1)),
        0.8,
        kin=("dense", "regression", "adamw"),
    ),
]
