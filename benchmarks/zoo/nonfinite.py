"""Cases of NaN and Inf."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.case import Case
from benchmarks.zoo.generative import Contrastive, Variational
from benchmarks.zoo.models import Chain, Half, he
from benchmarks.zoo.recipes import adam, chain, convnet, pair, sgd
from benchmarks.zoo.sequences import lookup
from benchmarks.zoo.tasks import Task, regression, templates
from benchmarks.zoo.training import Training
from lightning_gradguard import Cause, Fault

NAN = Fault.NONFINITE


def scaling() -> dict[str, Any]:
    """Return Trainer arguments for real fp16 mixed precision with a GradScaler, on the CPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


def _nan_input(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if number == 150:
        x = x.clone()
        x[3, 5] = torch.nan
    return x, y


def _nan_target(number: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.where(torch.rand(y.shape) < 0.1, torch.nan, y) if number == 120 else y


def _broken_feed(number: int, x: Tensor, y: Tensor, *, since: int = 100) -> tuple[Tensor, Tensor]:
    """Divide a feature by its standard deviation, which is zero."""
    if number >= since:
        x = x.clone()
        x[:, 0] = (x[:, 0] - x[:, 0]) / (x[:, 0] - x[:, 0]).std()
    return x, y


def _with_loss(seed: int, *, loss: str, base: Any = regression) -> Training:
    """Return a regression with a hand-written loss."""
    own = base(seed)

    def by_hand(output: Tensor, target: Tensor) -> Tensor:
        if loss == "relative":
            target = torch.where(target.abs() < 0.05, 0.0, target)  # true zeros in the data
            return ((output - target) / target).abs().mean()
        if loss == "relative, safe":
            return ((output - target).abs() / (target.abs() + 0.5)).mean()
        if loss == "rate":
            return (output.exp() - target * output).mean()
        raise ValueError(loss)

    task = Task(own.draw, by_hand, own.score, own.inputs, own.outputs)
    return Training(Chain(own.inputs, own.outputs, depth=2, weight=he()), task, adam(2e-3), seed=seed)


def _log_of_zero(seed: int, *, safe: bool) -> Training:
    """Return a hand-written negative log-likelihood: the log of a softmax underflows as the net becomes certain."""
    own = templates(seed, noise=0.3)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if safe:
            return F.cross_entropy(output, target)
        return -(F.one_hot(target, 10) * torch.softmax(output, 1).log()).sum(1).mean()

    task = Task(own.draw, loss, own.score, own.inputs, own.outputs)
    return Training(Chain(64, 10, depth=2, weight=he(4.0)), task, sgd(0.02), seed=seed)


def _counts(seed: int, *, factor: float) -> Task:
    """Return counts whose log rate is a smooth function of the inputs; the score is on logs."""
    own = regression(seed)

    def draw(generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        x, rate = own.draw(generator, size)
        return factor * x, torch.poisson(rate.exp(), generator=generator)

    def score(output: Tensor, target: Tensor) -> Tensor:
        return own.score(output.exp().sqrt(), target.sqrt())

    return Task(draw, own.loss, score, own.inputs, own.outputs)


class _Masked(nn.Module):
    """Attention pooling with a mask that excludes every step of some sequences."""

    def __init__(self, width: int, *, fill: float) -> None:
        super().__init__()
        self.score, self.value = nn.Linear(width, 1), nn.Linear(width, 32)
        self.head = Chain(32 + width, width // 2, depth=1, weight=he())
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        match = (x[:, :-1, : x.shape[2] // 2] * x[:, -1:, : x.shape[2] // 2]).sum(2)
        match[torch.arange(len(x)) % 32 == 31] = 0.0
        logits = self.score(x[:, :-1])[..., 0].masked_fill(match < 0.5, self.fill)
        pooled = torch.einsum("bt,btf->bf", torch.softmax(logits, 1), self.value(x[:, :-1]))
        return self.head(torch.cat([pooled, x[:, -1]], 1))


def _masked(seed: int, *, fill: float) -> Training:
    task = lookup(seed)
    return Training(_Masked(task.inputs, fill=fill), task, adam(5e-3), seed=seed)


def _half(seed: int, *, gain: float, dtype: torch.dtype = torch.float16) -> Training:
    task = templates(seed)
    net = Chain(task.inputs, task.outputs, depth=6, weight=he(gain))
    return Training(Half(net, dtype), task, sgd(0.05), seed=seed)


CASES = [
    Case(
        "E07",
        "NaN in one input at step 150",
        **pair(chain, faulty={"spoil": _nan_input}, fixed={}, depth=4, weight=he()),
        level=0.9,
        fault=NAN,
        cause=Cause.BAD_DATA,
        culprits=("net.*",),
        onset=150,
        kind="event",
        kin=("dense", "sgd"),
    ),
    Case(
        "E10",
        "log of a softmax that underflows, in the loss",
        **pair(_log_of_zero, faulty={"safe": False}, fixed={"safe": True}),
        level=0.9,
        fault=NAN,
        cause=Cause.LOSS_FUNCTION,
        culprits=("net.*",),
        kin=("dense", "sgd"),
    ),
    Case(
        "N01",
        "NaN targets in one batch at step 120",
        **pair(
            chain, faulty={"spoil": _nan_target}, fixed={}, task=regression, depth=3, optimizer=adam(3e-3)
        ),
        level=0.8,
        fault=NAN,
        cause=Cause.BAD_DATA,
        culprits=("net.*",),
        onset=120,
        kind="event",
        kin=("dense", "regression", "adam"),
    ),
    Case(
        "N02",
        "relative error with zeros among the targets",
        **pair(_with_loss, faulty={"loss": "relative"}, fixed={"loss": "relative, safe"}),
        level=0.6,
        fault=NAN,
        cause=Cause.LOSS_FUNCTION,
        culprits=("net.*",),
        kin=("dense", "regression", "adam"),
    ),
    Case(
        "N03",
        "square root at zero, in a contrastive distance: the loss is finite, its gradient is not",
        **pair(Contrastive, faulty={"eps": 0.0}, fixed={"eps": 1e-6}, distance=True),
        level=0.5,
        fault=NAN,
        cause=Cause.LOSS_FUNCTION,
        culprits=("net.*",),
        kin=("contrastive", "adam"),
    ),
    Case(
        "N04",
        "variational autoencoder whose log variance overflows",
        **pair(Variational, faulty={"spread": 100.0}, fixed={"spread": 0.0}),
        level=0.7,
        fault=NAN,
        cause=Cause.BAD_INITIALIZATION,
        culprits=("encoder.*", "decoder.*"),
        kin=("generative", "adam"),
    ),
    Case(
        "N05",
        "a mask that leaves attention nothing: softmax over minus infinities",
        **pair(_masked, faulty={"fill": -torch.inf}, fixed={"fill": -1e4}),
        level=0.8,
        fault=NAN,
        cause=Cause.LOSS_FUNCTION,
        culprits=("net.score.*", "net.value.*", "net.head.*"),
        kin=("transformer", "adam"),
    ),
    Case(
        "N06",
        "half-precision activations that overflow",
        **pair(
            _half, faulty={"gain": 6.0, "dtype": torch.float16}, fixed={"gain": 1.0, "dtype": torch.bfloat16}
        ),
        level=0.8,
        fault=NAN,
        cause=Cause.LOW_PRECISION,
        culprits=("net.*",),
        kin=("low precision", "sgd"),
    ),
    Case(
        "N07",
        "a feature divided by its spread of zero, from step 100 on",
        **pair(convnet, faulty={"spoil": _broken_feed}, fixed={}, depth=3, weight=he()),
        level=0.8,
        fault=NAN,
        cause=Cause.BAD_DATA,
        culprits=("net.*",),
        onset=100,
        kin=("convolutional", "momentum"),
    ),
    Case(
        "N08",
        "NaN from step 10 on, under a gradient scaler that cannot help",
        **pair(chain, faulty={"spoil": partial(_broken_feed, since=10)}, fixed={}, depth=3, weight=he()),
        level=0.9,
        fault=NAN,
        cause=Cause.BAD_DATA,
        culprits=("net.*",),
        onset=10,
        trainer=scaling,
        kin=("dense", "mixed precision", "sgd"),
    ),
    Case(
        "N09",
        "Poisson regression on inputs that are not normalised: exp overflows",
        **pair(
            _with_loss,
            faulty={"base": partial(_counts, factor=100.0)},
            fixed={"base": partial(_counts, factor=1.0)},
            loss="rate",
        ),
        level=0.3,
        fault=NAN,
        cause=Cause.UNNORMALIZED_INPUT,
        culprits=("net.*",),
        kin=("dense", "regression", "adam"),
    ),
]
