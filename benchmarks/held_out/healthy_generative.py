"""Healthy trainings of densities, and of losses that contain derivatives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.held_out.data import ring_points
from benchmarks.held_out.nets import MLP, xavier_uniform
from benchmarks.held_out.training import Trial, seeded
from benchmarks.zoo.case import Case
from benchmarks.zoo.recipes import adam
from benchmarks.zoo.tasks import Task
from benchmarks.zoo.training import Training

POINTS = Task(ring_points)


def _four_places(generator: torch.Generator, size: int) -> tuple[Tensor]:
    """Return points near four places on a circle around (2, 2)."""
    angle = torch.randint(4, (size,), generator=generator) * math.pi / 2
    places = 2 + torch.stack([angle.cos(), angle.sin()], 1)
    return (places + 0.15 * torch.randn(size, 2, generator=generator),)


class Adversaries(Training):
    """Generator and critic with a hinge loss, each with its optimizer; the generator on every second batch."""

    def __init__(self, seed: int) -> None:
        super().__init__(nn.Identity(), Task(_four_places), adam(2e-3, betas=(0.0, 0.9)), seed=seed)
        self.generator = MLP(4, 2, 2, 32, norm=nn.BatchNorm1d)
        self.critic = MLP(2, 1, 2, 32, activation=lambda x: F.leaky_relu(x, 0.2))
        self.automatic_optimization = False

    def batch(self, number: int) -> Any:
        (points,) = self.task.draw(seeded(self.seed * 999 + number), 64)
        return points

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for_generator, for_critic = self.optimizers()
        fake = self.generator(torch.randn(len(batch), 4))
        self.score = self._nearness(fake.detach())
        loss = F.relu(1 - self.critic(batch)).mean() + F.relu(1 + self.critic(fake.detach())).mean()
        for_critic.zero_grad()
        self.manual_backward(loss)
        for_critic.step()
        if batch_idx % 2 == 0:
            loss = -self.critic(self.generator(torch.randn(len(batch), 4))).mean()
            for_generator.zero_grad()
            self.manual_backward(loss)
            for_generator.step()

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.generator.parameters()), self.make_optimizer(self.critic.parameters())

    @torch.no_grad()
    def quality(self) -> float:
        return float(self._nearness(self.generator(torch.randn(500, 4, generator=seeded(self.seed)))))

    def _nearness(self, made: Tensor) -> Tensor:
        """Return one if the mean of the generated points equals that of the data."""
        return 1 - (made.mean(0) - 2).norm() / 2


class Flow(nn.Module):
    """Four couplings that start as the identity; returns the negative log-density, up to a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(MLP(1, 2, 1, 24, activation=torch.tanh) for _ in range(4))
        for coupling in self.couplings:
            nn.init.zeros_(coupling.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        log_volume = torch.zeros(len(x))
        for k, coupling in enumerate(self.couplings):
            kept, moved = x.split(1, 1) if k % 2 else x.flip(1).split(1, 1)
            log_scale, shift = coupling(kept).chunk(2, 1)
            log_scale = torch.tanh(log_scale)
            moved = moved * log_scale.exp() + shift
            log_volume = log_volume + log_scale[:, 0]
            x = torch.cat([kept, moved] if k % 2 else [moved, kept], 1)
        return 0.5 * x.square().sum(1) - log_volume


def _mean_output(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    return net(batch[0]).mean()


def _flow(seed: int) -> Trial:
    return Trial(Flow(), POINTS, adam(5e-3), seed, objective=_mean_output)


class Denoiser(nn.Module):
    """Net that predicts the noise in a point, given the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP(2 + 8, 2, 3, 48, activation=F.silu)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        phases = time[:, None] * torch.tensor([1.0, 2, 4, 8]) * math.pi / 2
        return self.net(torch.cat([x, phases.sin(), phases.cos()], 1))


def _noise_loss(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    time, noise = torch.rand(len(batch[0])), torch.randn_like(batch[0])
    share = (time * math.pi / 2).cos()[:, None]
    return F.mse_loss(net(share * batch[0] + (1 - share * share).sqrt() * noise, time), noise)


def _denoiser(seed: int) -> Trial:
    return Trial(Denoiser(), POINTS, adam(3e-3), seed, objective=_noise_loss, batch_size=128)


def slope(output: Tensor, inputs: Tensor) -> Tensor:
    """Return derivatives of the outputs by their inputs, which can be differentiated again."""
    (gradient,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
    return gradient


def _score_matching(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    """Match the slope of an energy with noise of width 0.6; the energy's last bias has no effect."""
    noise = torch.randn_like(batch[0]) * 0.6
    x = (batch[0] + noise).requires_grad_()
    return (slope(net(x), x) + noise / 0.36).square().mean() * 0.36


def _energy(seed: int) -> Trial:
    net = MLP(2, 1, 2, 48, activation=F.softplus)
    return Trial(net, POINTS, adam(5e-3), seed, objective=_score_matching, batch_size=128)


def _oscillation(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    """Return the residual of u'' + 4 u = 0 with u = 1 and u' = 0 at the start."""
    time, start = batch[0].clone().requires_grad_(), torch.zeros(1, 1, requires_grad=True)
    u, first = net(time), net(start)
    residual = (slope(slope(u, time), time) + 4 * u).square().mean()
    return residual + 10 * (first - 1).square().mean() + 10 * slope(first, start).square().mean()


def _oscillator(seed: int) -> Trial:
    task = Task(lambda generator, size: (2 * torch.rand(size, 1, generator=generator),))
    net = MLP(1, 1, 3, 24, activation=torch.tanh, weight=xavier_uniform)
    return Trial(net, task, adam(5e-3), seed, objective=_oscillation)


def _sines(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    """Return eight sines of random height and phase, at twenty places each."""
    height = 1 + torch.rand(8, 1, 1, generator=generator)
    phase = 3 * torch.rand(8, 1, 1, generator=generator)
    x = 6 * torch.rand(8, 20, 1, generator=generator) - 3
    return x, height * torch.sin(x + phase)


def _after_one_step(net: nn.Module, batch: tuple[Tensor, ...], number: int) -> Tensor:
    """Return the loss on ten places of each sine after a step on the other ten (second-order MAML)."""
    parameters = dict(net.named_parameters())
    total = torch.zeros(())
    for x, y in zip(*batch, strict=True):
        loss = F.mse_loss(functional_call(net, parameters, (x[:10],)), y[:10])
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
        total = total + F.mse_loss(functional_call(net, moved, (x[10:],)), y[10:])
    return total / 8


def _learn_to_learn(seed: int) -> Trial:
    net = MLP(1, 1, 2, 32, activation=torch.tanh)
    return Trial(net, Task(_sines), adam(5e-3), seed, objective=_after_one_step)


CASES = [
    Case("HF01", "adversaries under a hinge loss, two steps of the critic to one", Adversaries, 0.6),
    Case("HF03", "a normalising flow that starts as the identity", _flow, 0.1),
    Case("HF04", "a denoiser: the loss falls a little, to a floor", _denoiser, 0.2),
    Case("HF05", "an energy by denoising score matching: a bias without a path", _energy, 0.1),
    Case("HG01", "an oscillator's equation as loss: second derivatives", _oscillator, 0.8),
    Case("HG03", "learning to learn: gradients through a step of descent", _learn_to_learn, 0.2, steps=200),
]
