"""Healthy trainings of codes: quantised, from a teacher, masked, or of words and users."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out.data import digit_pictures, digit_vectors, templates, views
from benchmarks.held_out.nets import MLP, VisionTransformer
from benchmarks.held_out.training import Trial, measured_accuracy, seeded
from benchmarks.zoo.case import Case
from benchmarks.zoo.recipes import adam, adamw
from benchmarks.zoo.tasks import Task


class Quantised(nn.Module):
    """Autoencoder through the nearest of 32 codes; the gradient is copied past the selection."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = MLP(64, 8, 1, 48), MLP(8, 64, 1, 48)
        self.codes = nn.Parameter(torch.randn(32, 8) * 0.3)


def _quantised_loss(net: Quantised, batch: tuple[Tensor, ...], number: int) -> Tensor:
    code = net.encoder(batch[0])
    nearest = net.codes[torch.cdist(code.detach(), net.codes.detach()).argmin(1)]
    output = net.decoder(code + (nearest - code).detach())
    drawn = F.mse_loss(nearest, code.detach()) + 0.25 * F.mse_loss(code, nearest.detach())
    return F.mse_loss(output, batch[0]) + drawn


def _quantised(seed: int) -> Trial:
    return Trial(Quantised(), digit_vectors(), adam(3e-3), seed, objective=_quantised_loss)


@torch.no_grad()
def _follow(net: Any) -> None:
    """Move the teacher a little towards the student."""
    for student, teacher in zip(net.student.parameters(), net.teacher.parameters(), strict=True):
        teacher.lerp_(student, 0.02)


class Bootstrapped(nn.Module):
    """Student that predicts its slow teacher's code of another view (BYOL)."""

    def __init__(self) -> None:
        super().__init__()
        self.student = MLP(64, 16, 2, 48, norm=nn.BatchNorm1d)
        self.predictor = MLP(16, 16, 1, 32)
        self.teacher = MLP(64, 16, 2, 48, norm=nn.BatchNorm1d)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)


def _foretold(net: Bootstrapped, batch: tuple[Tensor, ...], number: int) -> Tensor:
    predicted = net.predictor(net.student(batch[0]))
    with torch.no_grad():
        code = net.teacher(batch[1])
    return 2 - 2 * F.cosine_similarity(predicted, code, dim=1).mean()


def _bootstrapped(seed: int) -> Trial:
    return Trial(Bootstrapped(), views(seed), adam(3e-3), seed, objective=_foretold, after=_follow)


class Taught(nn.Module):
    """Student, and a teacher that is its running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = MLP(64, 10, 2, 40), MLP(64, 10, 2, 40)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)


def _consistency(net: Taught, batch: tuple[Tensor, ...], number: int) -> Tensor:
    """Combine sixteen labels with agreement with the teacher on all examples, weighted more and more."""
    x, y = batch
    with torch.no_grad():
        target = net.teacher(x + 0.3 * torch.randn_like(x)).softmax(1)
    output = net.student(x + 0.3 * torch.randn_like(x))
    agreement = min(1.0, number / 100) * 5 * F.mse_loss(output.softmax(1), target)
    return F.cross_entropy(output[:16], y[:16]) + agreement


def _mean_teacher(seed: int) -> Trial:
    def measure(net: Taught, batch: tuple[Tensor, ...]) -> Tensor:
        return measured_accuracy(net.student, batch)

    return Trial(
        Taught(),
        templates(seed),
        adam(3e-3),
        seed,
        objective=_consistency,
        measure=measure,
        after=_follow,
    )


class Masked(nn.Module):
    """Transformer that fills in masked patches."""

    def __init__(self) -> None:
        super().__init__()
        self.base = VisionTransformer(4)
        self.mask = nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        patches = torch.where(hidden[:, :, None], self.mask, self.base.patches(x))
        return self.base.out(self.base.encode(patches + self.base.pos[:, 1:]))


def _filled_in(net: Masked, batch: tuple[Tensor, ...], number: int) -> Tensor:
    hidden = torch.rand(len(batch[0]), 16) < 0.5
    patches = F.unfold(batch[0], 2, stride=2).transpose(1, 2)
    return (net(batch[0], hidden) - patches).square()[hidden].mean()


def _masked(seed: int) -> Trial:
    return Trial(Masked(), digit_pictures(), adamw(3e-3), seed, objective=_filled_in, batch_size=32)


class Vectors(nn.Module):
    """Two embedding tables."""

    def __init__(self, left: int, right: int, width: int) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(left, width), nn.Embedding(right, width)


def _negative_samples(net: Vectors, batch: tuple[Tensor, ...], number: int) -> Tensor:
    word = net.left(batch[0])
    near = F.softplus(-(word * net.right(batch[1])).sum(1)).mean()
    return near + F.softplus((word[:, None] * net.right(batch[2])).sum(2)).sum(1).mean()


def _words(seed: int) -> Trial:
    """Return Zipf-distributed words with a neighbour from the same group of ten, and five others for each."""
    share = 1 / (torch.arange(500) + 2.0)

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
        word = torch.multinomial(share, size, True, generator=generator)
        near = (word // 10) * 10 + torch.randint(10, (size,), generator=generator)
        others = torch.multinomial(share**0.75, size * 5, True, generator=generator).view(size, 5)
        return word, near, others

    net = Vectors(500, 500, 16)
    nn.init.normal_(net.left.weight, std=0.1)
    nn.init.zeros_(net.right.weight)
    return Trial(net, Task(draw), adam(2e-2), seed, objective=_negative_samples, batch_size=256)


def _ratings(seed: int) -> Trial:
    """Return ratings by 200 users of 300 items, of rank four."""
    users, things = (
        torch.randn(200, 4, generator=seeded(seed)),
        torch.randn(300, 4, generator=seeded(seed + 1)),
    )

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
        user = torch.randint(200, (size,), generator=generator)
        thing = torch.randint(300, (size,), generator=generator)
        return user, thing, (users[user] * things[thing]).sum(1) / 2

    def objective(net: Vectors, batch: tuple[Tensor, ...], number: int) -> Tensor:
        return F.mse_loss((net.left(batch[0]) * net.right(batch[1])).sum(1), batch[2])

    net = Vectors(200, 300, 8)
    for table in (net.left, net.right):
        nn.init.normal_(table.weight, std=0.3)
    return Trial(net, Task(draw), adam(2e-2), seed, objective=objective, batch_size=256)


CASES = [
    Case("HE03", "quantised autoencoder, gradient copied past the choice", _quantised, 0.2),
    Case("HE07", "a code from a teacher that follows slowly", _bootstrapped, 0.3),
    Case("HE08", "mean teacher, whose say grows", _mean_teacher, 0.8),
    Case("HE09", "masked autoencoder", _masked, 0.3),
    Case("HE10", "word vectors by negative samples, contexts from zero", _words, 0.15),
    Case("HE11", "matrix factorisation: embeddings and nothing else", _ratings, 0.3),
]
