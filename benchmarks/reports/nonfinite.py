"""Reports of NaN and Inf: in the forward pass, the backward pass, buffers, data, and the optimizer's step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.reports.case import Case
from benchmarks.reports.parts import Fit, accuracy, batches, explained, generator, mlp, r2
from lightning_gradguard import Cause, Fault

_DIGITS = load_digits()
_IMAGES, _LABELS = torch.tensor(_DIGITS.data, dtype=torch.float32) / 16, torch.tensor(_DIGITS.target)
_WRONG = (Fault.NONFINITE,)

# R01: a sentence of padding only. Every key of it is masked, so its softmax is over nothing.

_G = generator(101)
_TOKENS = torch.randint(1, 9, (2048, 12), generator=_G)
_LENGTHS = torch.randint(3, 13, (2048, 1), generator=_G)
_LENGTHS[torch.arange(17, 2048, 150)] = 0  # comments that were empty after cleaning
_TOKENS[torch.arange(12) >= _LENGTHS] = 0
_TOPIC = torch.stack([(k == _TOKENS).sum(1) + 0.01 * k for k in range(1, 9)], 1).argmax(1)


class Sentences(Fit):
    """One block of attention over padded sentences; says which token is the most frequent."""

    def __init__(self, variant: str) -> None:
        super().__init__(loss=F.cross_entropy)
        self.variant = variant
        self.embed = nn.Embedding(9, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(32), mlp(32, 64, 8)

    def forward(self, x: Tensor) -> Tensor:
        padded = x == 0
        mask = padded
        if self.variant == "cured":  # a large negative number in place of -inf
            mask = torch.zeros(x.shape).masked_fill(padded, -1e9)
        h = self.embed(x)
        a, _ = self.attention(h, h, h, key_padding_mask=mask)
        if self.variant == "zeroed":
            a = torch.nan_to_num(a)
        h = self.norm(h + a).masked_fill(padded[:, :, None], 0.0)
        return self.head(h.sum(1) / (~padded).sum(1, keepdim=True).clamp(min=1))


def _sentences(variant: str) -> tuple[L.LightningModule, Any]:
    keep = slice(None) if variant != "dropped" else _LENGTHS[:, 0] > 0
    return Sentences(variant), batches(_TOKENS[keep], _TOPIC[keep])


# R02: supervised contrastive loss; of the rarer classes a batch often holds one sample.


class Contrast(Fit):
    """Embedding of digits in the plane, pulled together by class."""

    def __init__(self, variant: str) -> None:
        super().__init__(mlp(64, 128, 64, 3))
        self.variant = variant

    def training_step(self, batch: Any, _: int) -> Tensor:
        z = F.normalize(self.net(batch[0]), dim=1)
        logits = z @ z.T / 0.2
        own = torch.eye(len(z), dtype=torch.bool)
        same = (batch[1][:, None] == batch[1]) & ~own
        logits = logits - logits.max(1, keepdim=True).values.detach()
        total = (logits.exp() * ~own).sum(1, keepdim=True)
        log_p = logits - torch.log(total.clamp(min=1e-8) if self.variant == "clamped" else total)
        count = same.sum(1)
        if self.variant == "cured":
            count = count.clamp(min=1)
        if self.variant == "epsilon":
            count = count + 1e-8
        return -((same * log_p).sum(1) / count).mean()


def _nearest_centre(module: Any) -> Tensor:
    z = F.normalize(module.net(_IMAGES), dim=1)
    centres = torch.stack([z[k == _LABELS].mean(0) for k in range(10)])
    return (torch.cdist(z, centres).argmin(1) == _LABELS).float().mean()


# R03: symmetric normalization of a graph whose edges are correlations: some weighted degrees are negative.


@dataclass
class Graph:
    """A graph as one object: node features, edges [2, E], weights of edges, classes of nodes."""

    x: Tensor
    edge_index: Tensor
    edge_weight: Tensor
    y: Tensor


def _correlations() -> Graph:
    g = generator(103)
    y = torch.randint(0, 3, (240,), generator=g)
    series = (torch.randn(3, 30, generator=g))[y] + 2.0 * torch.randn(240, 30, generator=g)
    weight = torch.corrcoef(series).fill_diagonal_(0)
    edges = (weight.abs() > 0.2).nonzero().T
    x = F.one_hot(y, 3).float() + 0.8 * torch.randn(240, 3, generator=g)
    return Graph(x, edges, weight[edges[0], edges[1]], y)


_GRAPH = _correlations()


class GCN(Fit):
    """Two graph convolutions with the weights divided by the roots of both degrees."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=1e-2)
        self.variant = variant
        self.a, self.b = nn.Linear(3, 32), nn.Linear(32, 3)

    def spread(self, x: Tensor, graph: Graph) -> Tensor:
        row, col = graph.edge_index
        weight = graph.edge_weight.abs() if self.variant == "absolute" else graph.edge_weight
        counted = torch.ones_like(weight) if self.variant == "cured" else weight
        degree = torch.zeros(len(x)).index_add(0, row, counted)
        if self.variant == "clamped":
            degree = degree.clamp(min=1e-8)
        root = degree.pow(-0.5)
        root = torch.where(root == math.inf, torch.zeros_like(root), root)
        return x + torch.zeros_like(x).index_add(0, row, (root[row] * weight * root[col])[:, None] * x[col])

    def forward(self, graph: Graph) -> Tensor:
        h = self.spread(self.a(graph.x), graph).relu()
        return self.spread(self.b(h), graph)

    def training_step(self, batch: Graph, _: int) -> Tensor:
        return F.cross_entropy(self(batch), batch.y)


def _gcn(variant: str) -> tuple[L.LightningModule, Any]:
    return GCN(variant), DataLoader([_GRAPH] * 10, batch_size=None)


# R04: soft actor-critic with actions in [-2, 2]; the correction for tanh takes the scaled action.

_G = generator(104)
_STATES = torch.randn(2048, 4, generator=_G)
_BEST = 1.6 * torch.tanh(_STATES @ torch.randn(4, 2, generator=_G))
_ACTIONS = 4 * torch.rand(2048, 2, generator=_G) - 2
_REWARDS = -((_ACTIONS - _BEST) ** 2).mean(1)


class SoftActorCritic(Fit):
    """A critic of stored transitions, and an actor that follows it."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.actor, self.critic = mlp(4, 64, 64, 4), mlp(6, 64, 64, 1)

    def act(self, s: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(s).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 1).exp(), validate_args=False)
        u = normal.rsample()
        action = 2 * torch.tanh(u)
        if self.variant == "cured":  # the tanh, before it is scaled
            slope = 1 - torch.tanh(u) ** 2 + 1e-6
        elif self.variant == "clamped":
            slope = (1 - action**2).clamp(min=1e-8)
        else:
            slope = 1 - action**2 + 1e-6
        return action, (normal.log_prob(u) - torch.log(slope)).sum(-1)

    def training_step(self, batch: Any, _: int) -> Tensor:
        s, a, r, s_next = batch
        with torch.no_grad():
            a_next, log_p_next = self.act(s_next)
            target = r + 0.5 * (self.critic(torch.cat([s_next, a_next], 1))[:, 0] - 0.05 * log_p_next)
        q_loss = F.mse_loss(self.critic(torch.cat([s, a], 1))[:, 0], target)
        action, log_p = self.act(s)
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        q = functional_call(self.critic, frozen, torch.cat([s, action], 1))[:, 0]
        return q_loss + (0.05 * log_p - q).mean()


def _soft_actor_critic(variant: str) -> tuple[L.LightningModule, Any]:
    return SoftActorCritic(variant), batches(_STATES, _ACTIONS, _REWARDS, _STATES.roll(1, 0))


# R05: forces are the gradient of an energy, so that the loss differentiates twice; an atom without neighbours has a
# vector feature of exactly zero, whose norm has no second derivative.

_G = generator(105)
_ATOMS = torch.randn(1024, 5, 3, generator=_G)
_ATOMS[::3, 4] += 12.0  # one atom far from all others
_CUTOFF = 4.0


def _energy(x: Tensor) -> Tensor:
    d = torch.pdist(x[0])[None] if len(x) == 1 else torch.stack([torch.pdist(m) for m in x])
    return (torch.exp(-((d / 1.5) ** 2))).sum(1)


def _with_forces(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    energy = _energy(x)
    return energy.detach(), -torch.autograd.grad(energy.sum(), x)[0]


_ENERGY, _FORCES = _with_forces(_ATOMS)


class Potential(Fit):
    """Energy of a few atoms from distances, and from the norm of a sum of vectors at each atom."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.radial, self.head = mlp(16, 48, 16, activation=nn.SiLU), mlp(17, 48, 1, activation=nn.SiLU)
        self.register_buffer("centres", torch.linspace(0, _CUTOFF, 16))

    def energy(self, x: Tensor) -> Tensor:
        apart = x[:, :, None] - x[:, None]
        squared = (apart**2).sum(-1) + torch.eye(x.shape[1])
        distance = squared.sqrt()
        near = (torch.cos(distance * math.pi / _CUTOFF) + 1) / 2 * (distance < _CUTOFF)
        near = near * (1 - torch.eye(x.shape[1]))
        message = self.radial(torch.exp(-4 * (distance[..., None] - self.centres) ** 2)) * near[..., None]
        vector = (message[..., :1] * apart).sum(2)
        if self.variant == "cured":  # the norm only where there is a vector
            some = (vector != 0).any(-1)
            safe = torch.where(some[..., None], vector, torch.ones_like(vector))
            norm = torch.where(some, safe.norm(dim=-1), torch.zeros(()))
        elif self.variant == "epsilon":
            norm = ((vector**2).sum(-1) + 1e-12).sqrt()
        else:
            norm = vector.norm(dim=-1)
        return self.head(torch.cat([message.sum(2), norm[..., None]], -1)).sum((1, 2))

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, energy, forces = batch
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            predicted = self.energy(x)
            force = -torch.autograd.grad(predicted.sum(), x, create_graph=True)[0]
        return F.mse_loss(predicted, energy) + F.mse_loss(force, forces)


def _potential(variant: str) -> tuple[L.LightningModule, Any]:
    return Potential(variant), batches(_ATOMS, _ENERGY, _FORCES)


# R06: Adam on float16 weights: its eps of 1e-8 rounds to zero, and pixels that are always black have no gradient.


class HalfAdam(Fit):
    """A net whose weights are float16, or as a fix says."""

    def __init__(self, variant: str) -> None:
        number = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(variant, torch.float16)
        super().__init__(mlp(64, 64, 10).to(number), F.cross_entropy)
        self.variant, self.number = variant, number
        self.eps = {"cured": 1e-4, "lower": 1e-10}.get(variant, 1e-8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(self.number))

    def training_step(self, batch: Any, _: int) -> Tensor:
        logits = self(batch[0])
        return F.cross_entropy(logits.float() if self.variant == "float32_loss" else logits, batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3, eps=self.eps)


def _half_adam(variant: str) -> tuple[L.LightningModule, Any]:
    return HalfAdam(variant), batches(_IMAGES, _LABELS)


# R07: a table standardized by hand; one sensor never changed, so its column is 0 / 0.

_G = generator(107)
_TABLE = torch.randn(1500, 8, generator=_G) * torch.tensor([1.0, 5, 0.2, 3, 1, 1, 9, 2]) + 4
_TABLE[:, 5] = 20.0
_YIELD = (_TABLE[:, 0] - 4) * (_TABLE[:, 2] - 4) * 4 + torch.sin(_TABLE[:, 3])
_YIELD = _YIELD[:, None] / _YIELD.std()


class Table(Fit):
    """Regression on a table that is standardized when it is loaded."""

    def __init__(self, variant: str) -> None:
        super().__init__(mlp(8, 64, 64, 1), lr=5e-3)
        mean, std = _TABLE.mean(0), _TABLE.std(0)
        z = (_TABLE - mean) / (torch.where(std > 0, std, torch.ones(8)) if variant == "cured" else std)
        self.z, self.y = z, _YIELD
        if variant == "filled":
            self.z = torch.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0)


def _table(variant: str) -> tuple[L.LightningModule, Any]:
    module = Table(variant)
    return module, batches(module.z, module.y)


# R08: a hand-written batch norm; the last batch of each epoch holds one row, whose unbiased variance is 0 / 0. Nothing
# is seen of it until the statistics are frozen.

_G = generator(108)
_ROWS = torch.randn(513, 6, generator=_G) * 2 + 1
_ROW_TARGET = torch.tanh(_ROWS[:, :1] - _ROWS[:, 1:2]) + 0.5 * torch.cos(_ROWS[:, 2:3])


class HandNorm(nn.Module):
    """Batch normalization with running statistics of mean and unbiased variance."""

    def __init__(self, width: int, variant: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.variant, self.frozen = variant, False

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.mean, self.variance
        if self.training and not self.frozen:
            mean, variance = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.mean.lerp_(mean, 0.1)
                self.variance.lerp_(x.var(0, unbiased=self.variant != "biased"), 0.1)
        return (x - mean) / (variance + 1e-5).sqrt() * self.weight + self.bias


class FrozenNorm(Fit):
    """Regression whose statistics are frozen after four epochs."""

    def __init__(self, variant: str) -> None:
        super().__init__(
            nn.Sequential(
                nn.Linear(6, 64),
                HandNorm(64, variant),
                nn.ReLU(),
                nn.Linear(64, 64),
                nn.ReLU(),
                nn.Linear(64, 1),
            )
        )

    def on_train_epoch_start(self) -> None:
        if self.current_epoch >= 4:
            for part in self.net:
                if isinstance(part, HandNorm):
                    part.frozen = True


def _frozen_norm(variant: str) -> tuple[L.LightningModule, Any]:
    return FrozenNorm(variant), batches(_ROWS, _ROW_TARGET, drop_last=variant == "cured")


# R09: the angle between rotations as acos of a product of quaternions that may be exactly 1.

_G = generator(109)
_TURN = F.normalize(torch.tensor([1.0, 0, 0, 0]) + 0.6 * torch.randn(2048, 4, generator=_G), dim=1)
_TURN[::10] = torch.tensor([1.0, 0, 0, 0])  # not turned at all


def _rotated(q: Tensor) -> Tensor:
    points = torch.randn(4, 3, generator=generator(9)).expand(len(q), 4, 3)
    w, v = q[:, None, :1], q[:, None, 1:].expand(-1, 4, -1)
    t = 2 * torch.linalg.cross(v, points)
    return (points + w * t + torch.linalg.cross(v, t)).flatten(1)


_SEEN = _rotated(_TURN)


class Pose(Fit):
    """Quaternion from the positions of four points; it starts at no rotation."""

    def __init__(self, variant: str) -> None:
        super().__init__(mlp(12, 64, 64, 4))
        self.variant = variant
        nn.init.zeros_(self.net[-1].weight)
        with torch.no_grad():
            self.net[-1].bias.copy_(torch.tensor([1.0, 0, 0, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x), dim=1)

    def training_step(self, batch: Any, _: int) -> Tensor:
        product = (self(batch[0]) * batch[1]).sum(1).abs()
        most = 1 - 1e-6 if self.variant == "cured" else 1.0
        return 2 * torch.acos(product.clamp(-most, most)).mean()


def _pose_score(module: Any) -> Tensor:
    """Share of the mean angle that is predicted."""
    angle = torch.acos((module(_SEEN) * _TURN).sum(1).abs().clamp(max=1))
    return 1 - angle.mean() / torch.acos(_TURN[:, 0].abs().clamp(max=1)).mean()


def _pose(variant: str) -> tuple[L.LightningModule, Any]:
    return Pose(variant), batches(_SEEN, _TURN)


# R10: a mixture of normal densities; far from all components the sum of densities is 0, and its logarithm -inf.

_G = generator(110)
_ANGLE = 4 * torch.rand(2048, 1, generator=_G) - 2
_SHOT = torch.where(_ANGLE > 1.2, 25.0 + 4 * _ANGLE, 2 * torch.sin(3 * _ANGLE)) + 0.1 * torch.randn(
    2048, 1, generator=_G
)


class Mixture(Fit):
    """Mixture density network of five components."""

    def __init__(self, variant: str) -> None:
        super().__init__(mlp(1, 64, 64, 15, activation=nn.Tanh), lr=5e-3)
        self.variant = variant

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, mean, spread = self.net(x).chunk(3, 1)
        return logits, 10 * mean, F.softplus(spread) + 0.05

    def training_step(self, batch: Any, _: int) -> Tensor:
        logits, mean, spread = self.parts(batch[0])
        exponent = -0.5 * ((batch[1] - mean) / spread) ** 2
        if self.variant == "cured":
            return -torch.logsumexp(logits.log_softmax(1) + exponent - spread.log(), 1).mean()
        density = (logits.softmax(1) * exponent.exp() / spread).sum(1)
        if self.variant == "clamped":
            density = density.clamp(min=1e-8)
        return -density.log().mean()

    def forward(self, x: Tensor) -> Tensor:
        logits, mean, _ = self.parts(x)
        return (logits.softmax(1) * mean).sum(1, keepdim=True)


def _mixture(variant: str) -> tuple[L.LightningModule, Any]:
    return Mixture(variant), batches(_ANGLE, _SHOT)


# R48: the weight of a diffusion step is divided by its ratio of signal to noise, which is 0 at the last step.

_G = generator(148)
_SIGNALS = torch.tanh(torch.randn(3072, 2, generator=_G) @ torch.randn(2, 16, generator=_G))
_WHEN = torch.randint(0, 100, (3072,), generator=_G)
_STATIC = torch.randn(3072, 16, generator=_G)


class Velocity(Fit):
    """Diffusion model that predicts the velocity, with steps weighted by their ratio of signal to noise."""

    def __init__(self, variant: str) -> None:
        super().__init__(mlp(17, 128, 128, 16, activation=nn.SiLU))
        self.variant = variant
        root = torch.cos(torch.arange(100) / 99 * math.pi / 2)
        root[-1] = 0.0  # rescaled, so that the last step holds no signal
        self.register_buffer("signal", root)
        self.register_buffer("noise", (1 - root**2).sqrt())

    def forward(self, x: Tensor, noise: Tensor, when: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.signal[when, None], self.noise[when, None]
        return self.net(torch.cat([a * x + b * noise, when[:, None] / 50 - 1], 1)), a * noise - b * x

    def training_step(self, batch: Any, _: int) -> Tensor:
        x = batch[0]
        when = torch.randint(0, 100, (len(x),))
        velocity, true = self(x, torch.randn_like(x), when)
        ratio = (self.signal[when] / self.noise[when].clamp(min=1e-3)) ** 2
        capped = ratio.clamp(max=5.0)
        if self.variant == "cured":
            weight = capped / (ratio + 1)
        else:
            weight = capped / (ratio + (1e-8 if self.variant == "epsilon" else 0.0)) * ratio / (ratio + 1)
        return (weight[:, None] * (velocity - true) ** 2).mean()


def _velocity_told(module: Any) -> Tensor:
    return explained(*module(_SIGNALS, _STATIC, _WHEN))


# R49: the sum over all alignments in logarithms, from a start of -inf: where all ways are impossible, logsumexp has
# a value and no gradient.

_G = generator(149)
_SPOKEN = torch.randint(1, 5, (2048, 2), generator=_G)
_FRAMES = torch.zeros(2048, 8, 5)
_FRAMES[torch.arange(2048)[:, None], torch.tensor([1, 2]), _SPOKEN[:, :1]] = 1.0
_FRAMES[torch.arange(2048)[:, None], torch.tensor([5, 6]), _SPOKEN[:, 1:]] = 1.0
_FRAMES += 0.3 * torch.randn(2048, 8, 5, generator=_G)


class Alignment(Fit):
    """Recognizer of two spoken words, trained by a forward algorithm of its own."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=5e-3)
        self.never = torch.finfo(torch.float32).min / 4 if variant == "cured" else -math.inf
        self.rnn, self.head = nn.GRU(5, 32, batch_first=True, bidirectional=True), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).log_softmax(-1)

    def training_step(self, batch: Any, _: int) -> Tensor:
        log_p, words = self(batch[0]), batch[1]
        blank = torch.zeros_like(words[:, 0])
        states = torch.stack([blank, words[:, 0], blank, words[:, 1], blank], 1)
        emitted = log_p.gather(2, states[:, None].expand(-1, log_p.shape[1], -1))
        skip = torch.zeros(states.shape, dtype=torch.bool)
        skip[:, 3] = words[:, 0] != words[:, 1]
        alpha = F.pad(emitted[:, 0, :2], (0, 3), value=self.never)
        for t in range(1, emitted.shape[1]):
            one = F.pad(alpha[:, :-1], (1, 0), value=self.never)
            two = F.pad(alpha[:, :-2], (2, 0), value=self.never).masked_fill(~skip, self.never)
            alpha = torch.stack([alpha, one, two]).logsumexp(0) + emitted[:, t]
        return -alpha[:, 3:].logsumexp(1).mean()


def _heard(module: Any) -> Tensor:
    """Share of recordings whose words are all right, decoded greedily."""
    best = module(_FRAMES).argmax(-1)
    heard = [torch.unique_consecutive(row) for row in best]
    return (
        torch.tensor([h[h > 0].tolist() == w.tolist() for h, w in zip(heard, _SPOKEN, strict=True)])
        .float()
        .mean()
    )


CASES = (
    Case(
        "R01",
        "A comment of padding only: attention over a mask that leaves no key",
        "pytorch/pytorch #40932",
        _sentences,
        accuracy(_TOKENS, _TOPIC),
        0.8,
        faults=_WRONG,
        causes=(Cause.LOSS_FUNCTION, Cause.BAD_DATA, Cause.NORMALIZATION),
        fixes={
            r"nan_to_num": "zeroed",
            r"(drop|skip|remove|leave out).*(pad|empty|masked)": "dropped",
            r"mask|softmax|-inf|finfo": "cured",
        },
        steps=200,
        kin=("transformer", "backward"),
    ),
    Case(
        "R02",
        "Supervised contrastive loss on batches in which a class has one sample: 0 / 0 positives",
        "HobbitLong/SupContrast #141",
        lambda variant: (Contrast(variant), batches(_IMAGES, _LABELS, size=24)),
        _nearest_centre,
        0.75,
        faults=_WRONG,
        causes=(Cause.LOSS_FUNCTION, Cause.NORMALIZATION, Cause.OUTLIER_BATCH),
        fixes={
            r"logarithm|log\(": "clamped",
            r"1e-8|\beps": "epsilon",
            r"divi|denominator|count|ratio|positive pair": "cured",
        },
        steps=200,
        kin=("contrastive",),
    ),
    Case(
        "R03",
        "Graph convolution over signed edge weights: a negative degree to the power of -1/2",
        "pyg-team/pytorch_geometric #61",
        _gcn,
        lambda module: (module(_GRAPH).argmax(1) == _GRAPH.y).float().mean(),
        0.7,
        faults=_WRONG,
        causes=(Cause.LOSS_FUNCTION, Cause.NORMALIZATION, Cause.BAD_DATA),
        fixes={
            r"degree|ones_like": "cured",
            r"\babs\b|absolute|negative": "absolute",
            r"pow\b|power|\*\*|root|base": "clamped",
        },
        steps=150,
        kin=("graph",),
    ),
    Case(
        "R04",
        "Soft actor-critic with actions in [-2, 2]: log of 1 - action^2 below zero",
        "philtabor/Actor-Critic-Methods-Paper-To-Code #7",
        _soft_actor_critic,
        lambda module: explained(2 * torch.tanh(module.actor(_STATES)[:, :2]), _BEST),
        0.85,
        faults=_WRONG,
        causes=(Cause.LOSS_FUNCTION,),
        fixes={
            r"tanh|log1p|softplus|before .*scal": "cured",
            r"logarithm|log\(": "clamped",
        },
        steps=400,
        kin=("reinforcement",),
    ),
    Case(
        "R05",
        "Forces from an energy: the norm of a zero vector, differentiated twice",
        "torchmd/torchmd-net #77",
        _potential,
        lambda module: explained(module.energy(_ATOMS), _ENERGY),
        0.8,
        faults=_WRONG,
        causes=(Cause.LOSS_FUNCTION, Cause.NORMALIZATION),
        fixes={
            r"where|mask": "cured",
            r"1e-12|\beps|root|sqrt|\bnorm\b": "epsilon",
        },
        steps=200,
        kin=("double backward",),
    ),
    Case(
        "R06",
        "Adam on float16 weights: eps rounds to zero, 0 / 0 for weights without a gradient",
        "discuss.pytorch.org/t/1765",
        _half_adam,
        accuracy(_IMAGES, _LABELS),
        0.85,
        faults=_WRONG,
        causes=(Cause.LOW_PRECISION, Cause.OPTIMIZER_EPSILON),
        fixes={
            r"lower .*eps": "lower",
            r"\beps\b|epsilon": "cured",
            r"bfloat16|bf16": "bfloat16",
            r"logits\.float": "float32_loss",
            r"float32|master|16-mixed|loss scaling": "float32",
        },
        steps=200,
        kin=("mixed precision",),
    ),
    Case(
        "R07",
        "A column that never changes, divided by its standard deviation",
        "fastai/fastai #889",
        _table,
        lambda module: explained(module(module.z), module.y),
        0.8,
        faults=_WRONG,
        causes=(Cause.BAD_DATA,),
        fixes={
            r"nan_to_num|replace nan|fill": "filled",
            r"std|column|feature|constant": "cured",
        },
        steps=400,
        kin=("data",),
    ),
    Case(
        "R08",
        "A last batch of one row makes a running variance NaN; seen when the statistics are frozen",
        "facebookresearch/SparseConvNet #190",
        _frozen_norm,
        r2(_ROWS, _ROW_TARGET),
        0.8,
        faults=_WRONG,
        causes=(Cause.NORMALIZATION, Cause.BAD_DATA, Cause.LOSS_FUNCTION),
        fixes={
            r"drop_last|one row|one element|one example|batch of one": "cured",
            r"unbiased|correction|running|buffer|variance": "biased",
        },
        steps=200,
        kin=("buffer",),
    ),
    Case(
        "R09",
        "Angle between rotations by acos of exactly 1",
        "kornia/kornia #4007",
        _pose,
        _pose_score,
        0.7,
        faults=_WRONG,
        causes=(Cause.LOSS_FUNCTION,),
        fixes={r"acos|arccos|atan2": "cured"},
        steps=300,
        kin=("backward", "geometry"),
    ),
    Case(
        "R10",
        "Mixture density network: the logarithm of a sum of densities that are all 0",
        "mlberkeley/scae-pytorch #4",
        _mixture,
        r2(_ANGLE, _SHOT),
        0.8,
        faults=_WRONG,
        causes=(Cause.LOSS_FUNCTION,),
        fixes={
            r"logsumexp|log-sum-exp|log_softmax": "cured",
            r"logarithm|log\(": "clamped",
        },
        steps=500,
        kin=("density",),
    ),
    Case(
        "R48",
        "Weights of diffusion steps divided by a ratio of signal to noise of 0",
        "kohya-ss/sd-scripts #934",
        lambda variant: (Velocity(variant), batches(_SIGNALS)),
        _velocity_told,
        0.4,
        faults=_WRONG,
        causes=(Cause.LOSS_FUNCTION, Cause.NORMALIZATION),
        fixes={
            r"ratio \+ 1\b|\+ 1\)": "cured",
            r"denominator|1e-8|\beps|divi": "epsilon",
        },
        steps=400,
        kin=("diffusion",),
    ),
    Case(
        "R49",
        "A forward algorithm in logarithms that starts at -inf: logsumexp of impossible ways has no gradient",
        "pytorch/pytorch #31829",
        lambda variant: (Alignment(variant), batches(_FRAMES, _SPOKEN)),
        _heard,
        0.8,
        faults=_WRONG,
        causes=(Cause.LOSS_FUNCTION,),
        fixes={r"-inf|finfo|-1e\d|finite": "cured"},
        steps=150,
        kin=("recurrent", "backward"),
    ),
)
