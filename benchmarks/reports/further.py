"""Further reports, written without the product at hand and played after its rules were changed."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.reports.case import Case
from benchmarks.reports.parts import Fit, accuracy, batches, explained, generator, mlp, r2
from lightning_gradguard import Cause, Fault

_DIGITS = load_digits()
_IMAGES, _LABELS = torch.tensor(_DIGITS.data, dtype=torch.float32) / 16, torch.tensor(_DIGITS.target)

# R51: the mean over the neighbours of a spot that has none.

_G = generator(351)
_PLACES = torch.rand(400, 2, generator=_G)
_PLACES[::97] += 3.0 * torch.arange(1, 6)[:, None]  # spots at the rim of the slide
_NEAR = (torch.cdist(_PLACES, _PLACES) < 0.12).float().fill_diagonal_(0)
_GENES = torch.randn(400, 6, generator=_G)
_TISSUE = (_NEAR @ _GENES[:, :1] + _GENES[:, 1:2]) / 2.5


class Spots(Fit):
    """Regression at the spots of a slide, from a spot and the mean of its neighbours."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=5e-3)
        self.variant = variant
        self.own, self.around, self.head = nn.Linear(6, 48), nn.Linear(6, 48), mlp(49, 48, 1)

    def forward(self, x: Tensor) -> Tensor:
        total = _NEAR.sum(1, keepdim=True)
        count = total.clamp(min=1.0) if self.variant == "cured" else total
        count = count + 1e-8 if self.variant == "epsilon" else count
        h = (self.own(x) + self.around(_NEAR @ x / count)).relu()
        return self.head(torch.cat([h, total / 10], 1))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


def _spots(variant: str) -> tuple[L.LightningModule, Any]:
    return Spots(variant), DataLoader([(_GENES, _TISSUE)] * 10, batch_size=None)


# R52: a schedule that waits for a falling number is given the accuracy.


class Plateau(Fit):
    """Classifier of digits whose rate falls when what is monitored stands still."""

    def __init__(self, variant: str) -> None:
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        super().__init__(net, F.cross_entropy)
        self.variant = variant

    def training_step(self, batch: Any, _: int) -> Tensor:
        output = self(batch[0].view(-1, 1, 8, 8))
        self.log("accuracy", (output.argmax(1) == batch[1]).float().mean(), on_step=False, on_epoch=True)
        return F.cross_entropy(output, batch[1])

    def configure_optimizers(self) -> Any:
        rate = 0.05 if self.variant == "raised" else 0.005
        optimizer = torch.optim.SGD(self.parameters(), lr=rate, momentum=0.9)
        mode = "max" if self.variant == "cured" else "min"
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, factor=0.1, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "monitor": "accuracy", "interval": "epoch"},
        }


# R53: generalized Dice loss: a class that a batch does not hold has a weight of 1 / 0.

_G = generator(353)
_SCENES = torch.zeros(768, 3, 12, 12)
_CLASSES = torch.zeros(768, 12, 12, dtype=torch.long)
for _n in range(768):
    for _k in (1, 2, 3):
        if _k < 3 or _n % 12 == 0:  # the third kind is rare
            _i, _j = torch.randint(0, 8, (2,), generator=_G).tolist()
            _CLASSES[_n, _i : _i + 4, _j : _j + 4] = _k
            _SCENES[_n, :, _i : _i + 4, _j : _j + 4] = torch.eye(3)[_k - 1][:, None, None]
_SCENES += 0.3 * torch.randn(768, 3, 12, 12, generator=_G)


class Segments(Fit):
    """Small convolutional net for segmentation, with a Dice loss weighted by the size of each class."""

    def __init__(self, variant: str) -> None:
        net = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 4, 1),
        )
        super().__init__(net, lr=5e-3)
        self.variant = variant

    def training_step(self, batch: Any, _: int) -> Tensor:
        p = self(batch[0]).softmax(1)
        y = F.one_hot(batch[1], 4).movedim(3, 1).float()
        size = y.sum((0, 2, 3))
        if self.variant == "cured":
            weight = torch.where(size > 0, 1 / size.clamp(min=1) ** 2, torch.zeros(()))
        elif self.variant == "epsilon":
            weight = 1 / (size**2 + 1e-8)
        else:
            weight = 1 / size**2
        both, each = (p * y).sum((0, 2, 3)), (p + y).sum((0, 2, 3))
        return 1 - 2 * (weight * both).sum() / (weight * each).sum()


def _overlap(module: Any) -> Tensor:
    """Mean share of the pixels of the kinds that are found."""
    found = module(_SCENES).argmax(1) == _CLASSES
    return torch.stack([found[k == _CLASSES].float().mean() for k in range(3)]).mean()


# R54: the projections of an attention are made where they are used.

_G = generator(354)
_LETTERS = torch.randint(0, 10, (2048, 10), generator=_G)
_FIRST = _LETTERS.gather(1, (_LETTERS[:, -1:] % 9))[:, 0]  # the last letter points at another one


class MadeWhereUsed(Fit):
    """Attention from the last letter to all others, and a classifier of what it sees."""

    def __init__(self, variant: str) -> None:
        super().__init__(loss=F.cross_entropy, lr=3e-3)
        self.variant = variant
        self.letter, self.place, self.head = nn.Embedding(10, 32), nn.Embedding(10, 32), mlp(32, 64, 10)
        if variant == "cured":
            self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.letter(x) + self.place.weight
        if self.variant == "cured":
            q, k, v, out = self.q, self.k, self.v, self.out
        else:
            q, k, v, out = (nn.Linear(32, 32) for _ in range(4))
        scores = (q(h[:, -1:]) @ k(h).mT) / 32**0.5
        return self.head(out(scores.softmax(-1) @ v(h))[:, 0])


# R55: the discriminator's gradients are never zeroed.

_G = generator(355)
_MOONS = torch.randn(2048, 2, generator=_G) * torch.tensor([1.5, 0.3]) + torch.tensor([-2.0, 1.0])
_MOONS[:, 1] += 0.4 * _MOONS[:, 0] ** 2
_CODES = torch.randn(2048, 4, generator=_G)


class Critic(L.LightningModule):
    """Generative adversarial net in the plane with the usual logistic losses."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.automatic_optimization, self.variant = False, variant
        self.generator, self.critic = mlp(4, 64, 64, 2), mlp(2, 64, 64, 1)

    def training_step(self, batch: Any, _: int) -> None:
        of_generator, of_critic = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4))
        if self.variant == "cured":
            of_critic.zero_grad()
        self.manual_backward(
            F.softplus(-self.critic(batch[0])).mean() + F.softplus(self.critic(fake.detach())).mean()
        )
        of_critic.step()
        of_generator.zero_grad()
        self.critic.requires_grad_(False)
        self.manual_backward(F.softplus(-self.critic(fake)).mean())
        self.critic.requires_grad_(True)
        of_generator.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(own.parameters(), lr=1e-3, betas=(0.5, 0.99))
            for own in (self.generator, self.critic)
        ]


def _likeness(module: Any) -> Tensor:
    def energy_distance(x: Tensor) -> Tensor:
        return (
            2 * torch.cdist(x, _MOONS).mean() - torch.cdist(x, x).mean() - torch.cdist(_MOONS, _MOONS).mean()
        )

    return 1 - energy_distance(module.generator(_CODES)) / energy_distance(torch.zeros(1, 2))


# R56: a tanh at the end, and numbers to learn that lie far outside its range.

_G = generator(356)
_FEATURES = torch.randn(2048, 8, generator=_G)
_GRADES = 5 + 2 * torch.sin(_FEATURES[:, :1]) + _FEATURES[:, 1:2]


class Bounded(Fit):
    """Regression with a tanh as the last layer."""

    def __init__(self, variant: str) -> None:
        net = mlp(8, 64, 64, 1, activation=nn.Tanh)
        super().__init__(net if variant == "cured" else net.append(nn.Tanh()), lr=3e-3)
        self.mean, self.std = (_GRADES.mean(), 4 * _GRADES.std()) if variant == "scaled" else (0.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.std + self.mean


# R57: generalized-mean pooling with a learned power, over features that may be negative.


class Pooled(Fit):
    """Convolutional net whose maps are pooled by a generalized mean."""

    def __init__(self, variant: str) -> None:
        net = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, padding=1))
        super().__init__(net, F.cross_entropy, lr=5e-3)
        self.variant = variant
        self.power, self.head = nn.Parameter(torch.tensor(3.0)), nn.Linear(48 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x.view(-1, 1, 8, 8))
        if self.variant == "cured":
            h = h.clamp(min=1e-6)
        if self.variant == "absolute":
            h = h.abs() + 1e-6
        mean = F.avg_pool2d(h.pow(self.power), 4)
        return self.head((mean if self.variant == "reported" else mean + 1e-6).pow(1 / self.power).flatten(1))


# R58: a generative flow network whose scores are copied for the probabilities, and cut off by the copy.

_G = generator(358)
_ALL = torch.cartesian_prod(*(torch.arange(5),) * 3)
_LOG_REWARD = 2 * torch.sin(1.7 * _ALL.float() @ torch.tensor([1.0, 0.6, 1.4])) + 0.3 * _ALL[:, 0]


class FlowNetwork(Fit):
    """Sampler of three letters that learns to sample in proportion to a reward, by trajectory balance."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=5e-3)
        self.variant = variant
        self.policy, self.log_total = mlp(18, 64, 64, 5), nn.Parameter(torch.zeros(()))

    def log_probability(self, words: Tensor) -> Tensor:
        total = torch.zeros(len(words))
        seen = F.one_hot(words, 5).float()
        for k in range(3):
            prefix = torch.cat([seen[:, :k].flatten(1), torch.zeros(len(words), 15 - 5 * k)], 1)
            place = F.one_hot(torch.full((len(words),), k), 3).float()
            scores = self.policy(torch.cat([prefix, place], 1)).clone()
            if self.variant == "reported":
                scores = scores.detach()
            total = total + scores.log_softmax(1).gather(1, words[:, k : k + 1])[:, 0]
        return total

    def training_step(self, batch: Any, _: int) -> Tensor:
        return ((self.log_total + self.log_probability(batch[0]) - batch[1]) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(
            [{"params": self.policy.parameters()}, {"params": [self.log_total], "lr": 0.1}], lr=5e-3
        )


# R59: an embedding of unit variance that is also the output layer: the logits of the first step are in the dozens.

_G = generator(359)
_STARTS, _STRIDES = (
    torch.randint(0, 64, (2048, 1), generator=_G),
    torch.randint(1, 4, (2048, 1), generator=_G),
)
_LINES = (_STARTS + _STRIDES * torch.arange(12)) % 64


class Tied(Fit):
    """Small language model whose output layer is its embedding."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=1e-3)
        self.embed, self.place = nn.Embedding(64, 128), nn.Embedding(12, 128)
        block = nn.TransformerEncoderLayer(128, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.block, self.norm = nn.TransformerEncoder(block, 1, enable_nested_tensor=False), nn.LayerNorm(128)
        if variant == "cured":
            nn.init.normal_(self.embed.weight, std=0.02)
            nn.init.normal_(self.place.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.block(self.embed(x) + self.place.weight[: x.shape[1]], mask=mask, is_causal=True)
        return self.norm(h) @ self.embed.weight.T

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())


def _continued(module: Any) -> Tensor:
    return (module(_LINES[:512, :-1])[:, 2:].argmax(-1) == _LINES[:512, 3:]).float().mean()


# R60: rain that was standardized, and a density of positive numbers.

_G = generator(360)
_WEATHER = torch.randn(2048, 6, generator=_G)
_RAIN = torch.exp(0.8 * _WEATHER[:, 0] + 0.6 * torch.sin(2 * _WEATHER[:, 1])) * (
    1 + 0.1 * torch.randn(2048, generator=_G).clamp(-2, 2)
)


class Rain(Fit):
    """Amount of rain as a gamma density whose parameters are the outputs of a net."""

    def __init__(self, variant: str) -> None:
        super().__init__(mlp(6, 64, 64, 2))
        self.variant = variant
        self.rain = _RAIN / _RAIN.std() if variant == "cured" else (_RAIN - _RAIN.mean()) / _RAIN.std()

    def density(self, x: Tensor) -> torch.distributions.Gamma:
        shape, rate = (F.softplus(self.net(x)) + 1e-2).unbind(-1)
        return torch.distributions.Gamma(shape, rate, validate_args=False)

    def training_step(self, batch: Any, _: int) -> Tensor:
        rain = batch[1].clamp(min=1e-8) if self.variant == "clamped" else batch[1]
        return -self.density(batch[0]).log_prob(rain).mean()


def _rain(variant: str) -> tuple[L.LightningModule, Any]:
    module = Rain(variant)
    return module, batches(_WEATHER, module.rain)


CASES = (
    Case(
        "R51",
        "The mean over the neighbours of a spot that has none",
        "biomed-AI/Hist2ST #7",
        _spots,
        lambda module: explained(module(_GENES), _TISSUE),
        0.7,
        faults=(Fault.NONFINITE,),
        causes=(Cause.LOSS_FUNCTION, Cause.NORMALIZATION, Cause.BAD_DATA),
        fixes={r"1e-8|\beps": "epsilon", r"divi|denominator|count|clamp|neighbo": "cured"},
        steps=250,
        kin=("graph",),
    ),
    Case(
        "R52",
        "A schedule that waits for a falling number is given the accuracy",
        "md-mohaiminul/ViS4mer #4",
        lambda variant: (Plateau(variant), batches(_IMAGES, _LABELS)),
        lambda module: (module(_IMAGES.view(-1, 1, 8, 8)).argmax(1) == _LABELS).float().mean(),
        0.8,
        faults=(Fault.STALLED,),
        causes=(Cause.LEARNING_RATE_TOO_LOW,),
        fixes={r"^warm up": "reported", r"^raise the learning rate": "raised", r"schedul|mode": "cured"},
        said=("schedul",),
        steps=300,
        kin=("schedule",),
    ),
    Case(
        "R53",
        "Generalized Dice loss: a class that the batch does not hold has a weight of 1 / 0",
        "Project-MONAI/MONAI #371",
        lambda variant: (Segments(variant), batches(_SCENES, _CLASSES, size=8)),
        _overlap,
        0.7,
        faults=(Fault.NONFINITE,),
        causes=(Cause.LOSS_FUNCTION, Cause.NORMALIZATION, Cause.BAD_DATA),
        fixes={r"where|mask|isinf": "cured", r"divi|denominator|1e-8|\beps|reciprocal": "epsilon"},
        steps=200,
        kin=("segmentation",),
    ),
    Case(
        "R54",
        "The projections of an attention are made where they are used, at each pass",
        "graykode/nlp-tutorial #29",
        lambda variant: (MadeWhereUsed(variant), batches(_LETTERS, _FIRST)),
        accuracy(_LETTERS, _FIRST),
        0.7,
        faults=(Fault.DISCONNECTED,),
        causes=(Cause.UNREGISTERED_MODULES, Cause.STALE_OPTIMIZER),
        fixes={r"^(lower|raise|warm up) ": "reported", r"__init__|forward|regist|modulelist": "cured"},
        said=("unregistered", "modulelist", "regist"),
        steps=700,
        kin=("transformer",),
    ),
    Case(
        "R55",
        "The discriminator's gradients are never zeroed",
        "Hsintien-Ng/idinvert_pytorch-reproduced #1",
        lambda variant: (Critic(variant), batches(_MOONS)),
        _likeness,
        0.8,
        faults=(Fault.EXPLODING, Fault.OVERSIZED_UPDATE, Fault.SPIKE),
        causes=(Cause.STALE_GRADIENTS,),
        fixes={r"zero_grad": "cured"},
        said=("zero_grad", "stale_gradients"),
        steps=2000,
        kin=("adversarial",),
    ),
    Case(
        "R56",
        "A tanh at the end, and numbers to learn that lie far outside its range",
        "ansaurus.com/question/3644795",
        lambda variant: (Bounded(variant), batches(_FEATURES, _GRADES)),
        r2(_FEATURES, _GRADES),
        0.7,
        faults=(Fault.VANISHING, Fault.DEAD, Fault.STALLED, Fault.DISCONNECTED),
        causes=(Cause.TARGET_SCALE, Cause.SATURATING_ACTIVATION, Cause.LOSS_FUNCTION),
        fixes={
            r"standardize the targets|scale.*target": "scaled",
            r"tanh|last activation|output activation": "cured",
        },
        said=("target", "tanh"),
        steps=300,
        kin=("regression",),
    ),
    Case(
        "R57",
        "Generalized-mean pooling with a learned power over features that may be negative",
        "filipradenovic/cnnimageretrieval-pytorch #73",
        lambda variant: (Pooled(variant), batches(_IMAGES, _LABELS)),
        lambda module: (module(_IMAGES).argmax(1) == _LABELS).float().mean(),
        0.8,
        faults=(Fault.NONFINITE,),
        causes=(Cause.LOSS_FUNCTION,),
        fixes={r"\babs": "absolute", r"pow|power|base|clamp": "cured"},
        steps=250,
        kin=("convolutional",),
    ),
    Case(
        "R58",
        "A generative flow network whose scores are copied without their gradient",
        "alexhernandezgarcia/gflownet #251",
        lambda variant: (FlowNetwork(variant), batches(_ALL, _LOG_REWARD, size=32)),
        lambda module: explained(module.log_total + module.log_probability(_ALL), _LOG_REWARD),
        0.7,
        faults=(Fault.DISCONNECTED,),
        causes=(Cause.DETACHED_GRAPH,),
        fixes={r"straight-through": "reported", r"detach|cuts the graph": "cured"},
        steps=400,
        kin=("flow network",),
    ),
    Case(
        "R59",
        "An embedding of unit variance that is also the output layer",
        "pytorch/pytorch #3121",
        lambda variant: (Tied(variant), batches(_LINES)),
        _continued,
        0.7,
        faults=(Fault.EXPLODING, Fault.OVERSIZED_UPDATE, Fault.STALLED),
        causes=(Cause.BAD_INITIALIZATION,),
        fixes={r"^(he|xavier) init": "reported", r"init|std": "cured"},
        said=("loss at the start", "initial"),
        steps=250,
        kin=("transformer", "language"),
    ),
    Case(
        "R60",
        "Rain that was standardized, and a density of positive numbers",
        "alan-turing-institute/deepsensor #138",
        _rain,
        lambda module: explained(module.density(_WEATHER).mean, module.rain),
        0.75,
        faults=(Fault.NONFINITE,),
        causes=(Cause.BAD_DATA, Cause.LOSS_FUNCTION, Cause.TARGET_SCALE),
        fixes={r"clamp|above 0|xlogy": "clamped", r"positive|shift|negative": "cured"},
        steps=400,
        kin=("density",),
    ),
)
