"""Reports of trainings that come apart, or that settle on nothing after the first steps have thrown them off."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.reports.case import CURED, Case
from benchmarks.reports.losses import _MASKS, _SCANS, dice
from benchmarks.reports.parts import accuracy, r2
from benchmarks.reports.supervised import CLIPPED, DIGITS, LABELS, Supervised, batches, clip_spikes, sgd
from lightning_gradguard import Cause, Fault

_DIVERGENCE = (Fault.EXPLODING, Fault.OVERSIZED_UPDATE, Fault.SPIKE)


def _sentences() -> Tensor:
    """Return 600 sequences of 24 letters out of 10 in which mostly one letter follows each pair, [600, 24]."""
    g = torch.Generator().manual_seed(33)
    follows = torch.randint(0, 10, (10, 10), generator=g)
    x = torch.randint(0, 10, (600, 24), generator=g)
    chance = torch.rand(600, 24, generator=g)
    for t in range(2, 24):
        x[:, t] = torch.where(chance[:, t] < 0.9, follows[x[:, t - 2], x[:, t - 1]], x[:, t])
    return x


_TEXT = _sentences()


class Letters(L.LightningModule):
    """Predicts the next letter with two layers of GRU."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.embed = nn.Embedding(10, 32)
        self.rnn = nn.GRU(32, 64, num_layers=2, batch_first=True)
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.embed(x))[0])

    def training_step(self, batch: Any, _: int) -> Tensor:
        x = batch[0]
        return F.cross_entropy(self(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


def _rate_of_sgd(variant: str) -> tuple[L.LightningModule, Any]:
    return Letters(5e-3 if variant == CURED else 1.0), batches(_TEXT, size=32)


def _next_letter(module: Any) -> Any:
    return (module(_TEXT[:, :-1]).argmax(-1) == _TEXT[:, 1:])[:, 1:].float().mean()


class Embedder(L.LightningModule):
    """Embeds digits so that the hardest triplet of each batch keeps a margin."""

    MARGIN = 0.5

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 16)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def triplets(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance to the farthest of the same class and to the nearest of another."""
        e = self(x)
        squared = (e[:, None] - e[None]).square().sum(-1)
        distance = (squared + 1e-12).sqrt()
        same = y[:, None] == y[None]
        return distance.masked_fill(~same, 0).amax(1), distance.masked_fill(same, torch.inf).amin(1)

    def training_step(self, batch: Any, _: int) -> Tensor:
        positive, negative = self.triplets(*batch)
        return (positive - negative + self.MARGIN).relu().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


def _collapse(variant: str) -> tuple[L.LightningModule, Any]:
    return Embedder(1e-3 if variant == CURED else 0.03), batches(DIGITS, LABELS)


def _nearest(module: Any) -> Any:
    """Return the share of digits closer to their own class's mean than to any other, by a clear distance."""
    e = module(DIGITS)
    means = torch.stack([e[c == LABELS].mean(0) for c in range(10)])
    d = torch.cdist(e, means)
    own = d.gather(1, LABELS[:, None]).flatten()
    other = d.scatter(1, LABELS[:, None], torch.inf).amin(1)
    return (own + 0.05 < other).float().mean()


class Segmentation(L.LightningModule):
    """Small net for masks with the sum of cross-entropy and Dice, SGD with Nesterov's momentum."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, masks = batch
        logits = self(x)
        p = logits.sigmoid()
        overlap = 2 * (p * masks).sum() / (p.sum() + masks.sum())
        return F.binary_cross_entropy_with_logits(logits, masks) - overlap

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.4, momentum=self.momentum, nesterov=True)


def _heavy_momentum(variant: str) -> tuple[L.LightningModule, Any]:
    return Segmentation(0.9 if variant == CURED else 0.99), batches(_SCANS, _MASKS, size=16)


def _sales() -> tuple[Tensor, Tensor]:
    """Return 800 windows of 20 days of sales between 0 and 1, [800, 20, 1], and the next day's money, [800, 1]."""
    g = torch.Generator().manual_seed(35)
    phase, speed = torch.rand(2, 800, 1, generator=g)
    t = torch.arange(21) * (0.3 + 0.4 * speed)
    x = 0.5 + 0.4 * torch.sin(t + 6.28 * phase) + 0.02 * torch.randn(800, 21, generator=g)
    return x[:, :20, None], 10_000 * x[:, 20:]


_DAYS, _MONEY = _sales()


class Forecaster(L.LightningModule):
    """LSTM over the days; the last state gives the next value."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.rnn = nn.LSTM(1, 48, batch_first=True)
        self.out = nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1]) * self.std + self.mean

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return F.l1_loss((self(x) - self.mean) / self.std, (y - self.mean) / self.std)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def _money(variant: str) -> tuple[L.LightningModule, Any]:
    mean, std = (float(_MONEY.mean()), float(_MONEY.std())) if variant == CURED else (0.0, 1.0)
    return Forecaster(mean, std), batches(_DAYS, _MONEY)


def _sum_for_mean(variant: str) -> tuple[L.LightningModule, Any]:
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    net = nn.Sequential(*layers, nn.LogSoftmax(-1))
    reduction = "mean" if variant == CURED else "sum"
    loss = lambda log_p, y: F.nll_loss(log_p, y, reduction=reduction)  # noqa: E731
    return Supervised(net, loss, sgd(0.1)), batches(DIGITS, LABELS, size=256)


def _molecules() -> tuple[Tensor, Tensor]:
    """Return 600 clouds of 24 atoms, [600, 24, 3], and each displaced by noise."""
    g = torch.Generator().manual_seed(43)
    x = F.normalize(torch.randn(600, 24, 3, generator=g), dim=-1) * 2
    return x, x + 0.5 * torch.randn(x.shape, generator=g)


_ATOMS, _NOISY = _molecules()


class Equivariant(nn.Module):
    """Layer that moves each point along its differences to all others."""

    def __init__(self, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.edge = nn.Sequential(nn.Linear(33, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
        self.weight = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
        self.node = nn.Sequential(nn.Linear(48, 32), nn.SiLU(), nn.Linear(32, 16))

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[1]
        apart = x[:, :, None] - x[:, None]
        squared = apart.square().sum(-1, keepdim=True)
        pair = torch.cat([h[:, :, None].expand(-1, -1, n, -1), h[:, None].expand(-1, n, -1, -1), squared], -1)
        m = self.edge(pair)
        if self.normalize:
            apart = apart / (squared + 1e-8).sqrt().clamp_min(1) / n
        x = x + (apart * self.weight(m)).sum(2)
        return h + self.node(torch.cat([h, m.sum(2) / (n if self.normalize else 1)], -1)), x


class Denoiser(L.LightningModule):
    """Moves displaced atoms back."""

    def __init__(self, normalize: bool) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(16))
        self.layers = nn.ModuleList(Equivariant(normalize) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.start.expand(*x.shape[:2], -1)
        for layer in self.layers:
            h, x = layer(h, x)
        return x

    def training_step(self, batch: Any, _: int) -> Tensor:
        clean, noisy = batch
        return F.mse_loss(self(noisy), clean)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def _far_apart(variant: str) -> tuple[L.LightningModule, Any]:
    return Denoiser(variant == CURED), batches(_ATOMS, _NOISY, size=8)


def _restored(module: Any) -> Any:
    """Return the share of the noise that is gone, on 50 clouds."""
    return 1 - F.mse_loss(module(_NOISY[:50]), _ATOMS[:50]) / F.mse_loss(_NOISY[:50], _ATOMS[:50])


def _joints(variant: str) -> tuple[L.LightningModule, Any]:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 64),
        nn.ReLU(),
        nn.Linear(64, 2),
    )
    decay = 5e-4 if variant == CURED else 0.5
    return Supervised(net, F.mse_loss, sgd(0.05, 0.9, weight_decay=decay)), batches(_SCANS, _PLACES, size=32)


#: Centre of the bright square in each image, [400, 2], of mean 0 and spread 1.
_PLACES = torch.stack(
    [_MASKS[:, 0].mean(2) @ torch.arange(16.0), _MASKS[:, 0].mean(1) @ torch.arange(16.0)], 1
)
_PLACES = (_PLACES - _PLACES.mean(0)) / _PLACES.std(0)


def _signals() -> tuple[Tensor, Tensor]:
    """Return 2000 signals of 60 steps, [2000, 60, 1], and the sum of each, of spread 1, [2000, 1]."""
    g = torch.Generator().manual_seed(45)
    x = torch.randn(2000, 60, 1, generator=g)
    return x, x.sum(1) / 60**0.5


_SIGNAL, _SUM = _signals()


class Adder(L.LightningModule):
    """Adds a signal up with a ReLU recurrence that begins as the identity, or with an LSTM."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.rnn: nn.Module
        if gated:
            self.rnn = nn.LSTM(1, 64, batch_first=True)
        else:
            self.rnn = nn.RNN(1, 64, nonlinearity="relu", batch_first=True)
            nn.init.eye_(self.rnn.weight_hh_l0)
            nn.init.zeros_(self.rnn.bias_hh_l0)
            nn.init.zeros_(self.rnn.bias_ih_l0)
            nn.init.normal_(self.rnn.weight_ih_l0, std=0.05)
        self.out = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def _cliff(variant: str) -> tuple[L.LightningModule, Any]:
    return Adder(variant == "gated"), batches(_SIGNAL, _SUM)


CASES = (
    Case(
        "R33",
        "Adam with the rate of 1 that was SGD's default: perplexity stays where it is",
        "OpenNMT/OpenNMT-py #805",
        _rate_of_sgd,
        _next_letter,
        0.6,
        faults=(*_DIVERGENCE, Fault.VANISHING, Fault.VANISHING_IN_TIME),
        causes=(Cause.LEARNING_RATE_TOO_HIGH,),
        fixes={r"learning rate of 0\.00[1-9]": CURED},
        steps=250,
        kin=("rate", "recurrent", "language"),
    ),
    Case(
        "R34",
        "Hardest triplets and a high rate: all embeddings fall on one point, the loss is the margin",
        "omoindrot/tensorflow-triplet-loss #18",
        _collapse,
        _nearest,
        0.8,
        faults=(*_DIVERGENCE, Fault.DEAD, Fault.DISCONNECTED, Fault.VANISHING, Fault.STALLED),
        causes=(Cause.LEARNING_RATE_TOO_HIGH, Cause.DEAD_ACTIVATION),
        fixes={r"learning rate of 0\.00[1-9]": CURED},
        steps=250,
        kin=("rate", "metric"),
    ),
    Case(
        "R35",
        "Momentum of 0.99: the masks are empty from the first epochs on",
        "MIC-DKFZ/nnUNet #298",
        _heavy_momentum,
        dice(_SCANS, _MASKS, 0.0),
        0.7,
        faults=(*_DIVERGENCE, Fault.DEAD, Fault.DISCONNECTED, Fault.VANISHING, Fault.STALLED),
        causes=(Cause.MOMENTUM, Cause.LEARNING_RATE_TOO_HIGH),
        fixes={r"momentum of 0\.9$": CURED},
        steps=250,
        kin=("momentum", "segmentation"),
    ),
    Case(
        "R36",
        "An LSTM forecasts sums of ten thousand as they are: the loss is huge and hardly moves",
        "keras-team/keras #4563",
        _money,
        r2(_DAYS, _MONEY),
        0.7,
        faults=(*_DIVERGENCE, Fault.STALLED, Fault.VANISHING),
        said=("target",),
        causes=(Cause.TARGET_SCALE,),
        fixes={r"target": CURED},
        steps=250,
        kin=("target", "recurrent", "forecasting"),
    ),
    Case(
        "R37",
        "The loss is a sum over a large batch, and the rate was made for a mean",
        "jax-ml/jax #3113",
        _sum_for_mean,
        accuracy(DIGITS, LABELS),
        0.8,
        faults=(*_DIVERGENCE, Fault.DEAD, Fault.NONFINITE, Fault.VANISHING, Fault.DISCONNECTED),
        causes=(Cause.LOSS_FUNCTION, Cause.LEARNING_RATE_TOO_HIGH),
        fixes={r"reduction|\.mean\(|mean of|a mean": CURED},
        steps=250,
        kin=("rate", "loss"),
    ),
    Case(
        "R43",
        "Points moved by sums over all others, layer after layer: the coordinates run off",
        "lucidrains/egnn-pytorch #7",
        _far_apart,
        _restored,
        0.2,
        faults=(*_DIVERGENCE, Fault.NONFINITE),
        causes=(
            Cause.LOSS_FUNCTION,
            Cause.LEARNING_RATE_TOO_HIGH,
            Cause.BAD_INITIALIZATION,
            Cause.UNNORMALIZED_INPUT,
            Cause.NORMALIZATION,
        ),
        fixes={
            r"coordinate|divide by|number of (nodes|points|neighbo)|unit length|mean over": CURED,
            r"clip": CLIPPED,
        },
        trainer=clip_spikes,
        steps=200,
        kin=("graph",),
    ),
    Case(
        "R44",
        "A weight decay of 0.5: all weights go to zero, any image gives the same coordinates",
        "BVLC/caffe #1396",
        _joints,
        r2(_SCANS, _PLACES),
        0.7,
        faults=(Fault.VANISHING, Fault.STALLED, Fault.DEAD, Fault.DISCONNECTED),
        said=("decay",),
        causes=(Cause.WEIGHT_DECAY,),
        fixes={r"weight.?decay of (0\.000|[1-9]e-0?[4-9])": CURED},
        steps=250,
        kin=("decay", "convolutional"),
    ),
    Case(
        "R45",
        "A recurrence meets a cliff: one step throws it where nothing is learnt any more",
        "stats.stackexchange.com/a/487195",
        _cliff,
        r2(_SIGNAL, _SUM),
        0.6,
        faults=(*_DIVERGENCE, Fault.NONFINITE, Fault.VANISHING_IN_TIME, Fault.VANISHING, Fault.DEAD),
        causes=(Cause.RECURRENCE, Cause.LEARNING_RATE_TOO_HIGH, Cause.OUTLIER_BATCH),
        fixes={r"clip": CLIPPED, r"lstm|gru": "gated"},
        trainer=lambda v: {"gradient_clip_val": 1.0} if v == CURED else clip_spikes(v),
        kin=("recurrent",),
    ),
)
