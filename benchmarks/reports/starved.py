"""Reports of nets that do not learn, since a gradient, an input or an update never arrives."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.reports.case import CURED, Case
from benchmarks.reports.parts import accuracy, explained, r2
from benchmarks.reports.supervised import DIGITS, LABELS, Supervised, adam, batches, sgd
from lightning_gradguard import Cause, Fault

_IMAGES = DIGITS.view(-1, 1, 8, 8)
#: As they come from a camera: whole numbers up to 240.
_PIXELS = (_IMAGES * 240).round().to(torch.uint8)


def _whole_numbers(variant: str) -> tuple[L.LightningModule, Any]:
    x = _PIXELS / 255 if variant == CURED else (_PIXELS // 255).float()
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    module = Supervised(net, F.cross_entropy, adam(2e-3))
    module.images = x
    return module, batches(x, LABELS)


def _switches() -> tuple[Tensor, Tensor]:
    """Return 2000 rows of 24 switches and a smooth function of them, [2000, 1], of mean 0 and spread 1."""
    g = torch.Generator().manual_seed(27)
    x = torch.randint(0, 2, (2000, 24), generator=g).float()
    h = torch.tanh((x - 0.5) @ torch.randn(24, 8, generator=g))
    y = h @ torch.randn(8, 1, generator=g)
    return x, (y - y.mean()) / y.std()


_SWITCHES, _RESPONSE = _switches()


def _four_sigmoids(variant: str) -> tuple[L.LightningModule, Any]:
    layers: list[nn.Module] = []
    for i in (24, 64, 64, 64):
        layers += [nn.Linear(i, 64), nn.ReLU() if variant == CURED else nn.Sigmoid()]
    net = nn.Sequential(*layers, nn.Linear(64, 1))
    return Supervised(net, F.mse_loss, sgd(0.03, 0.9)), batches(_SWITCHES, _RESPONSE)


def _columns() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(28)
    x = torch.randn(1500, 6, generator=g)
    y = x[:, 0] - 2 * x[:, 1] + torch.sin(2 * x[:, 2]) + x[:, 3] * x[:, 4].sign()
    return x, ((y - y.mean()) / y.std())[:, None]


_TABLE, _TARGET = _columns()


class Tabular(L.LightningModule):
    """Encodes each numeric column by itself: normalization, linear layer; then a common head."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(1) for _ in range(6))
        self.encoders = nn.ModuleList(nn.Linear(1, 16) for _ in range(6))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        columns = x.split(1, dim=1)
        parts = [e(n(c)) for e, n, c in zip(self.encoders, self.norms, columns, strict=True)]
        return self.head(torch.cat(parts, 1))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def _one_column(variant: str) -> tuple[L.LightningModule, Any]:
    return Tabular(nn.BatchNorm1d if variant == CURED else nn.LayerNorm), batches(_TABLE, _TARGET)


def _dictionary() -> tuple[Tensor, Tensor]:
    """Return 2000 lists of 8 keys with a value each and one key asked for, [2000, 17], and its value."""
    g = torch.Generator().manual_seed(29)
    keys = torch.rand(2000, 16, generator=g).argsort(1)[:, :8]
    values = torch.randint(0, 8, (2000, 8), generator=g)
    asked = torch.randint(0, 8, (2000, 1), generator=g)
    x = torch.cat([keys, 16 + values, keys.gather(1, asked)], 1)
    return x, values.gather(1, asked).flatten()


_LOOKUPS, _VALUES = _dictionary()


class Lookup(L.LightningModule):
    """Attention from a key that is asked for to the keys of a list, whose values it averages."""

    WIDTH = 128

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        d = self.WIDTH
        self.scale = d**-0.5 if scaled else 1.0
        self.embed = nn.Embedding(24, d)
        self.query, self.key, self.value = (nn.Linear(d, d, bias=False) for _ in range(3))
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=d**-0.5)
        self.out = nn.Linear(d, 8)

    def forward(self, x: Tensor) -> Tensor:
        keys, values, asked = self.embed(x[:, :8]), self.embed(x[:, 8:16]), self.embed(x[:, 16:])
        scores = self.query(asked) @ self.key(keys).mT * self.scale
        return self.out((scores.softmax(-1) @ self.value(values)).squeeze(1))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def _unscaled(variant: str) -> tuple[L.LightningModule, Any]:
    return Lookup(scaled=variant == CURED), batches(_LOOKUPS, _VALUES)


def _buildings() -> tuple[Tensor, Tensor]:
    """Return 1200 patches with 10 nonnegative features, and a count of people, [1200, 1]."""
    g = torch.Generator().manual_seed(30)
    x = torch.rand(1200, 10, generator=g) * 2
    return x, F.softplus((x - 1) @ torch.randn(10, 1, generator=g) * 1.5)


_PATCHES, _PEOPLE = _buildings()


class Counter(L.LightningModule):
    """Predicts counts, kept above zero by its last function."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.rate = nn.Linear(64, 1)
        nn.init.constant_(self.rate.bias, -1.0)  # most patches are empty
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rate(self.body(x)))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


_LAST = {CURED: nn.Softplus, "leaky": lambda: nn.LeakyReLU(0.1)}


def _zero_counts(variant: str) -> tuple[L.LightningModule, Any]:
    module = Counter(_LAST.get(variant, nn.ReLU)())
    if variant == "zero_biases":
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
    return module, batches(_PATCHES, _PEOPLE)


class Cast(nn.Module):
    """Runs a net in the number format of its weights."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(next(self.parameters()).dtype)).float()


def _half_weights(variant: str) -> tuple[L.LightningModule, Any]:
    layers: list[nn.Module] = [nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU()]
    for _ in range(2):
        layers += [nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU()]
    net = nn.Sequential(*layers, nn.Linear(128, 10))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.3)
    model = Cast(net if variant == CURED else net.to(torch.bfloat16))
    rate = 3e-3 if variant == "raised_rate" else 2e-4
    optimizer = lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.0)  # noqa: E731
    return Supervised(model, F.cross_entropy, optimizer), batches(DIGITS, LABELS)


def _drive() -> tuple[Tensor, Tensor]:
    """Return 1500 states of a vehicle in their own units, [1500, 6], and the best steering and throttle, [1500, 2]."""
    g = torch.Generator().manual_seed(32)
    z = torch.randn(1500, 6, generator=g)
    best = 0.8 * torch.tanh(z @ torch.randn(6, 2, generator=g) / math.sqrt(3))
    units = torch.tensor([300.0, 120.0, 2000.0, 40.0, 800.0, 1500.0])
    return z * units + torch.tensor([500.0, 0.0, 3000.0, 0.0, 1000.0, 0.0]), best


_STATES, _BEST = _drive()


class Pilot(L.LightningModule):
    """Deterministic actor that climbs a critic's judgement of its actions; the critic is known."""

    def __init__(self, normalize: bool) -> None:
        super().__init__()
        mean, std = (_STATES.mean(0), _STATES.std(0)) if normalize else (torch.zeros(6), torch.ones(6))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.actor = nn.Sequential(
            nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2), nn.Tanh()
        )

    def forward(self, states: Tensor) -> Tensor:
        return self.actor((states - self.mean) / self.std)

    def training_step(self, batch: Any, _: int) -> Tensor:
        states, best = batch
        q = 1 - (self(states) - best).square().sum(-1)
        return -q.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def _raw_states(variant: str) -> tuple[L.LightningModule, Any]:
    return Pilot(normalize=variant == CURED), batches(_STATES, _BEST)


CASES = (
    Case(
        "R26",
        "Pixels divided as whole numbers: every image that goes in is zero",
        "keras-team/keras #255",
        _whole_numbers,
        lambda module: accuracy(module.images, LABELS)(module),
        0.85,
        faults=(Fault.DISCONNECTED, Fault.DEAD, Fault.STALLED, Fault.VANISHING),
        said=("input is zero", "inputs are zero", "is all zero", "are all zero", "constant input"),
        causes=(Cause.BAD_DATA, Cause.UNNORMALIZED_INPUT),
        fixes={r"zero.*(input|batch)|(input|batch).*zero|inspect the batch|aminmax|float": CURED},
        steps=150,
        kin=("input", "convolutional"),
    ),
    Case(
        "R27",
        "Four hidden layers of sigmoids learn the mean and no more",
        "ai.stackexchange.com/q/16557",
        _four_sigmoids,
        r2(_SWITCHES, _RESPONSE),
        0.7,
        faults=(Fault.VANISHING, Fault.STALLED),
        causes=(Cause.SATURATING_ACTIVATION, Cause.TOO_DEEP, Cause.BAD_INITIALIZATION),
        fixes={r"^(activation = )?(nn\.)?ReLU(\(\))?$": CURED},
        kin=("depth", "regression"),
    ),
    Case(
        "R28",
        "LayerNorm over a column of one feature: each number minus itself",
        "pytorch/pytorch #108956",
        _one_column,
        r2(_TABLE, _TARGET),
        0.7,
        faults=(Fault.DISCONNECTED, Fault.DEAD, Fault.STALLED, Fault.VANISHING),
        said=("one element", "single element", "normaliz"),
        causes=(Cause.NORMALIZATION,),
        fixes={r"(?s)\A(?!normalization after|relu).*(norm|one element|one feature)": CURED},
        kin=("normalization", "tabular"),
    ),
    Case(
        "R29",
        "Attention whose scores are not divided by the root of the width: each softmax is sure of one place",
        "reddit.com/r/learnmachinelearning/comments/1qukt1i",
        _unscaled,
        accuracy(_LOOKUPS, _VALUES),
        0.8,
        faults=(Fault.VANISHING, Fault.STALLED, Fault.DEAD),
        said=("attention", "softmax"),
        causes=(Cause.SATURATING_ACTIVATION, Cause.BAD_INITIALIZATION),
        fixes={r"scale|sqrt|temperature|\*\* ?-?0\.5": CURED},
        steps=200,
        kin=("attention",),
    ),
    Case(
        "R30",
        "A ReLU at the very end: where the net begins below zero, all counts are zero and nothing moves",
        "jvargasmu/population_estimation #68",
        _zero_counts,
        r2(_PATCHES, _PEOPLE),
        0.7,
        faults=(Fault.DEAD, Fault.DISCONNECTED, Fault.STALLED, Fault.VANISHING),
        causes=(Cause.DEAD_ACTIVATION, Cause.BAD_INITIALIZATION),
        fixes={
            r"softplus": CURED,
            r"cannot die|leaky": "leaky",
            r"zero biases|zeros_\(layer\.bias": "zero_biases",
        },
        kin=("dead", "regression"),
    ),
    Case(
        "R31",
        "Weights kept in bfloat16: most steps are smaller than their last bit",
        "tianweiy/CausVid #19",
        _half_weights,
        accuracy(DIGITS, LABELS),
        0.8,
        faults=(Fault.STALLED, Fault.UNDERFLOW),
        said=("bfloat16",),
        causes=(Cause.LOW_PRECISION, Cause.LEARNING_RATE_TOO_LOW),
        fixes={r"float32|fp32|full precision|mixed|master": CURED},
        kin=("precision",),
    ),
    Case(
        "R32",
        "States of a vehicle in their own units: the actor's tanh is at its ends for every state",
        "ZhihanLee/DDPG_Learning #2",
        _raw_states,
        lambda module: explained(module(_STATES), _BEST),
        0.7,
        faults=(Fault.VANISHING, Fault.STALLED, Fault.DEAD, Fault.DISCONNECTED),
        causes=(Cause.UNNORMALIZED_INPUT, Cause.SATURATING_ACTIVATION),
        fixes={r"input": CURED},
        kin=("reinforcement", "input"),
    ),
)
