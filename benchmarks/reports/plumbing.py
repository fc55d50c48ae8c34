"""Reports of mistakes around the model: optimizers, schedules, gradients that are cut, kept or scaled."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.reports.case import Case
from benchmarks.reports.parts import Fit, accuracy, batches, explained, generator, mlp
from lightning_gradguard import Cause, Fault

_DIGITS = load_digits()
_IMAGES, _LABELS = torch.tensor(_DIGITS.data, dtype=torch.float32) / 16, torch.tensor(_DIGITS.target)
_MAPS = _IMAGES.view(-1, 1, 8, 8)
_STEPPED_WRONG = (Fault.DISCONNECTED, Fault.STALLED)
#: Fixes that leave the mistake as it is.
_BESIDE = {r"^(lower|raise|warm up) ": "reported"}

# R11: the model is made a second time after the optimizer.

_G = generator(211)
_WORDS = torch.randint(1, 12, (2048, 8), generator=_G)
_TONGUE = torch.where((_WORDS[:, 1:] > _WORDS[:, :-1]).sum(1) > 3, 1, 0) + 2 * (_WORDS[:, -1] > 6)


class Names(Fit):
    """Recurrent net over letters that says the language of a name."""

    def __init__(self, variant: str) -> None:
        super().__init__(loss=F.cross_entropy, lr=5e-3)
        self.variant = variant
        self.make_net()

    def make_net(self) -> None:
        self.embed, self.rnn = nn.Embedding(12, 24), nn.GRU(24, 48, batch_first=True)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])

    def configure_optimizers(self) -> Any:
        if self.variant == "cured":
            self.make_net()
        return super().configure_optimizers()

    def on_train_start(self) -> None:
        if self.variant == "reported":
            self.make_net()


# R12: the output layers are made in the forward pass, as soon as the width is known; and again in each.


class OutputInForward(Fit):
    """Convolutional encoder whose output layers depend on the size of the image."""

    def __init__(self, variant: str) -> None:
        super().__init__(
            nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU(), nn.Flatten()
            ),
            F.cross_entropy,
            lr=2e-3,
        )
        self.variant = variant
        if variant == "cured":
            self.out = self.make_out(512)

    def make_out(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        h = self.net(x)
        if self.variant != "cured":
            self.out = self.make_out(h.shape[1])
        return self.out(h)

    def configure_optimizers(self) -> Any:
        if self.variant == "remade":
            self(_MAPS[:2])
        return super().configure_optimizers()


# R13: with loss scaling, gradients are clipped while they are still scaled.


class Clipped(Fit):
    """Convolutional net, SGD with momentum, gradients clipped to a norm of 1 by hand."""

    def __init__(self, variant: str) -> None:
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        super().__init__(net, F.cross_entropy)
        self.variant = variant

    def on_after_backward(self) -> None:
        if self.variant == "reported":
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.variant == "cured":  # Lightning has unscaled the gradients by now
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def _mixed(_: str) -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=65536.0))]}


# R14: zero_grad is never called.

_G = generator(214)
_WORD = torch.randint(0, 4, (2048,), generator=_G)
_SOUND = torch.randn(4, 20, 8, generator=_G)[_WORD] + 1.2 * torch.randn(2048, 20, 8, generator=_G)


class KeyWords(L.LightningModule):
    """Recurrent net that spots words in frames of sound, with a loop of its own."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.automatic_optimization, self.variant = False, variant
        self.front, self.rnn, self.head = (
            nn.Linear(8, 32),
            nn.GRU(32, 48, 2, batch_first=True),
            nn.Linear(48, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.front(x).relu())[0].mean(1))

    def training_step(self, batch: Any, _: int) -> None:
        optimizer = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.variant == "cured":
            optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


# R15: a weight decay of 0.05 in Adam, from a framework where it had no effect.

_G = generator(215)
_SHIFT = torch.randint(-2, 3, (4096,), generator=_G)
_LINES = torch.randn(4096, 24, generator=_G)
_PAIR = torch.stack([_LINES, torch.stack([x.roll(int(k)) for x, k in zip(_LINES, _SHIFT, strict=True)])], 1)
_MOTION = 0.1 * _SHIFT[:, None].float()


class Motion(Fit):
    """Convolutional net that tells the motion between two frames."""

    def __init__(self, variant: str) -> None:
        net = nn.Sequential(
            nn.Conv1d(2, 32, 5, padding=2),
            nn.ReLU(),
            nn.Conv1d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(32, 16, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(384, 64),
            nn.ReLU(),
            nn.Linear(64, 1),
        )
        super().__init__(net)
        self.decay = {"cured": 5e-5, "hundredth": 5e-4}.get(variant, 0.05)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=2e-3, weight_decay=self.decay)


# R16: a warm-up of 4000 steps that is advanced once an epoch.

_G = generator(216)
_CLEAN = torch.tanh(torch.randn(3072, 2, generator=_G) @ torch.randn(2, 16, generator=_G))
_TEST_TIME = torch.rand(3072, 1, generator=_G) * 1.5
_TEST_NOISE = torch.randn(3072, 16, generator=_G)


class Diffusion(Fit):
    """Denoiser of a diffusion model: it tells the noise in a mixture of signal and noise."""

    def __init__(self, variant: str) -> None:
        super().__init__(mlp(17, 128, 128, 16, activation=nn.SiLU))
        self.variant = variant

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.net(torch.cat([x, time], 1))

    def training_step(self, batch: Any, _: int) -> Tensor:
        x = batch[0]
        time, noise = 1.5 * torch.rand(len(x), 1), torch.randn_like(x)
        return F.mse_loss(self(time.cos() * x + time.sin() * noise, time), noise)

    def configure_optimizers(self) -> Any:
        rate = 1e-3 * 4000 if self.variant == "raised" else 1e-3
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate)
        length = 10 if self.variant == "cured" else 4000
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / length))
        interval = "step" if self.variant in ("cured", "interval") else "epoch"
        return [optimizer], [{"scheduler": schedule, "interval": interval}]


def _noise_told(module: Any) -> Tensor:
    x = _TEST_TIME.cos() * _CLEAN + _TEST_TIME.sin() * _TEST_NOISE
    return explained(module(x, _TEST_TIME), _TEST_NOISE)


# R17: both matrices of a low-rank adapter start at zero: each one's gradient is a product with the other.

_TURNED = _MAPS.rot90(1, (2, 3)).flatten(1)


@lru_cache
def _pretrained() -> dict[str, Tensor]:
    """Return the weights of a classifier of upright digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = mlp(64, 96, 96, 10)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(150):
            rows = torch.randint(0, len(_IMAGES), (128,))
            optimizer.zero_grad()
            F.cross_entropy(net(_IMAGES[rows]), _LABELS[rows]).backward()
            optimizer.step()
    return net.state_dict()


class Adapted(nn.Module):
    """A frozen linear layer plus a product of two thin matrices."""

    def __init__(self, layer: nn.Linear, variant: str, rank: int = 8) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.zeros(layer.in_features, rank))
        self.up = nn.Parameter(torch.zeros(rank, layer.out_features))
        if variant in ("cured", "both"):
            nn.init.normal_(self.down, std=rank**-0.5)
        if variant == "both":
            nn.init.kaiming_normal_(self.up.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down @ self.up


def _adapters(variant: str) -> tuple[L.LightningModule, Any]:
    net = mlp(64, 96, 96, 10)
    net.load_state_dict(_pretrained())
    adapted = nn.Sequential(*(Adapted(p, variant) if isinstance(p, nn.Linear) else p for p in net))
    return Fit(adapted, F.cross_entropy, lr=5e-3), batches(_TURNED, _LABELS)


# R18: the generator's samples are detached in its own step.

_G = generator(218)
_REAL = torch.stack([torch.cos(a := 6.2832 * torch.rand(2048, generator=_G)), torch.sin(a)], 1)
_REAL = (
    _REAL * torch.tensor([1.0, 0.4]) + torch.tensor([2.0, -1.5]) + 0.1 * torch.randn(2048, 2, generator=_G)
)
_CODES = torch.randn(2048, 4, generator=_G)


class Adversarial(L.LightningModule):
    """Least-squares generative adversarial net in the plane."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.automatic_optimization, self.variant = False, variant
        self.generator, self.critic = mlp(4, 64, 64, 2), mlp(2, 64, 64, 1)

    def training_step(self, batch: Any, _: int) -> None:
        of_generator, of_critic = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4))
        shown = fake.detach() if self.variant == "reported" else fake
        of_generator.zero_grad()
        self.manual_backward(((self.critic(shown) - 1) ** 2).mean())
        of_generator.step()
        of_critic.zero_grad()
        told = self.critic(batch[0]), self.critic(fake.detach())
        self.manual_backward(((told[0] - 1) ** 2).mean() + (told[1] ** 2).mean())
        of_critic.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(own.parameters(), lr=1e-3, betas=(0.5, 0.99))
            for own in (self.generator, self.critic)
        ]


def _likeness(module: Any) -> Tensor:
    """Energy distance to the data that is gone, as a share of that of a point at the origin."""

    def energy_distance(x: Tensor) -> Tensor:
        return 2 * torch.cdist(x, _REAL).mean() - torch.cdist(x, x).mean() - torch.cdist(_REAL, _REAL).mean()

    return 1 - energy_distance(module.generator(_CODES)) / energy_distance(torch.zeros(1, 2))


# R19: the loss of the codebook takes the straight-through output, through which no gradient reaches the codes.


class Quantized(Fit):
    """Autoencoder of digits whose code is one of 64 learned vectors for each of four parts."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=2e-3)
        self.variant = variant
        self.encoder, self.decoder = mlp(64, 96, 64), mlp(64, 96, 64)
        self.codes = nn.Embedding(64, 16)
        nn.init.uniform_(self.codes.weight, -1 / 64, 1 / 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = self.encoder(x).view(-1, 4, 16)
        code = self.codes(torch.cdist(z, self.codes.weight[None]).argmin(-1))
        through = z + (code - z).detach()
        return self.decoder(through.flatten(1)), z, code, through

    def training_step(self, batch: Any, _: int) -> Tensor:
        x = batch[0]
        y, z, code, through = self(x)
        learned = code if self.variant == "cured" else through
        return F.mse_loss(y, x) + F.mse_loss(learned, z.detach()) + 0.25 * F.mse_loss(z, code.detach())


# R20: a new head on a pretrained net; its group of parameters was never appended.


class NewHead(Fit):
    """Fine-tuning with one group of parameters for the encoder and one for the head."""

    def __init__(self, variant: str) -> None:
        net = mlp(64, 96, 96, 10)
        net.load_state_dict(_pretrained())
        super().__init__(loss=F.cross_entropy)
        self.encoder, self.head, self.variant = net[:-1], mlp(96, 64, 10), variant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(self.encoder.parameters()), "lr": 3e-5}]
        head = {"params": list(self.head.parameters()), "lr": 3e-3}
        if self.variant == "cured":
            groups.append(head)
        if self.variant == "raised":
            groups[0]["lr"] = 1e-3
        return torch.optim.AdamW(groups)


# R46: the weights of each relation of a graph are kept in a dict.

_G = generator(246)
_NODES = torch.randn(300, 8, generator=_G)
_RELATIONS = [(torch.rand(300, 300, generator=_G) < 0.01).float() for _ in range(4)]
_AROUND = [r / r.sum(1, keepdim=True).clamp(min=1) for r in _RELATIONS]
_TYPES = sum(a @ _NODES @ torch.randn(8, 3, generator=_G) for a in _AROUND).argmax(1)


class Relations(Fit):
    """Graph convolution with weights for each relation; says the type of each node."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=2e-2)
        self.own = nn.Linear(8, 3)
        layers = {f"relation {k}": nn.Linear(8, 3) for k in range(4)}
        self.layers = nn.ModuleDict(layers) if variant == "cured" else layers

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x) + sum(a @ layer(x) for a, layer in zip(_AROUND, self.layers.values(), strict=True))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def _relations(variant: str) -> tuple[L.LightningModule, Any]:
    return Relations(variant), DataLoader([(_NODES, _TYPES)] * 10, batch_size=None)


# R47: logarithms of probabilities are stored as numbers, and put into a new tensor for the loss.

_G = generator(247)
_VIEWS = torch.randn(2048, 6, generator=_G)
_BEST = (_VIEWS @ torch.randn(6, 4, generator=_G)).argmax(1)


class ActorCritic(Fit):
    """Advantage actor-critic with one optimizer; a memory of what was done is worked off at the end of a rollout."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=3e-3)
        self.variant = variant
        self.actor, self.critic = mlp(6, 64, 4), mlp(6, 64, 1)

    def training_step(self, batch: Any, _: int) -> Tensor:
        views, best = batch
        policy = torch.distributions.Categorical(logits=self.actor(views))
        action = policy.sample()
        memory = list(zip(policy.log_prob(action), (action == best).float(), strict=True))
        if self.variant == "cured":
            log_p = torch.stack([m[0] for m in memory])
        else:
            log_p = torch.tensor([float(m[0].detach()) for m in memory])
        reward, value = torch.stack([m[1] for m in memory]), self.critic(views)[:, 0]
        return F.mse_loss(value, reward) - (log_p * (reward - value.detach())).mean()


# R50: the features of the image encoder are handed out by an extractor that detaches them.


class TwoTowers(Fit):
    """Contrastive training of an image encoder and a text encoder."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=3e-3)
        self.variant = variant
        self.image, self.word = mlp(64, 128, 64, 4), nn.Embedding(10, 32)
        self.text = mlp(32, 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.image(x).clone()
        seen = seen if self.variant == "cured" else seen.detach()
        return 10 * F.normalize(seen, dim=1) @ F.normalize(self.text(self.word.weight), dim=1).T

    def training_step(self, batch: Any, _: int) -> Tensor:
        likeness = self(batch[0])[:, batch[1]]  # of each image to each caption of the batch
        same = (batch[1][:, None] == batch[1]).float()
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(likeness, target) + F.cross_entropy(likeness.T, target)) / 2


CASES = (
    Case(
        "R11",
        "The model is made a second time after the optimizer",
        "spro/practical-pytorch #9",
        lambda variant: (Names(variant), batches(_WORDS, _TONGUE)),
        accuracy(_WORDS, _TONGUE),
        0.7,
        faults=_STEPPED_WRONG,
        causes=(Cause.STALE_OPTIMIZER,),
        fixes={**_BESIDE, r"optimizer": "cured"},
        said=("stale_optimizer", "not in the optimizer", "none of the parameters", "none of the model"),
        steps=300,
        kin=("recurrent", "optimizer"),
    ),
    Case(
        "R12",
        "Output layers that each forward pass makes anew",
        "Project-MONAI/MONAI #8578",
        lambda variant: (OutputInForward(variant), batches(_MAPS, _LABELS)),
        accuracy(_MAPS, _LABELS),
        0.8,
        faults=_STEPPED_WRONG,
        causes=(Cause.STALE_OPTIMIZER, Cause.UNREGISTERED_MODULES),
        fixes={**_BESIDE, r"__init__|forward|regist": "cured", r"optimizer": "remade"},
        said=("stale_optimizer", "not in the optimizer", "unregistered"),
        steps=150,
        kin=("convolutional", "optimizer"),
    ),
    Case(
        "R13",
        "Gradients clipped before they are unscaled, under loss scaling",
        "Lightning-AI/pytorch-lightning #9599",
        lambda variant: (Clipped(variant), batches(_MAPS, _LABELS)),
        accuracy(_MAPS, _LABELS),
        0.8,
        faults=(Fault.STALLED,),
        causes=(Cause.GRADIENT_SCALING,),
        fixes={**_BESIDE, r"unscal|gradient_clip_val|scaled": "cured"},
        said=("unscal", "gradient_scaling"),
        steps=200,
        trainer=_mixed,
        kin=("convolutional", "mixed precision"),
    ),
    Case(
        "R14",
        "zero_grad is never called",
        "wenet-e2e/wekws #72",
        lambda variant: (KeyWords(variant), batches(_SOUND, _WORD)),
        accuracy(_SOUND, _WORD),
        0.85,
        faults=(Fault.EXPLODING, Fault.OVERSIZED_UPDATE, Fault.SPIKE),
        causes=(Cause.STALE_GRADIENTS,),
        fixes={r"zero_grad": "cured"},
        said=("zero_grad", "stale_gradients"),
        steps=200,
        kin=("recurrent", "manual optimization"),
    ),
    Case(
        "R15",
        "A weight decay of 0.05 in Adam: all weights go to zero",
        "tinghuiz/SfMLearner #34",
        lambda variant: (Motion(variant), batches(_PAIR, _MOTION)),
        lambda module: explained(module(_PAIR), _MOTION),
        0.6,
        faults=(Fault.VANISHING, Fault.STALLED, Fault.DEAD, Fault.DISCONNECTED),
        causes=(Cause.WEIGHT_DECAY,),
        fixes={r"weight decay|weight_decay": "hundredth"},
        said=("weight decay", "weight_decay"),
        steps=300,
        kin=("convolutional", "decay"),
    ),
    Case(
        "R16",
        "A warm-up of 4000 steps that is advanced once an epoch",
        "ace-step/ACE-Step #198",
        lambda variant: (Diffusion(variant), batches(_CLEAN)),
        _noise_told,
        0.5,
        faults=(Fault.STALLED,),
        causes=(Cause.LEARNING_RATE_TOO_LOW,),
        fixes={
            r"^warm up": "reported",
            r"shorter|fewer|length": "cured",
            r"interval|each batch|per batch|each step|per step": "interval",
            r"^raise the learning rate": "raised",
        },
        said=("interval", "schedule"),
        steps=300,
        kin=("diffusion", "schedule"),
    ),
    Case(
        "R17",
        "Both matrices of a low-rank adapter start at zero",
        "circle-hit/SAPT #11",
        _adapters,
        accuracy(_TURNED, _LABELS),
        0.8,
        faults=(Fault.DISCONNECTED, Fault.DEAD, Fault.VANISHING, Fault.STALLED),
        causes=(Cause.BAD_INITIALIZATION,),
        fixes={
            r"^zero biases": "reported",
            r"^(he|xavier) init": "both",
            r"^(?!normali|relu|resid|lower)[^\n]*(init|zero)": "cured",
        },
        steps=250,
        kin=("adapter",),
    ),
    Case(
        "R18",
        "The generator's samples are detached in its own step",
        "nikhilsinghmus/image2reverb #37",
        lambda variant: (Adversarial(variant), batches(_REAL)),
        _likeness,
        0.8,
        faults=(Fault.DISCONNECTED,),
        causes=(Cause.DETACHED_GRAPH,),
        fixes={r"straight-through": "reported", r"detach|cuts the graph": "cured"},
        steps=1200,
        kin=("adversarial", "manual optimization"),
    ),
    Case(
        "R19",
        "The loss of a codebook takes the straight-through output: the codes get no gradient",
        "showlab/Olaf-World #8",
        lambda variant: (Quantized(variant), batches(_IMAGES)),
        lambda module: explained(module(_IMAGES)[0], _IMAGES),
        0.4,
        faults=(Fault.DISCONNECTED,),
        causes=(Cause.DETACHED_GRAPH,),
        fixes={r"straight-through": "reported", r"detach|cuts the graph": "cured"},
        steps=800,
        kin=("autoencoder",),
    ),
    Case(
        "R20",
        "A new head whose parameters were never given to the optimizer",
        "zjunlp/HVPNeT #5",
        lambda variant: (NewHead(variant), batches(_TURNED, _LABELS)),
        accuracy(_TURNED, _LABELS),
        0.75,
        faults=_STEPPED_WRONG,
        causes=(Cause.STALE_OPTIMIZER,),
        fixes={r"^raise the learning rate": "raised", **_BESIDE, r"optimizer|param_groups": "cured"},
        said=("stale_optimizer", "not in the optimizer", "part of the model"),
        steps=300,
        kin=("fine-tuning", "optimizer"),
    ),
    Case(
        "R46",
        "The weights of each relation of a graph, kept in a dict",
        "pytorch/pytorch #632",
        _relations,
        accuracy(_NODES, _TYPES),
        0.75,
        faults=(Fault.DISCONNECTED,),
        causes=(Cause.UNREGISTERED_MODULES,),
        fixes={r"ModuleList|ModuleDict|regist": "cured"},
        said=("unregistered", "moduledict", "modulelist"),
        steps=200,
        kin=("graph", "optimizer"),
    ),
    Case(
        "R47",
        "Log-probabilities stored as numbers: the actor beside its critic gets no gradient",
        "Quantum-Cheese/DeepReinforcementLearning_Pytorch #1",
        lambda variant: (ActorCritic(variant), batches(_VIEWS, _BEST)),
        lambda module: (module.actor(_VIEWS).argmax(1) == _BEST).float().mean(),
        0.75,
        faults=(Fault.DISCONNECTED,),
        causes=(Cause.DETACHED_GRAPH,),
        fixes={r"straight-through": "reported", r"detach|cuts the graph|torch\.tensor": "cured"},
        steps=400,
        kin=("reinforcement",),
    ),
    Case(
        "R50",
        "An extractor that detaches the features of the image encoder",
        "lucidrains/CoCa-pytorch #6",
        lambda variant: (TwoTowers(variant), batches(_IMAGES, _LABELS)),
        accuracy(_IMAGES, _LABELS),
        0.85,
        faults=(Fault.DISCONNECTED,),
        causes=(Cause.DETACHED_GRAPH,),
        fixes={r"straight-through": "reported", r"detach|cuts the graph": "cured"},
        steps=300,
        kin=("contrastive",),
    ),
)
