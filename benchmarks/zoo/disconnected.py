"""Cases of parameters without a gradient path from the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Case
from benchmarks.zoo.models import Branches, Chain, he
from benchmarks.zoo.recipes import adam, pair
from benchmarks.zoo.sequences import lookup
from benchmarks.zoo.tasks import Task, templates
from benchmarks.zoo.training import Training
from lightning_gradguard import Cause, Fault

GONE = Fault.DISCONNECTED


class Coder(nn.Module):
    """Encoder to three numbers, an operation in between, and a decoder.

    || A random encoder cannot be compensated there.
    """

    def __init__(self, task: Task, between: str) -> None:
        super().__init__()
        self.encoder = Chain(task.inputs, 3, depth=2, weight=he())
        self.decoder = Chain(3, task.outputs, depth=2, weight=he())
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        if self.between == "detach":
            code = code.detach()
        elif self.between == "round":
            code = torch.round(2 * code) / 2
        elif self.between == "numpy":
            code = torch.from_numpy(code.detach().numpy().clip(-9, 9))
        elif self.between == "straight-through":
            code = code + (torch.round(2 * code) / 2 - code).detach()
        return self.decoder(code)


def _coder(seed: int, *, between: str) -> Training:
    task = templates(seed)
    return Training(Coder(task, between), task, adam(3e-3), seed=seed)


class Siamese(nn.Module):
    """Two encoders and a head on their difference; one can be left out of the graph."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.left = Chain(32, 2, depth=1, weight=he())
        self.right = Chain(32, 2, depth=1, weight=he())
        self.both = Branches(self.left, self.right, 32, detach_left=detach)
        self.head = Chain(4, 10, depth=1, weight=he())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.both(x)))


def _siamese(seed: int, *, detach: bool) -> Training:
    return Training(Siamese(detach), templates(seed), adam(3e-3), seed=seed)


class HardAttention(nn.Module):
    """Attention that selects a value by the arg-max over keys, which has no gradient, or by a softmax, which has."""

    def __init__(self, width: int, *, hard: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, 32), nn.Linear(width, 32)
        self.v = nn.Linear(width, 32)
        self.head = nn.Linear(32, width // 2)
        self.hard = hard

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bf,btf->bt", self.q(x[:, -1]), self.k(x[:, :-1]))
        weights = torch.softmax(logits, 1)
        if self.hard:
            weights = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).float()
        return self.head(torch.einsum("bt,btf->bf", weights, self.v(x[:, :-1])))


def _attention(seed: int, *, hard: bool) -> Training:
    task = lookup(seed)
    return Training(HardAttention(task.inputs, hard=hard), task, adam(1e-2), seed=seed)


class _Gated(nn.Module):
    """Residual branch behind a gate that may be zero."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 3)
        self.branch = Chain(64, 3, depth=2, weight=he())
        self.head = Chain(3, 10, depth=1, weight=he())
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.head(0.05 * self.stem(x).detach() + self.gate * self.branch(x))


def _gated(seed: int, *, gate: float) -> Training:
    return Training(_Gated(gate), templates(seed), adam(3e-3), seed=seed)


_encoder = {
    "level": 0.9,
    "fault": GONE,
    "cause": Cause.DETACHED_GRAPH,
    "culprits": ("net.encoder.*",),
    "kin": ("dense", "adam"),
}

CASES = [
    Case(
        "X01",
        "detach() between encoder and decoder",
        **pair(_coder, faulty={"between": "detach"}, fixed={"between": ""}),
        **_encoder,
    ),
    Case(
        "X02",
        "a round trip through numpy between encoder and decoder",
        **pair(_coder, faulty={"between": "numpy"}, fixed={"between": ""}),
        **_encoder,
    ),
    Case(
        "X03",
        "round() between encoder and decoder: the path is there, the gradient is zero",
        **pair(_coder, faulty={"between": "round"}, fixed={"between": "straight-through"}),
        **_encoder,
        also=(Fault.DEAD,),
        why="all rows are zero as well; only the graph tells the two apart",
    ),
    Case(
        "X04",
        "one of two encoders is detached",
        **pair(_siamese, faulty={"detach": True}, fixed={"detach": False}),
        level=0.8,
        fault=GONE,
        cause=Cause.DETACHED_GRAPH,
        culprits=("net.left.*",),
        kin=("branches", "adam"),
    ),
    Case(
        "X05",
        "attention by arg-max: queries and keys get nothing",
        **pair(_attention, faulty={"hard": True}, fixed={"hard": False}),
        level=0.9,
        fault=GONE,
        cause=Cause.DETACHED_GRAPH,
        culprits=("net.q.*", "net.k.*"),
        kin=("transformer", "adam"),
    ),
    Case(
        "X06",
        "a branch times a gate that is exactly zero",
        **pair(_gated, faulty={"gate": 0.0}, fixed={"gate": 1.0}),
        level=0.8,
        fault=GONE,
        cause=Cause.DETACHED_GRAPH,
        culprits=("net.branch.*",),
        also=(Fault.DEAD,),
        why="the path is there, and all rows are zero",
        kin=("branches", "adam"),
    ),
]
