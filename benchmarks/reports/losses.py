"""Reports of nets that do not learn, since the loss is the mistake."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.reports.case import CURED, Case
from benchmarks.reports.parts import accuracy, explained
from benchmarks.reports.supervised import DIGITS, LABELS, Supervised, adam, batches, sgd
from lightning_gradguard import Cause, Fault


def _solids() -> tuple[Tensor, Tensor]:
    """Return 800 clouds of 48 points on five solids, [800, 3, 48], and the number of the solid."""
    g = torch.Generator().manual_seed(21)
    kind = torch.arange(800) % 5
    p = F.normalize(torch.randn(800, 48, 3, generator=g), dim=-1)
    cube = p / p.abs().amax(-1, keepdim=True)
    disc = p * torch.tensor([1.0, 1.0, 0.1])
    rod = p * torch.tensor([0.2, 0.2, 1.5])
    ball = p * torch.rand(800, 48, 1, generator=g)
    clouds = torch.stack([p, cube, disc, rod, ball], 1)[torch.arange(800), kind]
    return (clouds + 0.03 * torch.randn(800, 48, 3, generator=g)).mT.contiguous(), kind


_CLOUDS, _SOLIDS = _solids()


class PointNet(L.LightningModule):
    """Classifies clouds of points: layers shared by all points, a maximum, a linear head."""

    def __init__(self, log_softmax: bool) -> None:
        super().__init__()
        self.log_softmax = log_softmax
        self.points = nn.Sequential(nn.Conv1d(3, 32, 1), nn.ReLU(), nn.Conv1d(32, 64, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.points(x).amax(-1))
        return F.log_softmax(scores, dim=-1) if self.log_softmax else scores

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.nll_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def _raw_outputs(variant: str) -> tuple[L.LightningModule, Any]:
    return PointNet(log_softmax=variant == CURED), batches(_CLOUDS, _SOLIDS)


def _lesions() -> tuple[Tensor, Tensor]:
    """Return 400 noisy images of 16 by 16 with one bright square of 3 by 3 each, and its mask."""
    g = torch.Generator().manual_seed(22)
    corner = torch.randint(0, 13, (400, 2), generator=g)
    masks = torch.zeros(400, 1, 16, 16)
    for mask, (i, j) in zip(masks, corner.tolist(), strict=True):
        mask[0, i : i + 3, j : j + 3] = 1
    return masks + 0.3 * torch.randn(masks.shape, generator=g), masks


_SCANS, _MASKS = _lesions()


def dice(x: Tensor, masks: Tensor, cut: float) -> Any:
    """Return a score: overlap of the mask with where the output is above a cut."""

    def score(module: Any) -> Any:
        found = (module(x) > cut).float()
        return 2 * (found * masks).sum() / (found.sum() + masks.sum())

    return score


def segmenter() -> list[nn.Module]:
    """Return the layers of a small net from image to one score a pixel."""
    widths = [1, 16, 16]
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
    return [*layers, nn.Conv2d(16, 1, 3, padding=1)]


def _two_sigmoids(variant: str) -> tuple[L.LightningModule, Any]:
    layers = segmenter() if variant == CURED else [*segmenter(), nn.Sigmoid()]
    module = Supervised(nn.Sequential(*layers), F.binary_cross_entropy_with_logits, sgd(0.3, 0.9))
    return module, batches(_SCANS, _MASKS, size=16)


class BestOf:
    """Score of masks at the better of two cuts: of a logit, and of a probability."""

    def __call__(self, module: Any) -> Any:
        return max(dice(_SCANS, _MASKS, 0.0)(module), dice(_SCANS, _MASKS, 0.5)(module))


def _ratings() -> tuple[Tensor, Tensor]:
    """Return 1200 texts of 12 words out of 80, and a rating from 0 to 16 that sums the words' weights, [1200]."""
    g = torch.Generator().manual_seed(23)
    words = torch.randint(0, 80, (1200, 12), generator=g)
    rating = torch.randn(80, generator=g)[words].sum(1)
    return words, (8 + 2 * rating).clamp(0, 16)


_WORDS, _RATING = _ratings()


def _broadcast(variant: str) -> tuple[L.LightningModule, Any]:
    tail: list[nn.Module] = [] if variant == CURED else [nn.Flatten(0)]
    net = nn.Sequential(
        nn.Embedding(80, 32), nn.Flatten(), nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, 1), *tail
    )
    return Supervised(net, F.mse_loss, adam(3e-3)), batches(_WORDS, _RATING[:, None], size=32)


def _teacher() -> Tensor:
    """Return soft labels of the digits, [1797, 10]: likeness to the mean of each class."""
    means = torch.stack([DIGITS[c == LABELS].mean(0) for c in range(10)])
    return (-(torch.cdist(DIGITS, means) ** 2) / 2).softmax(-1)


_TEACHER = _teacher()


def _probabilities_for_log(variant: str) -> tuple[L.LightningModule, Any]:
    last = nn.LogSoftmax(-1) if variant == CURED else nn.Softmax(-1)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), last)
    loss = lambda out, y: F.kl_div(out, y, reduction="batchmean")  # noqa: E731
    return Supervised(net, loss, adam(3e-3)), batches(DIGITS, _TEACHER)


def _closeness(module: Any) -> Any:
    """Return the share of the uniform guess's divergence from the teacher that the student has lost."""
    log = F.log_softmax(module.net[:-1](DIGITS), -1)
    guess = F.kl_div(torch.full_like(log, 0.1).log(), _TEACHER, reduction="batchmean")
    return 1 - F.kl_div(log, _TEACHER, reduction="batchmean") / guess


def _sequences() -> tuple[Tensor, Tensor]:
    """Return 1000 sequences of 40 letters, one-hot [1000, 4, 40], and 1 where a motif is planted, [1000, 1]."""
    g = torch.Generator().manual_seed(25)
    letters = torch.randint(0, 4, (1000, 40), generator=g)
    label = torch.arange(1000) % 2
    places = torch.randint(0, 34, (1000,), generator=g).tolist()
    for row, place, planted in zip(letters, places, label.tolist(), strict=True):
        if planted:
            row[place : place + 6] = torch.tensor([0, 2, 2, 3, 1, 0])
    return F.one_hot(letters, 4).mT.float(), label[:, None].float()


_DNA, _PLANTED = _sequences()


class MotifFinder(L.LightningModule):
    """Convolution, maximum, and the probability that a motif is there."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(4, 32, 7, padding=3), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.binary_cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def _one_logit(variant: str) -> tuple[L.LightningModule, Any]:
    return MotifFinder(nn.Sigmoid() if variant == CURED else nn.Softmax(dim=1)), batches(_DNA, _PLANTED)


def _found(module: Any) -> Any:
    return ((module(_DNA) > 0.5) == (_PLANTED > 0.5)).float().mean()


CASES = (
    Case(
        "R21",
        "Raw outputs into nll_loss: the loss falls below zero without end, the classes are not learnt",
        "yanx27/Pointnet_Pointnet2_pytorch #30",
        _raw_outputs,
        accuracy(_CLOUDS, _SOLIDS),
        0.8,
        faults=(Fault.EXPLODING, Fault.OVERSIZED_UPDATE, Fault.SPIKE),
        said=("nll_loss", "log_softmax", "log-softmax", "log-probabilit"),
        causes=(Cause.LOSS_FUNCTION,),
        fixes={r"log_?softmax|cross.?entropy|log.prob": CURED},
        steps=250,
        kin=("loss", "classification"),
    ),
    Case(
        "R22",
        "A sigmoid in the net, and one in the loss: a small segmentation net calls everything background",
        "avBuffer/UNet3plus_pth #23",
        _two_sigmoids,
        BestOf(),
        0.6,
        faults=(Fault.VANISHING, Fault.STALLED, Fault.DEAD),
        said=("sigmoid",),
        causes=(Cause.LOSS_FUNCTION,),
        fixes={r"(?s)\A(?!non-saturating).*(sigmoid|logits)": CURED},
        steps=250,
        kin=("loss", "segmentation"),
    ),
    Case(
        "R23",
        "Predictions [32] against labels [32, 1]: each prediction is compared with every label, and the mean is learnt",
        "deepset-ai/FARM #229",
        _broadcast,
        lambda module: explained(module(_WORDS).flatten(), _RATING),
        0.6,
        faults=(),
        said=("broadcast",),
        causes=(Cause.LOSS_FUNCTION,),
        fixes={r"squeeze|view|reshape|broadcast|same shape|flatten": CURED},
        kin=("loss", "regression"),
    ),
    Case(
        "R24",
        "kl_div of probabilities where it expects their logarithms: the student becomes sure of one class",
        "microsoft/ProDA #20",
        _probabilities_for_log,
        _closeness,
        0.8,
        faults=(Fault.VANISHING, Fault.STALLED),
        said=("log_softmax", "log-softmax", "kl_div", "log-probabilit"),
        causes=(Cause.LOSS_FUNCTION,),
        fixes={r"log_?softmax|log.prob|\.log\(": CURED},
        kin=("loss", "distillation"),
    ),
    Case(
        "R25",
        "A softmax over a single output is 1 whatever comes in: the loss is constant",
        "imathworks.com/cv/solved-sigmoid-vs-softmax-accuracy-difference",
        _one_logit,
        _found,
        0.85,
        faults=(Fault.DISCONNECTED, Fault.VANISHING, Fault.STALLED, Fault.DEAD),
        said=("softmax",),
        causes=(Cause.LOSS_FUNCTION,),
        fixes={r"(?s)\A(?!non-saturating).*(softmax|sigmoid|logits)": CURED},
        kin=("loss", "classification"),
    ),
)
