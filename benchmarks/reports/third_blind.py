"""A third ten reports, chosen and rebuilt without the product at hand."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.reports.case import Case
from benchmarks.reports.parts import Fit, accuracy, batches, explained, generator, mlp, r2
from benchmarks.reports.supervised import Supervised, adam, sgd
from lightning_gradguard import Cause, Fault

_DIGITS = load_digits()
_IMAGES = torch.tensor(_DIGITS.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16
_LABELS = torch.tensor(_DIGITS.target)

# R71: a Dice loss over masks that were cut at a threshold, made a leaf so that backward runs.

_G = generator(371)
_CELLS = 0.6 * torch.randn(768, 1, 16, 16, generator=_G)
_OUTLINES = torch.zeros(768, 1, 16, 16)
for _n in range(768):
    _i, _j, _k = (int(torch.randint(0, _m, (), generator=_G)) for _m in (9, 9, 3))
    _OUTLINES[_n, :, _i : _i + 5 + _k, _j : _j + 5 + _k] = 1.0
_CELLS += _OUTLINES


class Dice(Fit):
    """Small convolutional net for segmentation with a Dice loss."""

    def __init__(self, variant: str) -> None:
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 1, 1),
        )
        super().__init__(net, lr=5e-3)
        self.variant = variant

    def training_step(self, batch: Any, _: int) -> Tensor:
        p = self(batch[0]).sigmoid()
        found = (p > 0.5).float()
        if self.variant == "cured":
            found = p
        elif self.variant == "straight":
            found = found + p - p.detach()
        else:
            found.requires_grad_()
        both, each = (found * batch[1]).sum(), (found + batch[1]).sum()
        return 1 - (2 * both + 1) / (each + 1)


def _overlap(module: Any) -> Tensor:
    """Common part of mask and prediction, of all that is either."""
    found, there = module(_CELLS) > 0, _OUTLINES > 0
    return (found & there).sum() / (found | there).sum()


# R72: an autoencoder whose error is averaged over the pixels, and whose divergence is summed over the codes.

_G = generator(372)
_AT = 10 * torch.rand(2048, 2, 1, generator=_G) + 3
_GRID = torch.arange(16.0)
_NEAR_ROW, _NEAR_COLUMN = (torch.exp(-(((_GRID - _AT[:, _k]) / 2.5) ** 2)) for _k in (0, 1))
_BLOBS = (_NEAR_ROW[:, :, None] * _NEAR_COLUMN[:, None]).flatten(1)
_BLOBS += 0.05 * torch.randn(_BLOBS.shape, generator=_G)


class Autoencoder(Fit):
    """Variational autoencoder of images with one bright blob."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=2e-3)
        self.variant = variant
        self.encoder, self.decoder = mlp(256, 128, 2 * 6), mlp(6, 128, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x)[:, :6])

    def training_step(self, batch: Any, _: int) -> Tensor:
        mean, log_variance = self.encoder(batch[0]).chunk(2, 1)
        output = self.decoder(mean + (log_variance / 2).exp() * torch.randn_like(mean))
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
        if self.variant == "annealed":
            divergence = min(1.0, self.global_step / 300) * divergence
        error = (output - batch[0]) ** 2
        return divergence + (error.sum(1).mean() if self.variant == "cured" else error.mean())


# R73: many convolutions, one after the other, with nothing that keeps the signal's size.


def _deep(variant: str) -> nn.Sequential:
    class Block(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            return x + h if variant == "residual" and x.shape == h.shape else h

    blocks: list[nn.Module] = []
    for n in range(4 if variant == "shallow" else 16):
        layers: list[nn.Module] = [nn.Conv2d(16 if n else 1, 16, 3, padding=1)]
        if variant in ("normalized_he", "he"):
            nn.init.kaiming_normal_(layers[0].weight, nonlinearity="relu")
            nn.init.zeros_(layers[0].bias)
        if variant in ("cured", "normalized_he"):
            layers.append(nn.BatchNorm2d(16))
        blocks.append(Block(*layers, nn.ReLU()))
        if n in (3, 9):
            blocks.append(nn.MaxPool2d(2))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


# R74: a straight line through numbers up to a hundred, by gradient descent with a rate of 0.01.

_G = generator(374)
_FLATS = torch.rand(1024, 2, generator=_G) * torch.tensor([100.0, 60.0])
_PRICES = _FLATS @ torch.tensor([[5.0], [-2.0]]) + 3 + 5 * torch.randn(1024, 1, generator=_G)


class Line(Supervised):
    """Linear regression of prices on sizes and ages."""

    def __init__(self, variant: str) -> None:
        rate = {"cured": 1e-4, "tenth": 1e-3}.get(variant, 1e-2)
        net = (
            nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)) if variant == "normalized" else nn.Linear(2, 1)
        )
        super().__init__(net, F.mse_loss, adam(1e-2) if variant == "adam" else sgd(rate))
        self.mean, self.std = torch.zeros(2), torch.ones(2)
        self.price, self.spread = 0.0, 1.0
        if variant == "standardized":
            self.mean, self.std = _FLATS.mean(0), _FLATS.std(0)
        if variant == "targets":
            self.price, self.spread = float(_PRICES.mean()), float(_PRICES.std())

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std) * self.spread + self.price

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.loss((self(batch[0]) - self.price) / self.spread, (batch[1] - self.price) / self.spread)


# R75: an error of values that is clipped before it is squared: where it is large, nothing is learnt.

_RANGE, _DISCOUNT = 20, 0.85
_POSITIONS = torch.arange(-_RANGE, _RANGE + 1.0)
_AFTER = (_POSITIONS[:, None] + torch.tensor([-1.0, 0.0, 1.0])).clamp(-_RANGE, _RANGE)
_WORTH = torch.zeros(len(_POSITIONS), 3)
for _n in range(200):
    _WORTH = -_AFTER.abs() + _DISCOUNT * _WORTH.amax(1)[(_AFTER + _RANGE).long()]
_G = generator(375)
_VISITED = torch.randint(0, len(_POSITIONS), (2048,), generator=_G)
_TAKEN = torch.randint(0, 3, (2048,), generator=_G)


class Values(Fit):
    """Deep Q-learning on a line: each step costs the distance from its middle."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=5e-3)
        self.variant, self.unit = variant, 50.0 if variant == "scaled" else 1.0
        self.net, self.target = mlp(1, 64, 64, 3), mlp(1, 64, 64, 3)
        self.target.load_state_dict(self.net.state_dict())
        self.target.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, None] / _RANGE)

    def training_step(self, batch: Any, step: int) -> Tensor:
        if self.global_step % 10 == 0:
            self.target.load_state_dict(self.net.state_dict())
        place, action = batch
        after = _AFTER[place, action]
        later = self.target(after[:, None] / _RANGE).amax(1)
        value = self(_POSITIONS[place]).gather(1, action[:, None])[:, 0]
        error = -after.abs() / self.unit + _DISCOUNT * later - value
        if self.variant == "cured":
            return F.huber_loss(error, torch.zeros_like(error))
        if self.variant == "squared":
            return (error**2).mean()
        return (error.clamp(-1, 1) ** 2).mean()


# R76: focal loss from probabilities: where the net is sure, one of its two logarithms is that of 0.

_G = generator(376)
_ANCHORS = torch.randn(4096, 12, generator=_G)
_OBJECTS = (_ANCHORS[:, :1] + _ANCHORS[:, 1:2] * _ANCHORS[:, 2:3].sign() > 1.2).float()
_ANCHORS *= torch.exp(1.2 * torch.randn(4096, 1, generator=_G))  # near and far objects


class Focal(Fit):
    """Classifier of anchors, most of which hold nothing, with a focal loss."""

    def __init__(self, variant: str) -> None:
        super().__init__(mlp(12, 96, 96, 1), lr=3e-3)
        self.variant = variant

    def training_step(self, batch: Any, _: int) -> Tensor:
        output, y = self(batch[0]), batch[1]
        p = output.sigmoid()
        if self.variant == "logits":
            of_one, of_none = F.logsigmoid(output), F.logsigmoid(-output)
        elif self.variant == "epsilon":
            of_one, of_none = (p + 1e-6).log(), (1 - p + 1e-6).log()
        else:
            if self.variant == "cured":
                p = p.clamp(1e-6, 1 - 1e-6)
            of_one, of_none = p.log(), (1 - p).log()
        weight = (0.75 * y + 0.25 * (1 - y)) * (y * (1 - p) + (1 - y) * p) ** 2
        return -(weight * (y * of_one + (1 - y) * of_none)).sum() / y.sum().clamp(min=1)


def _found(module: Any) -> Tensor:
    """Share of objects that are found, less that of false alarms."""
    found = module(_ANCHORS) > 0
    return found[_OBJECTS == 1].float().mean() - found[_OBJECTS == 0].float().mean()


# R77: gaps in what was measured are NaN, and are multiplied by a mask of zeros.

_G = generator(377)
_FORECASTS = torch.randn(2048, 10, generator=_G)
_MEASURED = torch.sin(1.5 * _FORECASTS[:, :5]) + 0.5 * _FORECASTS[:, 5:]
_WHOLE = _MEASURED.clone()
_MEASURED[torch.rand(2048, 5, generator=_G) < 0.04] = torch.nan


class Gaps(Fit):
    """Regression at five stations, each of which fails at times."""

    def __init__(self, variant: str) -> None:
        super().__init__(mlp(10, 96, 96, 5), lr=3e-3)
        self.variant = variant

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        there = ~y.isnan()
        if self.variant == "filled":
            return F.mse_loss(self(x), y.nan_to_num())
        if self.variant == "dropped":
            rows = there.all(1)
            return F.mse_loss(self(x[rows]), y[rows])
        if self.variant == "cured":
            y = torch.where(there, y, 0.0)
        return ((self(x) - y) ** 2 * there).sum() / there.sum()


# R78: a net of small convolutions at a rate of 0.1: its outputs die in the first steps.


_WHITE = (_IMAGES - _IMAGES.mean()) / _IMAGES.std()


def _network_in_network(variant: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o, k in ((1, 48, 5), (48, 40, 1), (40, 24, 1), (24, 48, 3), (48, 48, 1), (48, 10, 1)):
        layers.append(nn.Conv2d(i, o, k, padding=k // 2))
        nn.init.normal_(layers[-1].weight, std=0.2)
        nn.init.zeros_(layers[-1].bias)
        if variant == "he":
            nn.init.kaiming_normal_(layers[-1].weight, nonlinearity="relu")
        if variant == "normalized":
            layers.append(nn.BatchNorm2d(o))
        if o != 10 or variant != "linear_end":
            layers.append(nn.LeakyReLU(0.1) if variant == "leaky" else nn.ReLU())
        if o == 24:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _sure_of_one(variant: str) -> Supervised:
    rate = {"cured": 0.01, "halved": 0.05}.get(variant, 0.1)
    momentum = 0.5 if variant == "slower" else 0.95
    return Supervised(_network_in_network(variant), F.cross_entropy, sgd(rate, momentum, weight_decay=1e-4))


# R79: a recurrent net with gates, and ReLU where tanh was.

_G = generator(379)
_TRACES = torch.randn(1024, 240, 6, generator=_G).abs()
_LOUD = (_TRACES[:, -16:, 0] - _TRACES[:, -16:, 1]).sum(1)
_LOUD = ((_LOUD - _LOUD.mean()) / _LOUD.std())[:, None]


class Gated(Fit):
    """LSTM of one layer, made step by step, that judges a long trace by its last state."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=5e-4 if variant == "lowered" else 5e-3)
        self.truncated = variant == "truncated"
        self.activation = torch.tanh if variant == "cured" else torch.relu
        self.inner, self.carry, self.head = (
            nn.Linear(6, 4 * 24),
            nn.Linear(24, 4 * 24, bias=False),
            nn.Linear(24, 1),
        )
        nn.init.xavier_uniform_(self.inner.weight)
        nn.init.orthogonal_(self.carry.weight)
        with torch.no_grad():
            self.inner.bias.zero_()
            self.inner.bias[24:48] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 24)
        for n, u in enumerate(self.inner(x).unbind(1)):
            if self.truncated and n % 20 == 0:
                h, c = h.detach(), c.detach()
            i, f, g, o = (u + self.carry(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * self.activation(g)
            h = o.sigmoid() * self.activation(c)
        return self.head(h)


# R80: a transformer that was made with bfloat16 goes on in float16: what its inner layers give is more than it holds.

_G = generator(380)
_PHRASES = torch.randint(0, 12, (2048, 10), generator=_G)
_SORT = (_PHRASES[:, 1:] > 7).sum(1).clamp(1, 4) - 1


class Norm(nn.Module):
    """Root mean square normalization in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)


class Layer(nn.Module):
    """Attention and an inner layer, each after a normalization; its sums are large, as those of a trained T5."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.before, self.between = Norm(), Norm()
        self.attention = nn.MultiheadAttention(48, 4, bias=False, batch_first=True)
        self.wide, self.narrow = nn.Linear(48, 96, bias=False), nn.Linear(96, 48, bias=False)
        with torch.no_grad():
            self.attention.out_proj.weight *= 5000.0
            self.wide.weight *= 115.0
            self.narrow.weight *= 700.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        x = x + self.kept(self.attention(h, h, h, need_weights=False)[0])
        h = self.kept(self.wide(self.between(x)).relu())
        return x + self.kept(self.narrow(h))

    def kept(self, x: Tensor) -> Tensor:
        return x.clamp(-6e4, 6e4) if self.variant == "clamped" else x


class Translator(Fit):
    """Small encoder in the manner of T5, run in half precision."""

    def __init__(self, variant: str) -> None:
        super().__init__(loss=F.cross_entropy, lr=5e-3)
        self.half = {"cured": torch.bfloat16, "float32": torch.float32}.get(variant, torch.float16)
        self.token, self.place = nn.Embedding(12, 48), nn.Embedding(10, 48)
        self.layers = nn.Sequential(Layer(variant), Layer(variant), Norm())
        self.head = nn.Linear(48, 4)
        with torch.no_grad():
            self.token.weight *= 1e4

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.half, enabled=self.half != torch.float32):
            h = self.layers(self.token(x) + self.place.weight)
            return self.head(h.mean(1)).float()


CASES = (
    Case(
        "R71",
        "A Dice loss over masks cut at a threshold, with requires_grad set on the result",
        "qubvel-org/segmentation_models.pytorch #611",
        lambda variant: (Dice(variant), batches(_CELLS, _OUTLINES, size=32)),
        _overlap,
        0.6,
        faults=(Fault.DISCONNECTED,),
        causes=(Cause.DETACHED_GRAPH, Cause.LOSS_FUNCTION),
        fixes={
            r"straight-through": "straight",
            r"threshold|compar|soft|probabilit|differentiab|argmax|round\b|detach|(cuts?|breaks) the graph": "cured",
        },
        said=("threshold", "comparison", "differentiable"),
        steps=200,
        kin=("segmentation", "detached"),
    ),
    Case(
        "R72",
        "An autoencoder whose error is averaged over pixels and whose divergence is summed: all images look the same",
        "orybkin/sigma-vae-pytorch #12",
        lambda variant: (Autoencoder(variant), batches(_BLOBS)),
        r2(_BLOBS, _BLOBS),
        0.5,
        faults=(Fault.VANISHING, Fault.STALLED),
        causes=(Cause.LOSS_FUNCTION,),
        fixes={
            r"anneal|warm.?up of the (kl|weight|diverg)": "annealed",
            r"\bkl\b|divergence|\bbeta\b|reconstruct|reduction|sum over|mean over|average": "cured",
        },
        said=("kl", "divergence", "collapse", "reconstruct", "reduction"),
        steps=400,
        kin=("generative", "loss"),
    ),
    Case(
        "R73",
        "Many convolutions without a normalization: the loss stays that of a guess",
        "soumith/imagenet-multiGPU.torch #2",
        lambda variant: (
            Supervised(_deep(variant), F.cross_entropy, sgd(0.02, 0.9)),
            batches(_IMAGES, _LABELS),
        ),
        accuracy(_IMAGES, _LABELS),
        0.7,
        faults=(Fault.VANISHING, Fault.STALLED),
        causes=(Cause.TOO_DEEP, Cause.BAD_INITIALIZATION, Cause.NORMALIZATION),
        fixes={
            r"normali[sz]ation after.*\+.*(\bhe\b|kaiming)|(\bhe\b|kaiming).*\+.*normali[sz]ation": "normalized_he",
            r"normali[sz]ation|batch.?norm|groupnorm|layernorm": "cured",
            r"residual|skip|shortcut": "residual",
            r"\bhe\b|kaiming|initiali[sz]": "he",
            r"shallow|fewer layers|less deep": "shallow",
        },
        steps=300,
        kin=("depth",),
    ),
    Case(
        "R74",
        "A straight line through numbers up to a hundred, with a rate of 0.01: its slope goes to infinity",
        "mejorcodigo.com/p/45698",
        lambda variant: (Line(variant), batches(_FLATS, _PRICES)),
        r2(_FLATS, _PRICES),
        0.7,
        faults=(Fault.EXPLODING, Fault.OVERSIZED_UPDATE, Fault.NONFINITE),
        causes=(Cause.UNNORMALIZED_INPUT, Cause.LEARNING_RATE_TOO_HIGH),
        fixes={
            r"(standardi[sz]e|scale|normali[sz]e|divide) the targets": "targets",
            r"(standardi[sz]e|scale|normali[sz]e|divide) the (input|feature)": "standardized",
            r"learning rate (of|from \S+ to) (0\.00[1-9]|[1-9]e-0?3)": "tenth",
            r"(lower|reduce|decrease|smaller).{0,12}learning rate|learning rate (of|to)": "cured",
            r"batch.?norm|normali[sz]ation": "normalized",
            r"clip": "clipped",
            r"\badam": "adam",
        },
        steps=300,
        trainer=lambda variant: {"gradient_clip_val": 1.0} if variant == "clipped" else {},
        kin=("input", "rate", "linear"),
    ),
    Case(
        "R75",
        "The error of a value is clipped before it is squared: where it is large, nothing is learnt",
        "devsisters/DQN-tensorflow #16",
        lambda variant: (Values(variant), batches(_VISITED, _TAKEN)),
        lambda module: explained(module(_POSITIONS) * module.unit, _WORTH),
        0.7,
        faults=(Fault.STALLED, Fault.VANISHING, Fault.DEAD),
        causes=(Cause.LOSS_FUNCTION, Cause.TARGET_SCALE),
        fixes={
            r"(standardi[sz]e|scale|normali[sz]e|divide) the (target|reward)": "scaled",
            r"huber|smooth.?l1|clamp|clip(ped|ping)? (of )?the error|outside its (range|limits|bounds)": "cured",
            r"\bmse|squared error": "squared",
        },
        said=("clamp", "clip"),
        steps=500,
        kin=("reinforcement", "loss"),
    ),
    Case(
        "R76",
        "Focal loss from probabilities: where the net is sure, one of two logarithms is that of 0",
        "NVIDIA/retinanet-examples #93",
        lambda variant: (Focal(variant), batches(_ANCHORS, _OBJECTS)),
        _found,
        0.6,
        faults=(Fault.NONFINITE,),
        causes=(Cause.LOSS_FUNCTION,),
        fixes={
            r"logsigmoid|with_logits|(from|on|of|takes?) (the )?logits": "logits",
            r"log\([^)]*\+ *(1e-\d|eps)|\+ *1e-\d": "epsilon",
            r"clamp|\beps|1e-\d|above 0|away from 0|\blog\b|logarithm": "cured",
        },
        steps=300,
        kin=("detection", "loss"),
    ),
    Case(
        "R77",
        "Gaps in the targets are NaN and are multiplied by a mask of zeros, which leaves NaN",
        "INRIA/geoarches #88",
        lambda variant: (Gaps(variant), batches(_FORECASTS, _MEASURED)),
        r2(_FORECASTS, _WHOLE),
        0.7,
        faults=(Fault.NONFINITE,),
        causes=(Cause.BAD_DATA, Cause.LOSS_FUNCTION),
        fixes={
            r"torch\.where|\bmask|select|where there is a target": "cured",
            r"nan_to_num|fill|impute|replace|interpolat": "filled",
            r"\bdrop|remove|leave out|skip|filter": "dropped",
        },
        steps=300,
        kin=("data", "weather"),
    ),
    Case(
        "R78",
        "A net of small convolutions at a rate of 0.1: its outputs die, the loss stays near ln 10",
        "jiecaoyu/pytorch-nin-cifar10 #1",
        lambda variant: (_sure_of_one(variant), batches(_WHITE, _LABELS)),
        accuracy(_WHITE, _LABELS),
        0.6,
        faults=(Fault.DEAD, Fault.STALLED, Fault.OVERSIZED_UPDATE, Fault.EXPLODING),
        causes=(Cause.LEARNING_RATE_TOO_HIGH, Cause.DEAD_ACTIVATION, Cause.MOMENTUM),
        fixes={
            r"learning rate from \S+ to 0\.0[3-9]": "halved",
            r"(lower|reduce|decrease|smaller).{0,12}learning rate|learning rate (of|to)": "cured",
            r"momentum": "slower",
            r"leaky|cannot die|elu\b": "leaky",
            r"last activation|output activation|at the end|no activation": "linear_end",
            r"normali[sz]ation|batch.?norm": "normalized",
            r"\bhe\b|kaiming|initiali[sz]": "he",
            r"clip": "clipped",
        },
        steps=300,
        trainer=lambda variant: {"gradient_clip_val": 1.0} if variant == "clipped" else {},
        kin=("dead", "rate"),
    ),
    Case(
        "R79",
        "An LSTM with ReLU in place of tanh: its states grow from step to step",
        "keras-team/keras #13221",
        lambda variant: (Gated(variant), batches(_TRACES, _LOUD)),
        r2(_TRACES, _LOUD),
        0.7,
        faults=(Fault.EXPLODING, Fault.NONFINITE, Fault.OVERSIZED_UPDATE, Fault.SPIKE),
        causes=(Cause.RECURRENCE, Cause.LEARNING_RATE_TOO_HIGH),
        fixes={
            r"tanh|bounded|\blstm\b|\bgru\b": "cured",
            r"clip": "clipped",
            r"truncat": "truncated",
            r"(lower|reduce|decrease|smaller).{0,12}learning rate|learning rate (of|to)": "lowered",
        },
        steps=200,
        trainer=lambda variant: {"gradient_clip_val": 1.0} if variant == "clipped" else {},
        kin=("recurrent",),
    ),
    Case(
        "R80",
        "A transformer that was made with bfloat16 goes on in float16: its inner layers overflow",
        "google-research/text-to-text-transfer-transformer #539",
        lambda variant: (Translator(variant), batches(_PHRASES, _SORT)),
        accuracy(_PHRASES, _SORT),
        0.6,
        faults=(Fault.NONFINITE,),
        causes=(Cause.LOW_PRECISION,),
        fixes={
            r"bfloat16|bf16": "cured",
            r"float32|fp32|full precision|\.float\(|autocast.*(enabled=False|off)": "float32",
            r"clamp": "clamped",
        },
        steps=250,
        kin=("transformer", "precision", "language"),
    ),
)
