"""Reports of generative models that come apart: a flow, an autoencoder, an adversarial pair."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.reports.case import CURED, Case
from benchmarks.reports.supervised import CLIPPED, batches, clip_spikes
from lightning_gradguard import Cause, Fault

_DIVERGENCE = (Fault.EXPLODING, Fault.OVERSIZED_UPDATE, Fault.SPIKE)


def _posterior() -> Tensor:
    """Return 2000 points on a thin bent band in six dimensions, [2000, 6], of mean 0 and spread 1."""
    g = torch.Generator().manual_seed(37)
    t = 6 * torch.rand(2000, 1, generator=g) - 3
    x = torch.cat([t, t.sin() * 2, t**2 / 3, t.cos(), t * t.sin(), (t / 2).tanh()], 1)
    x = x + 0.02 * torch.randn(x.shape, generator=g)
    return (x - x.mean(0)) / x.std(0)


_BAND = _posterior()


class Coupling(nn.Module):
    """Affine coupling: half of the numbers set scale and shift of the other half."""

    def __init__(self, bound: float | None) -> None:
        super().__init__()
        self.bound = bound
        self.net = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        s, t = self.net(a).chunk(2, 1)
        if self.bound is not None:
            s = self.bound * torch.tanh(s / self.bound)
        return torch.cat([b * s.exp() + t, a], 1), s.sum(1)


class Flow(L.LightningModule):
    """Density of points by 16 coupling layers."""

    def __init__(self, bound: float | None, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.layers = nn.ModuleList(Coupling(bound) for _ in range(16))

    def log_likelihood(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x))
        for layer in self.layers:
            x, change = layer(x)
            x, total = x[:, torch.tensor([5, 0, 4, 1, 3, 2])], total + change
        return total - x.square().sum(1) / 2 - 3 * math.log(2 * math.pi)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return -self.log_likelihood(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.rate)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


def _free_scales(variant: str) -> tuple[L.LightningModule, Any]:
    return Flow(1.0 if variant in (CURED, "bounded") else None, 0.01), batches(_BAND)


def _gain(module: Any) -> Any:
    """Return the likelihood gained over a standard normal, in nats a point."""
    normal = -(_BAND.square().sum(1) / 2).mean() - 3 * math.log(2 * math.pi)
    return module.log_likelihood(_BAND).mean() - normal


def _transactions() -> Tensor:
    """Return 2048 rows of 8 related columns, of which rare rows are a thousand times larger, [2048, 8]."""
    g = torch.Generator().manual_seed(39)
    z = torch.randn(2048, 2, generator=g)
    x = z @ torch.randn(2, 8, generator=g) + 0.1 * torch.randn(2048, 8, generator=g)
    x[::311] *= 1000
    return x


_ROWS = _transactions()
_USUAL = torch.arange(2048) % 311 != 0


def soft_clamp(x: Tensor) -> Tensor:
    """Keep numbers between -5 and 5 by a tanh."""
    return 5 * torch.tanh(x / 5)


class Autoencoder(L.LightningModule):
    """Variational autoencoder of tables.

    Args:
        bound: What is done to mean and logarithm of the variance: "soft" (see `soft_clamp`), "hard" (the latter at most
            30) or "" (nothing).
        size: What each column is divided by.
    """

    def __init__(self, bound: str, size: float) -> None:
        super().__init__()
        self.bound, self.size = bound, size
        self.encoder = nn.Sequential(
            nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
        )
        self.decoder = nn.Sequential(
            nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        if self.bound == "soft":
            return soft_clamp(mean), soft_clamp(log_variance)
        return mean, log_variance.clamp_max(30) if self.bound == "hard" else log_variance

    def training_step(self, batch: Any, _: int) -> Tensor:
        x = batch[0] / self.size
        mean, log_variance = self.encode(x)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(1) / 2
        error = F.smooth_l1_loss(self.decoder(z), x, reduction="none").sum(1)
        return (error + 0.05 * divergence).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def _free_variance(variant: str) -> tuple[L.LightningModule, Any]:
    bound = {CURED: "soft", "bounded": "hard"}.get(variant, "")
    return Autoencoder(bound, float(_ROWS.std()) if variant == "standard" else 1.0), batches(_ROWS)


def _rebuilt(module: Any) -> Any:
    """Return the explained share of the usual rows' variance."""
    x = _ROWS[_USUAL]
    out = module.decoder(module.encode(x / module.size)[0]) * module.size
    return 1 - F.mse_loss(out, x) / x.var()


def _ring() -> Tensor:
    g = torch.Generator().manual_seed(40)
    angle = 6.28 * torch.rand(2048, 1, generator=g)
    return torch.cat([angle.cos(), angle.sin()], 1) + 2 + 0.05 * torch.randn(2048, 2, generator=g)


_RING = _ring()


class Wasserstein(L.LightningModule):
    """Critic and generator of points; the critic's weights are kept small, or not.

    Args:
        limit: Largest weight of the critic, or None.
        spectral: True for spectral normalization of the critic.
    """

    def __init__(self, limit: float | None, spectral: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.limit = limit
        self.generator = nn.Sequential(
            nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )
        layers = [nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 1)]
        if spectral:
            layers = [nn.utils.parametrizations.spectral_norm(layer) for layer in layers]
        self.critic = nn.Sequential(layers[0], nn.LeakyReLU(0.2), layers[1], nn.LeakyReLU(0.2), layers[2])

    def training_step(self, batch: Any, index: int) -> None:
        x = batch[0]
        of_critic, of_generator = self.optimizers()
        fake = self.generator(torch.randn(len(x), 4))
        loss = self.critic(fake.detach()).mean() - self.critic(x).mean()
        of_critic.zero_grad()
        self.manual_backward(loss)
        of_critic.step()
        if self.limit is not None:
            for p in self.critic.parameters():
                p.data.clamp_(-self.limit, self.limit)
        if index % 5 == 0:
            of_generator.zero_grad()
            self.manual_backward(-self.critic(self.generator(torch.randn(len(x), 4))).mean())
            of_generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.RMSprop(part.parameters(), lr=1e-3) for part in (self.critic, self.generator)]


def _free_critic(variant: str) -> tuple[L.LightningModule, Any]:
    return Wasserstein(0.1 if variant == CURED else None, variant == "spectral"), batches(_RING)


_WAYS = F.normalize(torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), dim=0)


def _likeness(module: Any) -> Any:
    """Return 1 minus the sliced distance between real and generated points, in spreads of the real ones."""
    fake = module.generator(torch.randn(2048, 4, generator=torch.Generator().manual_seed(0)))
    real, made = ((x @ _WAYS).sort(0).values for x in (_RING, fake))
    return 1 - (real - made).abs().mean() / _RING.std(0).mean()


CASES = (
    Case(
        "R38",
        "Coupling layers with an exp of any size: the loss falls well, then leaps",
        "pkuxmq/Invertible-Image-Rescaling #24",
        _free_scales,
        _gain,
        12.0,
        faults=(*_DIVERGENCE, Fault.NONFINITE),
        causes=(Cause.LOSS_FUNCTION, Cause.LEARNING_RATE_TOO_HIGH, Cause.OUTLIER_BATCH),
        fixes={r"\bexp\b|tanh|bound": "bounded", r"clip": CLIPPED},
        trainer=lambda v: {"gradient_clip_val": 1.0} if v == CURED else clip_spikes(v),
        kin=("flow", "generative"),
    ),
    Case(
        "R39",
        "A variance that is the exp of an output without bound: rare rows make the divergence infinite",
        "NVlabs/NVAE #27",
        _free_variance,
        _rebuilt,
        0.4,
        faults=(*_DIVERGENCE, Fault.NONFINITE),
        causes=(Cause.LOSS_FUNCTION, Cause.UNNORMALIZED_INPUT, Cause.OUTLIER_BATCH),
        fixes={
            r"tanh|soft": CURED,
            r"\bexp\b|clamp|bound": "bounded",
            r"standardi[sz]e the input|normali[sz]e the input": "standard",
            r"clip": CLIPPED,
        },
        trainer=clip_spikes,
        steps=400,
        kin=("variational", "generative"),
    ),
    Case(
        "R40",
        "A Wasserstein critic whose weights are not clipped: its loss falls without end, the generator follows",
        "torchgan/torchgan #42",
        _free_critic,
        _likeness,
        0.64,
        faults=_DIVERGENCE,
        causes=(Cause.LOSS_FUNCTION,),
        fixes={r"spectral": "spectral", r"lipschitz|clamp|weight clip|clip.*weight|gradient penalty": CURED},
        steps=720,
        kin=("adversarial", "generative"),
    ),
)
