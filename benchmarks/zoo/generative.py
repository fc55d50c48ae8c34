"""Trainings with two optimizers, with custom losses, and with losses below zero."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.models import Chain, he
from benchmarks.zoo.recipes import adam, rmsprop
from benchmarks.zoo.sequences import two_views
from benchmarks.zoo.tasks import Task, regression
from benchmarks.zoo.training import MakeOptimizer, Training


def cloud(seed: int, *, far: float = 1.5) -> Task:
    """Return points [B, 2] of a Gaussian away from the origin.

    || Outputs are compared with it by mean and covariance.
    """
    mean = far * F.normalize(torch.randn(2, generator=Generator().manual_seed(seed)), dim=0)
    shape = torch.tensor([[0.8, 0.0], [0.5, 0.4]])

    def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
        x = mean + torch.randn(size, 2, generator=generator) @ shape.T
        return x, x

    def likeness(output: Tensor, target: Tensor) -> Tensor:
        off = (output.mean(0) - target.mean(0)).norm() / (1 + target.mean(0).norm())
        spread = target.T.cov()
        return 1 - off - 0.5 * (output.T.cov() - spread).norm() / spread.norm()

    return Task(draw, score=likeness, inputs=2, outputs=2)


class Adversarial(Training):
    """Generator against discriminator in manual optimization, each with its optimizer.

    Args:
        saturating: The generator minimises log(1 - D), whose gradient vanishes when D is sure.
        detach: The generator's step gets detached samples: a classic mistake.
        certainty: Factor on the discriminator's logits.
        head_start: Steps of the discriminator before training begins.
    """

    def __init__(
        self,
        seed: int,
        *,
        far: float = 1.5,
        saturating: bool = False,
        detach: bool = False,
        head_start: int = 0,
        certainty: float = 1.0,
        optimizer: MakeOptimizer | None = None,
    ) -> None:
        task = cloud(seed, far=far)
        generator = Chain(4, 2, depth=2, weight=he(0.5))
        super().__init__(generator, task, optimizer or adam(2e-3, betas=(0.5, 0.99)), seed=seed)
        self.generator = generator
        self.discriminator = Chain(2, 1, depth=2, weight=he(), activation=lambda x: F.leaky_relu(x, 0.2))
        self.saturating, self.detach = saturating, detach
        self.certainty = certainty
        self.automatic_optimization = False
        del self.net
        self.noise = Generator().manual_seed(seed)
        early = torch.optim.Adam(self.discriminator.parameters(), lr=1e-2)
        for number in range(head_start):
            early.zero_grad()
            self.dispute(self.batch(-1 - number)[0]).backward()
            early.step()

    def dispute(self, real: Tensor) -> Tensor:
        """Return the loss of the discriminator."""
        fake = self.generator(torch.randn(len(real), 4, generator=self.noise)).detach()
        return F.softplus(-self.judge(real)).mean() + F.softplus(self.judge(fake)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, _ = batch
        for_generator, for_discriminator = self.optimizers()
        for_discriminator.zero_grad()
        self.manual_backward(self.dispute(real))
        for_discriminator.step()
        fake = self.generator(torch.randn(len(real), 4, generator=self.noise))
        self.score = self.task.score(fake.detach(), real)
        verdict = self.judge(fake.detach() if self.detach else fake)
        loss = -F.softplus(verdict).mean() if self.saturating else F.softplus(-verdict).mean()
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()

    def judge(self, x: Tensor) -> Tensor:
        return self.certainty * self.discriminator(x)

    def configure_optimizers(self) -> Any:
        own = self.make_optimizer(self.generator.parameters())
        return [own, adam(2e-3, betas=(0.5, 0.99))(self.discriminator.parameters())]

    @torch.no_grad()
    def quality(self) -> float:
        generator = Generator().manual_seed(10_000_019 + self.seed)
        real, _ = self.task.draw(generator, 2048)
        return float(self.task.score(self.generator(torch.randn(2048, 4, generator=generator)), real))


class Critic(Training):
    """Wasserstein critic between two fixed clouds, as one half of a WGAN; it grows without limit unless bounded.

    Quality is one minus the relative error of its estimated distance, divided by its slope.
    """

    def __init__(self, seed: int, *, bounded: bool) -> None:
        task = cloud(seed, far=3.0)
        super().__init__(nn.Identity(), task, rmsprop(5e-3), seed=seed)
        self.critic = Chain(2, 1, depth=4, weight=he())
        self.bounded = bounded

    def loss(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        generator = Generator().manual_seed(number)
        fake = torch.randn(len(x), 2, generator=generator)
        gain = self.critic(x).mean() - self.critic(fake).mean()
        self.score = torch.sigmoid(gain.detach())
        if not self.bounded:
            return -gain
        between = (x + torch.rand(len(x), 1, generator=generator) * (fake - x)).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        return -gain + 10 * (slope.norm(dim=1) - 1).square().mean()

    def quality(self) -> float:
        generator = Generator().manual_seed(10_000_019 + self.seed)
        x, _ = self.task.draw(generator, 512)
        with torch.no_grad():
            distance = float(
                self.critic(x).mean() - self.critic(torch.randn(512, 2, generator=generator)).mean()
            )
        return 1 - abs(distance - 3.0) / 3.0 if math.isfinite(distance) else math.nan


def critic(seed: int, *, bounded: bool) -> Training:
    return Critic(seed, bounded=bounded)


class Variational(Training):
    """Variational autoencoder of mixed factors; its loss is the negative evidence bound.

    Args:
        spread: Initial log variance of the code; large values make it explode.
    """

    def __init__(self, seed: int, *, spread: float = 0.0, optimizer: MakeOptimizer | None = None) -> None:
        views = two_views(seed)

        def draw(generator: Generator, size: int) -> tuple[Tensor, Tensor]:
            x = views.draw(generator, size)[0][:, 0]
            return x, x

        task = Task(draw, F.mse_loss, views.score, 32, 32)
        super().__init__(nn.Identity(), task, optimizer or adam(3e-3), seed=seed)
        self.encoder = Chain(32, 16, depth=2, width=48, weight=he())
        self.decoder = Chain(8, 32, depth=2, width=48, weight=he())
        nn.init.constant_(self.encoder.head.bias[8:].data, spread)
        self.noise = Generator().manual_seed(seed)

    def loss(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        code = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=self.noise)
        error = (self.decoder(code) - y).square().sum(1).mean() / 0.2
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        self.score = 1 - error.detach() * 0.2 / (y - y.mean(0)).square().sum(1).mean()
        return error + divergence

    @torch.no_grad()
    def quality(self) -> float:
        x, _ = self.task.draw(Generator().manual_seed(10_000_019 + self.seed), 512)
        error = (self.decoder(self.encoder(x)[:, :8]) - x).square().sum(1).mean()
        return float(1 - error / (x - x.mean(0)).square().sum(1).mean())


class Contrastive(Training):
    """InfoNCE between two views; quality is how often the right partner is nearest among 64.

    Args:
        distance: Use a margin loss on distances, from a plain square root, instead of InfoNCE.
        eps: Added under that square root.
    """

    def __init__(self, seed: int, *, distance: bool = False, eps: float = 1e-6, depth: int = 2) -> None:
        super().__init__(
            Chain(32, 16, depth=depth, width=48, weight=he()), two_views(seed), adam(3e-3), seed=seed
        )
        self.distance, self.eps = distance, eps

    def loss(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        first, second = self.net(x[:, 0]), self.net(x[:, 1])
        if self.distance:
            second = torch.cat([first[:1], second[1:]])  # one pair is the same picture twice
        logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / 0.2
        self.score = (logits.argmax(1) == y).float().mean()
        if not self.distance:
            return F.cross_entropy(logits, y)
        apart = ((first[:, None] - second[None]).square().sum(2) + self.eps).sqrt()
        same = torch.eye(len(y), dtype=torch.bool)
        return apart[same].mean() + F.relu(3 - apart[~same]).mean()

    @torch.no_grad()
    def quality(self) -> float:
        x, y = self.task.draw(Generator().manual_seed(10_000_019 + self.seed), 64)
        first, second = F.normalize(self.net(x[:, 0]), dim=1), F.normalize(self.net(x[:, 1]), dim=1)
        return float(((first @ second.T).argmax(1) == y).float().mean())


class Density(Training):
    """Log-density of a Gaussian with learned mean and variance: a loss that goes far below zero.

    Args:
        noise: Noise of the targets; less noise gives a lower loss.
        floor: Smallest log standard deviation; None lets it collapse.
    """

    def __init__(self, seed: int, *, noise: float = 0.02, floor: float | None = -6.0) -> None:
        task = regression(seed, noise=noise)
        super().__init__(Chain(task.inputs, 2, depth=2, width=48, weight=he()), task, adam(3e-3), seed=seed)
        self.floor = floor

    def loss(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        mean, log_sigma = self.net(x).chunk(2, 1)
        if self.floor is not None:
            log_sigma = log_sigma.clamp(min=self.floor)
        self.score = self.task.score(mean.detach(), y)
        return (log_sigma + 0.5 * ((y - mean) / log_sigma.exp()).square()).mean()

    @torch.no_grad()
    def quality(self) -> float:
        x, y = self.task.draw(Generator().manual_seed(10_000_019 + self.seed), 512)
        return float(self.task.score(self.net(x)[:, :1], y))
