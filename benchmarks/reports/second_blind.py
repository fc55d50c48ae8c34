"""A second ten reports, chosen and rebuilt without the product at hand."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.reports.case import Case
from benchmarks.reports.parts import Fit, accuracy, batches, explained, generator, mlp, r2
from lightning_gradguard import Cause, Fault

_DIGITS = load_digits()
_IMAGES = torch.tensor(_DIGITS.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16

# R61: masks as they lie on disk, 0 and 255, in a loss that takes 0 and 1.

_G = generator(361)
_SCANS = 0.8 * torch.randn(768, 1, 16, 16, generator=_G)
_MASKS = torch.zeros(768, 1, 16, 16)
for _n in range(768):
    _i, _j = torch.randint(0, 11, (2,), generator=_G).tolist()
    _MASKS[_n, :, _i : _i + 6, _j : _j + 6] = 255.0
_SCANS += 1.2 * (_MASKS > 0)


class Masks(Fit):
    """Small convolutional net for segmentation of one kind against the background."""

    def __init__(self, variant: str) -> None:
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 1, 1),
        )
        super().__init__(net, F.binary_cross_entropy_with_logits, lr=2e-3)
        self.variant = variant

    def training_step(self, batch: Any, _: int) -> Tensor:
        mask = batch[1]
        if self.variant == "cured":
            mask = mask / 255
        elif self.variant == "standardized":
            mask = (mask - _MASKS.mean()) / _MASKS.std()
        return self.loss(self(batch[0]), mask)


def _common_share(module: Any) -> Tensor:
    """Common part of mask and prediction, of all that is either."""
    found, there = module(_SCANS) > 0, _MASKS > 0
    return (found & there).sum() / (found | there).sum()


# R62: frames that come divided by 255 are divided by 255 once more.

_G = generator(362)
_SPOT = torch.randint(0, 4, (2048,), generator=_G)
_FRAMES = 0.15 * torch.rand(2048, 1, 10, 10, generator=_G)
for _n in range(2048):
    _i, _j = divmod(int(_SPOT[_n]), 2)
    _i, _j = (5 * k + int(torch.randint(0, 3, (), generator=_G)) for k in (_i, _j))
    _FRAMES[_n, :, _i : _i + 3, _j : _j + 3] += 0.7


class Frames(Fit):
    """Actor and critic over one image: the action is right if it names the corner with the bright patch."""

    def __init__(self, variant: str) -> None:
        body = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 5),
        )
        super().__init__(body, lr=1e-3)
        self.variant = variant

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == "standardized":
            x = (x - _FRAMES.mean()) / _FRAMES.std()
        return self.net(x if self.variant != "reported" else x / 255)

    def training_step(self, batch: Any, _: int) -> Tensor:
        output = self(batch[0])
        policy, value = torch.distributions.Categorical(logits=output[:, :4]), output[:, 4]
        action = policy.sample()
        reward = torch.where(action == batch[1], 1.0, 0.0)
        gain = (reward - value).detach()
        actor = -(policy.log_prob(action) * gain).mean() - 0.01 * policy.entropy().mean()
        return actor + 0.5 * F.mse_loss(value, reward)


# R63: adaptive instance normalization, and sketches on which nothing is drawn.

_G = generator(363)
_SKETCHES = _IMAGES.clone()
_SKETCHES[100::300] = 0.0  # no face was found
_STYLES = 2 * torch.rand(len(_IMAGES), 2, generator=_G) - 1
_DRAWN = _SKETCHES * (1 + 0.8 * _STYLES[:, :1, None, None]) + _STYLES[:, 1:, None, None]


class Restyled(Fit):
    """Draws digits with the brightness and contrast that a style asks for."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=3e-3)
        self.variant = variant
        self.inner, self.outer = nn.Conv2d(1, 24, 3), nn.Conv2d(24, 24, 3, padding=1)
        self.style, self.decode = mlp(2, 32, 48), nn.ConvTranspose2d(24, 1, 3)

    def forward(self, x: Any) -> Tensor:
        h = self.inner(x[0])
        scale, shift = self.style(x[1])[..., None, None].chunk(2, 1)
        variance = h.var((2, 3), keepdim=True)  # torch.std as it was: its gradient at 0 is no number
        deviation = (variance + 1e-5).sqrt() if self.variant == "cured" else variance.sqrt() + 1e-5
        h = (1 + scale) * (h - h.mean((2, 3), keepdim=True)) / deviation + shift
        return self.decode(self.outer(h.relu()).relu())

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self(batch[:2]), batch[2])


# R64: parameters made by ``torch.Tensor(n, m)`` hold whatever lay in memory.

_G = generator(364)
_LINKS = (torch.rand(300, 300, generator=_G) < 0.02) | torch.eye(300, dtype=torch.bool)
_LINKS |= _LINKS.T.clone()
_PAPERS = torch.randn(300, 8, generator=_G)
_CITED = (_LINKS.float() @ _PAPERS[:, :3]) / _LINKS.sum(1, keepdim=True) ** 0.5
_FIELDS = (_CITED + 0.3 * _PAPERS[:, 3:6]).argmax(1)


def _left_in_memory(*shape: int) -> Tensor:
    """Return what a new tensor may hold: the bytes of addresses, read as numbers."""
    low = torch.randint(0, 2**31, shape, generator=generator(36), dtype=torch.int32)
    high = torch.tensor(0x7F3A, dtype=torch.int32)
    return torch.where(torch.arange(shape[-1]) % 2 == 0, low, high).view(torch.float32)


class GraphAttention(Fit):
    """Two layers of attention over the neighbours in a graph."""

    def __init__(self, variant: str) -> None:
        super().__init__(loss=F.cross_entropy, lr=5e-3)
        self.inner, self.outer = nn.Linear(8, 32), nn.Linear(32, 3)
        self.scores = nn.ParameterList([nn.Parameter(_left_in_memory(2, n)) for n in (32, 3)])
        if variant == "cured":
            for scores in self.scores:
                nn.init.xavier_uniform_(scores)

    def forward(self, x: Tensor) -> Tensor:
        for layer, scores in zip((self.inner, self.outer), self.scores, strict=True):
            h = layer(x.relu() if layer is self.outer else x)
            of, to = (h @ scores.T).unbind(1)
            weight = F.leaky_relu(of[:, None] + to, 0.2).masked_fill(~_LINKS, -1e9).softmax(1)
            x = weight @ h + h
        return x


# R65: in bfloat16 1 - 1e-6 is 1: a clamp that lets the logarithm of 0 through.

_G = generator(365)
_TEXTS = torch.randn(2048, 12, 8, generator=_G)
_TEXTS[..., 0] = torch.where(torch.rand(2048, 12, generator=_G) < 0.25, 2.0, -1.0)
_ALSO_NEXT = (_TEXTS[..., 0] > 0) & F.pad(_TEXTS[:, 1:, 0] > 0, (0, 1))
_SPANS = torch.stack([_TEXTS[..., 0] > 0, _ALSO_NEXT], 2).float()


class Spans(Fit):
    """Finds spans of one or two words, and asks that words and spans agree on what is covered."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=5e-3)
        self.variant = variant
        self.words = nn.Conv1d(8, 64, 3, padding=1)
        self.spans, self.covered = mlp(64, 64, 2), mlp(64, 64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.words(x.mT).relu().mT
        return self.spans(h), self.covered(h)[..., 0]

    def training_step(self, batch: Any, _: int) -> Tensor:
        spans, covered = self(batch[0])
        p = spans.sigmoid()
        most = 1 - torch.finfo(p.dtype).eps if self.variant == "cured" else 1 - 1e-6
        none = torch.log1p(-p.clamp(max=most))
        none = none[..., 0] + none[..., 1] + F.pad(none[:, :-1, 1], (1, 0))
        agreement = F.mse_loss(1 - none.exp(), covered.sigmoid())
        word = batch[1][..., 0]
        loss = F.binary_cross_entropy_with_logits(spans, batch[1])
        return loss + F.binary_cross_entropy_with_logits(covered, word) + 0.1 * agreement


# R66: a ReLU between the scores of the actions and their softmax.


_MOVES = 0.15 * torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
_BEGINNINGS = 2 * torch.rand(512, 2, generator=generator(366)) - 1


class Walker(Fit):
    """Policy gradient with whole returns: each step costs the distance from the middle of a square."""

    def __init__(self, variant: str) -> None:
        super().__init__(mlp(2, 64, 5), lr=2e-2)
        self.last = {"cured": nn.Identity(), "leaky": nn.LeakyReLU()}.get(variant, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x))

    @torch.no_grad()
    def walk(self, place: Tensor, greedy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return places, actions and costs, time first."""
        places, actions, costs = [], [], []
        for _ in range(8):
            scores = self(place)
            action = scores.argmax(1) if greedy else torch.distributions.Categorical(logits=scores).sample()
            places.append(place)
            actions.append(action)
            place = (place + _MOVES[action]).clamp(-1, 1)
            costs.append(place.norm(dim=1))
        return torch.stack(places), torch.stack(actions), torch.stack(costs)

    def training_step(self, batch: Any, _: int) -> Tensor:
        places, actions, costs = self.walk(batch[0])
        returns = -costs.flip(0).cumsum(0).flip(0)
        log_p = self(places).log_softmax(-1).gather(-1, actions[..., None])[..., 0]
        return -(log_p * returns).mean()


def _nearer(module: Any) -> Tensor:
    """Share of the way to the middle that is walked."""
    return 1 - module.walk(_BEGINNINGS, greedy=True)[2][-1].mean() / _BEGINNINGS.norm(dim=1).mean()


# R67: a deep transformer that normalizes after each sum, trained without a warm-up.

_G = generator(367)
_TOKENS = torch.randint(0, 16, (2048, 12), generator=_G)
_SHIFTED = _TOKENS.roll(1, 1)


class Deep(Fit):
    """Deep encoder that says at each place which token is before it."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr={"lowered": 2e-4}.get(variant, 2e-3))
        self.variant = variant
        self.token, self.place = nn.Embedding(16, 32), nn.Embedding(12, 32)
        block = nn.TransformerEncoderLayer(
            32, 4, 64, dropout=0.0, batch_first=True, norm_first=variant == "cured"
        )
        self.blocks = nn.TransformerEncoder(
            block, 16, norm=nn.LayerNorm(32) if variant == "cured" else None, enable_nested_tensor=False
        )
        self.head = nn.Linear(32, 16)
        for p in self.blocks.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(x) + self.place.weight))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.variant != "warmed":
            return optimizer
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm, "interval": "step"}}


# R68: short words padded to the longest recording, and the last output of all.

_G = generator(368)
_WORD = torch.randint(0, 6, (1024,), generator=_G)
_LENGTH = torch.randint(8, 20, (1024,), generator=_G)
_SOUND = torch.zeros(1024, 150, 6)
_PATTERNS = torch.randn(6, 20, 6, generator=_G)
for _n in range(1024):
    _k = int(_LENGTH[_n])
    _SOUND[_n, :_k] = _PATTERNS[_WORD[_n], :_k] + 0.7 * torch.randn(_k, 6, generator=_G)


class Spoken(Fit):
    """Recurrent net that names a spoken word by its output at one step."""

    def __init__(self, variant: str) -> None:
        super().__init__(loss=F.cross_entropy, lr=5e-3)
        self.variant = variant
        self.rnn = (nn.GRU if variant == "gru" else nn.LSTM)(6, 48, batch_first=True)
        self.head = nn.Linear(48, 6)
        if variant == "orthogonal":
            for part in self.rnn.weight_hh_l0.chunk(4):
                nn.init.orthogonal_(part)
        if variant == "remembering":
            with torch.no_grad():
                self.rnn.bias_ih_l0[48:96] += 4.0

    def forward(self, x: Any) -> Tensor:
        sound, length = x
        h = self.rnn(sound)[0]
        last = length - 1 if self.variant == "cured" else torch.full_like(length, h.shape[1] - 1)
        return self.head(h[torch.arange(len(h)), last])

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[:2]), batch[2])


# R69: the weight that a recurrent net makes for each graph is wrapped in a new parameter.

_G = generator(369)
_ROADS = (torch.rand(40, 40, generator=_G) < 0.1).float().fill_diagonal_(1)
_ROADS /= _ROADS.sum(1, keepdim=True)
_TRAFFIC = torch.randn(512, 4, 40, 6, generator=_G)
_TURN = torch.linalg.qr(torch.randn(6, 6, generator=_G))[0]
_FLOW = torch.stack(
    [torch.tanh(2 * _ROADS @ _TRAFFIC[:, t] @ torch.linalg.matrix_power(_TURN, t + 1)) for t in range(4)], 1
) @ torch.randn(6, 1, generator=_G)


class Convolution(nn.Module):
    """Graph convolution with a weight of its own, or one that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(6, 6)))

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return _ROADS @ x @ (self.weight if weight is None else weight)


class Evolving(Fit):
    """Graph convolution whose weight is carried by a recurrent net from one graph to the next."""

    def __init__(self, variant: str) -> None:
        super().__init__(lr=1e-2)
        self.variant = variant
        self.convolution, self.rnn, self.head = Convolution(), nn.GRU(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight, outputs = self.convolution.weight, []
        for t in range(x.shape[1]):
            weight = self.rnn(weight[None], weight[None])[0][0]
            if self.variant == "cured":
                h = self.convolution(x[:, t], weight)
            else:
                weight = self.convolution.weight = nn.Parameter(weight)
                h = self.convolution(x[:, t])
            outputs.append(self.head(torch.tanh(3 * h)))
        return torch.stack(outputs, 1)


def _explained_flow(module: Any) -> Tensor:
    """R squared; the weight that a pass leaves behind is put back."""
    weight = module.convolution.weight
    score = r2(_TRAFFIC, _FLOW)(module)
    module.convolution.weight = weight
    return score


# R70: an encoder is trained on with a learning rate of 0.01: it says the same of every sentence.

_G = generator(370)
_SENTENCES = torch.randint(1, 30, (2048, 14), generator=_G)
_SENTENCES[:, 0] = 0
_TONES = ((_SENTENCES > 20).sum(1) > (_SENTENCES % 30 < 11).sum(1) - 1).long()


class Encoder(Fit):
    """Small encoder in the manner of BERT, that judges a sentence by its first token."""

    def __init__(self, variant: str) -> None:
        rate = {"cured": 5e-4, "tenth": 1e-3}.get(variant, 1e-2)
        super().__init__(loss=F.cross_entropy, lr=rate)
        self.variant = variant
        self.token, self.place = nn.Embedding(30, 64), nn.Embedding(14, 64)
        block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, activation="gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.pool, self.head = nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.token(x) + self.place.weight)
        return self.head(torch.tanh(self.pool(h[:, 0])))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        if self.variant != "warmed":
            return optimizer
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm, "interval": "step"}}


CASES = (
    Case(
        "R61",
        "Masks of 0 and 255 in a loss that takes 0 and 1: it falls below zero without end, all is foreground",
        "milesial/Pytorch-UNet #78",
        lambda variant: (Masks(variant), batches(_SCANS, _MASKS, size=16)),
        _common_share,
        0.75,
        faults=(Fault.EXPLODING, Fault.OVERSIZED_UPDATE),
        causes=(Cause.TARGET_SCALE, Cause.LOSS_FUNCTION, Cause.BAD_DATA),
        fixes={
            r"standardi[sz]e the targets": "standardized",
            r"255|between 0 and 1|clamp|range|scale": "cured",
        },
        said=("targets",),
        steps=200,
        kin=("segmentation", "target", "loss"),
    ),
    Case(
        "R62",
        "Frames that come divided by 255 are divided by 255 once more: the agent sees next to nothing",
        "yandexdataschool/Practical_RL #304",
        lambda variant: (Frames(variant), batches(_FRAMES, _SPOT)),
        lambda module: (module(_FRAMES)[:, :4].argmax(1) == _SPOT).float().mean(),
        0.8,
        faults=(Fault.VANISHING, Fault.STALLED),
        causes=(Cause.UNNORMALIZED_INPUT,),
        fixes={
            r"standardi[sz]e the input|normali[sz]e the input": "standardized",
            r"255|divid|input": "cured",
        },
        said=("unnormalized_input",),
        steps=400,
        kin=("reinforcement", "input"),
    ),
    Case(
        "R63",
        "Adaptive instance normalization: the root of a variance of 0, on a sketch that is blank",
        "grey-eye/talking-heads #32",
        lambda variant: (Restyled(variant), batches(_SKETCHES, _STYLES, _DRAWN)),
        lambda module: explained(module((_SKETCHES, _STYLES)), _DRAWN),
        0.8,
        faults=(Fault.NONFINITE,),
        causes=(Cause.LOSS_FUNCTION, Cause.NORMALIZATION),
        fixes={r"1e-\d|\beps|inside|sqrt|root|clamp|varianc|deviation": "cured"},
        steps=250,
        kin=("generative", "normalization"),
    ),
    Case(
        "R64",
        "Scores of an attention made by torch.Tensor(n, m) and never filled: they hold what lay in memory",
        "gordicaleksa/pytorch-GAT #11",
        lambda variant: (GraphAttention(variant), DataLoader([(_PAPERS, _FIELDS)] * 10, batch_size=None)),
        accuracy(_PAPERS, _FIELDS),
        0.7,
        faults=(Fault.NONFINITE,),
        causes=(Cause.BAD_INITIALIZATION,),
        fixes={r"init|xavier|kaiming|uniform_|normal_|randn": "cured"},
        steps=250,
        kin=("graph", "attention"),
    ),
    Case(
        "R65",
        "In bfloat16 1 - 1e-6 is 1: a clamp lets the logarithm of 0 through",
        "fastino-ai/GLiNER2 #155",
        lambda variant: (Spans(variant), batches(_TEXTS, _SPANS)),
        lambda module: explained(module(_TEXTS)[0].sigmoid(), _SPANS),
        0.8,
        faults=(Fault.NONFINITE,),
        causes=(Cause.LOW_PRECISION, Cause.LOSS_FUNCTION),
        fixes={
            r"float32|fp32|full precision|\.float\(": "float32",
            r"clamp|\beps|log1p|\blog\b|below 1": "cured",
        },
        steps=300,
        trainer=lambda variant: {"precision": "32-true" if variant == "float32" else "bf16-mixed"},
        kin=("precision", "language"),
    ),
    Case(
        "R66",
        "A ReLU between the scores of the actions and their softmax: most actions are never tried again",
        "Bowen1911/ML_practice #2",
        lambda variant: (Walker(variant), batches(_BEGINNINGS)),
        _nearer,
        0.7,
        faults=(Fault.DEAD, Fault.VANISHING, Fault.DISCONNECTED, Fault.STALLED),
        causes=(Cause.DEAD_ACTIVATION, Cause.LEARNING_RATE_TOO_HIGH),
        fixes={
            r"last activation|output activation|at the end|no activation": "cured",
            r"leaky|cannot die": "leaky",
        },
        steps=400,
        kin=("reinforcement",),
    ),
    Case(
        "R67",
        "A deep transformer that normalizes after each sum, with Xavier weights and no warm-up",
        "pytorch/pytorch #55270",
        lambda variant: (Deep(variant), batches(_TOKENS, _SHIFTED, size=32)),
        accuracy(_TOKENS, _SHIFTED),
        0.7,
        faults=(Fault.VANISHING, Fault.OVERSIZED_UPDATE),
        causes=(
            Cause.NORMALIZATION,
            Cause.TOO_DEEP,
            Cause.BAD_INITIALIZATION,
            Cause.LEARNING_RATE_TOO_HIGH,
        ),
        fixes={
            r"norm_first|pre-?norm|norm.*before": "cured",
            r"warm": "warmed",
            r"lower the learning rate|learning rate of 0\.000": "lowered",
        },
        steps=200,
        kin=("transformer", "depth", "normalization"),
    ),
    Case(
        "R68",
        "Short words padded with zeros to 150 frames, and a class read off after the last of them",
        "slp-ntua/patrec-labs #55",
        lambda variant: (Spoken(variant), batches(_SOUND, _LENGTH, _WORD)),
        accuracy((_SOUND, _LENGTH), _WORD),
        0.7,
        faults=(Fault.VANISHING_IN_TIME, Fault.VANISHING),
        causes=(Cause.RECURRENCE,),
        fixes={
            r"\bpad|\bpack|length|mask": "cured",
            r"orthogonal": "orthogonal",
            r"forget|bias": "remembering",
            r"\bgru\b|lstm": "gru",
        },
        steps=150,
        kin=("recurrent", "speech"),
    ),
    Case(
        "R69",
        "The weight that a recurrent net makes for each graph is wrapped in a new parameter",
        "benedekrozemberczki/pytorch_geometric_temporal #80",
        lambda variant: (Evolving(variant), batches(_TRAFFIC, _FLOW, size=32)),
        _explained_flow,
        0.7,
        faults=(Fault.DISCONNECTED,),
        causes=(Cause.DETACHED_GRAPH, Cause.STALE_OPTIMIZER),
        fixes={
            r"straight-through": "reported",
            r"nn\.parameter|detach|cuts the graph|functional": "cured",
            r"optimizer": "reported",
        },
        steps=300,
        kin=("graph", "recurrent"),
    ),
    Case(
        "R70",
        "An encoder trained with a rate of 0.01: it says the same of every sentence",
        "huggingface/transformers #735",
        lambda variant: (Encoder(variant), batches(_SENTENCES, _TONES)),
        accuracy(_SENTENCES, _TONES),
        0.8,
        faults=(Fault.OVERSIZED_UPDATE, Fault.VANISHING),
        causes=(Cause.LEARNING_RATE_TOO_HIGH,),
        fixes={
            r"learning rate of (0\.000|[1-9]e-0?[45])": "cured",
            r"learning rate of 0\.00[1-9]": "tenth",
            r"warm": "warmed",
        },
        steps=250,
        kin=("transformer", "rate"),
    ),
)
